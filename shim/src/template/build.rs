//! Makes a template: boots a machine of the shape without network and files behind its devices, waits until its agent says that it can
//! be saved, and saves it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use husk_agent_api::TEMPLATE_READY;
use thiserror::Error;

use super::code;
use super::files::StoreError;
use super::key::{InputError, Inputs};
use super::store::{Lock, Manifest, Store};
use super::{MAC, MTU};
use crate::config::{Config, ConfigError, Programs};
use crate::peer::PeerError;
use crate::peer::dial::Dial;
use crate::peer::vmm::{Beginning, Net, Snapshot, Start, Vmm};
use crate::pod::command_line;
use crate::random;
use crate::spec::size::Size;

/// Longest time for all of it.
const LIMIT: Duration = Duration::from_secs(120);

/// Longest wait for a killed VMM to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no template.
#[derive(Debug, Error)]
pub(crate) enum BuildError {
    /// The shim's installation.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What shapes it.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The VMM.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The writing.
    #[error("cannot write the template into {path}", path = path.display())]
    Save {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<PeerError>,
    },
    /// It ended.
    #[error("the template's virtual machine ended before it could be saved: {0}")]
    Ended(String),
    /// It took too long.
    #[error("waited {LIMIT:?} for {what}; the console's last lines: {console}")]
    Late {
        /// What was awaited.
        what: &'static str,
        /// What the guest said.
        console: String,
    },
    /// A file.
    #[error("cannot {doing}")]
    Io {
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What was built.
#[derive(Debug)]
pub(crate) struct Built {
    /// What it is called.
    pub(crate) name: String,
    /// Bytes of memory that it keeps.
    pub(crate) bytes: u64,
    /// How long it took.
    pub(crate) took: Duration,
}

/// Builds the template of this size, unless there is a sound one.
pub(super) async fn build(
    config: &Config,
    store: &Store,
    size: Size,
    lock: &Lock,
) -> Result<Option<Built>, BuildError> {
    let begun = Instant::now();
    let programs = config.programs()?;
    let inputs = Inputs::gather(config, &programs, size)?;
    store.sweep(lock);
    match store.find(&inputs) {
        Ok(Some(_)) => return Ok(None),
        Ok(None) | Err(StoreError::Damaged { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let name = inputs.name();
    let (directory, files) = store.begin(&name, lock)?;
    let saved = save(config, &programs, &inputs, &directory, files).await;
    let look = |source| BuildError::Io { doing: "look at the template's memory", source };
    let finished = saved.and_then(|(nonce, bytes)| {
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let memory_length = std::fs::metadata(directory.join("memory")).map_err(look)?.len();
        let code = code::of_kernel(&programs.kernel)
            .map_err(|source| BuildError::Io { doing: "look for the kernel's code", source })?;
        let manifest = Manifest { nonce: random::hex(&nonce), created_s, memory_length, code, inputs };
        store.finish(&directory, &manifest, lock)?;
        Ok(bytes)
    });
    match finished {
        Ok(bytes) => {
            let is_current = |inputs: &Inputs| {
                Inputs::gather(config, &programs, inputs.size()).is_ok_and(|current| current == *inputs)
            };
            store.prune(is_current, lock);
            Ok(Some(Built { name, bytes, took: begun.elapsed() }))
        }
        Err(error) => {
            store.abandon(&directory);
            Err(error)
        }
    }
}

/// Boots the machine and saves it into the files; its nonce, and the bytes of memory kept.
async fn save(
    config: &Config,
    programs: &Programs,
    inputs: &Inputs,
    directory: &Path,
    files: Snapshot,
) -> Result<([u8; 16], u64), BuildError> {
    let nonce = random::bytes().map_err(|source| BuildError::Io { doing: "read random bytes", source })?;
    // Nobody dials, but the device has its other end.
    let (_dial, vmm_dial) = Dial::new()?;
    let vmm = Vmm::start(Start {
        id: "template",
        program: &programs.vmm,
        size: inputs.size(),
        from: Beginning::Kernel {
            kernel: &programs.kernel,
            initramfs: &programs.initramfs,
            cmdline: command_line::template(config, &nonce),
        },
        save: Some(files),
        dial: vmm_dial,
        fs: None,
        fs_request_queues: config.fs_request_queues,
        nets: vec![Net { tap: None, mac: MAC, mtu: MTU }],
        netns: None,
        uid: config.vmm_uid_base.saturating_add(std::process::id()),
        serial: false,
    })?;
    let work = async {
        if !vmm.console.until(TEMPLATE_READY).await {
            return Err(BuildError::Ended(vmm.ended().await));
        }
        vmm.save().await.map_err(|error| BuildError::Save { path: directory.to_owned(), source: Box::new(error) })
    };
    let saved = tokio::select! {
        biased;
        saved = tokio::time::timeout(LIMIT, work) => match saved {
            Ok(saved) => saved,
            Err(_) => Err(BuildError::Late { what: "the template's machine", console: vmm.console.last(Duration::ZERO).await }),
        },
        cause = vmm.ended() => Err(BuildError::Ended(cause)),
    };
    vmm.helper.end(KILL_LIMIT).await;
    saved.map(|bytes| (nonce, bytes))
}

/// Opens a file for what a build says, emptied.
pub(super) fn log_file(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
}
