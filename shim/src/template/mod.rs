//! Templates: virtual machines that were saved once their agent was up, from which pods of the same shape go on instead of booting
//! (shim/docs/templates.md). `key` tells what shaped one, `store` keeps them on disk (`files`: what it believes of that),
//! `notes` what is known of them until the host's next boot, `build` makes one, `background` does so after a pod's cold start, `command` is the
//! operator's side, `code` finds what all pods from one can share.

pub(crate) mod background;
mod build;
mod code;
pub(crate) mod command;
mod files;
mod key;
mod notes;
mod store;

use std::path::PathBuf;

use tracing::warn;

use crate::config::{Config, Programs, Templates};
use crate::error::chain;
use crate::peer::vmm::Saved;
use crate::spec::size::Size;
use files::StoreError;
pub(crate) use key::Inputs;
use store::Store;

/// Where it is noted which templates were verified since the host's boot, and which could not be built.
const NOTES: &str = "/run/husk/.templates";

/// Hardware address of a template's only network interface: locally administered, and "husk" in ASCII so that it is nobody's. A pod's own is set
/// after the restore; its interface still shows this one as permanent address.
pub(crate) const MAC: [u8; 6] = [0x02, 0x68, 0x75, 0x73, 0x6b, 0];

/// As the agent is told it.
pub(crate) const MAC_TEXT: &str = "02:68:75:73:6b:00";

/// The largest MTU of a template's network interface in bytes: any pod's is below it.
pub(crate) const MTU: u16 = u16::MAX;

/// One that was found.
#[derive(Debug)]
pub(crate) struct Template {
    /// What it is called.
    pub(crate) name: String,
    /// The boot nonce with which its agent will say hello.
    pub(crate) nonce: [u8; 16],
    directory: PathBuf,
    /// Tells the directory from a later one of the same name.
    inode: u64,
    /// Where its kernel's code is.
    code: Option<code::Code>,
}

/// What a pod that starts has of templates.
#[derive(Debug, Default)]
pub(crate) struct Sought {
    /// The template that it goes on from.
    pub(crate) found: Option<(Template, Saved)>,
    /// What a template for it is made of, if one is to be built where there is none that is sound.
    pub(crate) wanted: Option<Inputs>,
}

/// Looks for the template of a pod's size. What is wrong is told in the log: the pod can boot without. Reads all of a template that was
/// not used since the host's boot.
pub(crate) fn seek(config: &Config, programs: &Programs, size: Size) -> Sought {
    if config.templates == Templates::Off || config.serial {
        return Sought::default();
    }
    let inputs = match Inputs::gather(config, programs, size) {
        Ok(inputs) => inputs,
        Err(error) => {
            warn!("the pod starts without a template: {}", chain(&error));
            return Sought::default();
        }
    };
    let store = Store::of_host();
    let found = match store.find(&inputs) {
        Ok(Some((template, mut saved))) => {
            if config.share_code {
                let shared = store.notes.share(&template, &saved);
                shared.map(|code| saved.code = code).unwrap_or_else(|error| {
                    warn!("the pod has its kernel's code for itself: {}", chain(&error));
                });
            }
            Some((template, saved))
        }
        Ok(None) => None,
        Err(error) => {
            warn!("the pod starts without a template: {}", chain(&error));
            if !matches!(error, StoreError::Damaged { .. }) {
                return Sought::default();
            }
            if let Err(error) = store.remove_named(&inputs.name()) {
                warn!("{}", chain(&error));
            }
            None
        }
    };
    Sought { found, wanted: (config.templates == Templates::Auto).then_some(inputs) }
}

/// Removes a template from which a pod could not start.
pub(crate) fn discard(template: &Template) {
    if let Err(error) = Store::of_host().remove(template) {
        warn!("{}", chain(&error));
    }
}

/// Builds the template in the background, see [`background::start`].
pub(crate) fn build_in_background(wanted: &Inputs, birthplace: &background::Birthplace) {
    background::start(&Store::of_host(), wanted, birthplace);
}
