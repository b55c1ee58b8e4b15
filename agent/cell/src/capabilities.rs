//! The process's capability sets (capabilities(7)).

use std::str::FromStr;

use caps::{CapSet, Capability, CapsHashSet};
use oci_spec::runtime::{Capabilities, LinuxCapabilities};

use crate::fault::{Fault, Step};

/// The sets a process is to have; a process without any gets none.
#[derive(Default)]
pub(crate) struct Sets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    permitted: CapsHashSet,
    inheritable: CapsHashSet,
    ambient: CapsHashSet,
}

impl Sets {
    /// Reads the spec. Capabilities that the kernel doesn't know are left out, as a kernel without them can't refuse what they allow.
    pub(crate) fn of(spec: Option<&LinuxCapabilities>) -> Step<Self> {
        let Some(spec) = spec else { return Ok(Self::default()) };
        // By prctl(PR_CAPBSET_READ), not by /proc, which may be the container's.
        let known = caps::runtime::thread_all_supported();
        let set = |names: &Option<Capabilities>| -> Step<CapsHashSet> {
            let mut set = CapsHashSet::new();
            for name in names.iter().flatten() {
                let name = name.to_string();
                let full = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
                let capability =
                    Capability::from_str(&full).map_err(|_| Fault::new(format!("unknown capability {full}")))?;
                if known.contains(&capability) {
                    set.insert(capability);
                }
            }
            Ok(set)
        };
        Ok(Self {
            bounding: set(spec.bounding())?,
            effective: set(spec.effective())?,
            permitted: set(spec.permitted())?,
            inheritable: set(spec.inheritable())?,
            ambient: set(spec.ambient())?,
        })
    }

    /// The first half: needs CAP_SETPCAP, so before the user changes.
    pub(crate) fn drop_bounding(&self) -> Step<()> {
        for capability in caps::runtime::thread_all_supported() {
            if !self.bounding.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)
                    .map_err(|e| Fault::new(format!("drop {capability} from the bounding set: {e}")))?;
            }
        }
        Ok(())
    }

    /// The second half, after the user changed with capabilities kept.
    pub(crate) fn apply(&self) -> Step<()> {
        let set = |which: CapSet, set: &CapsHashSet| {
            caps::set(None, which, set).map_err(|e| Fault::new(format!("set the {which:?} capabilities: {e}")))
        };
        set(CapSet::Inheritable, &self.inheritable)?;
        set(CapSet::Effective, &self.effective.intersection(&self.permitted).copied().collect())?;
        set(CapSet::Permitted, &self.permitted)?;
        caps::clear(None, CapSet::Ambient).map_err(|e| Fault::new(format!("clear the ambient capabilities: {e}")))?;
        // The kernel refuses what is not both permitted and inheritable; runc leaves such out with a warning, and so do we, without.
        for &capability in &self.ambient {
            if self.permitted.contains(&capability) && self.inheritable.contains(&capability) {
                caps::raise(None, CapSet::Ambient, capability)
                    .map_err(|e| Fault::new(format!("raise ambient {capability}: {e}")))?;
            }
        }
        Ok(())
    }
}
