//! The annotations `io.husk.*` by which a pod's author may ask for something. The list is closed and typed, since they come from
//! outside: none ever becomes an argument, a path or kernel command line text.

use std::collections::HashMap;

use super::SpecError;
use crate::config::{MAX_VCPUS, MIN_MEMORY_MIB};

/// All of them, for messages.
pub(crate) const KNOWN: &str = "io.husk.vcpus and io.husk.memory-mib";

/// Everything that begins so is husk's.
pub(super) const PREFIX: &str = "io.husk.";

/// What a pod asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// `io.husk.vcpus`: number of vCPUs.
    pub(crate) vcpus: Option<u8>,
    /// `io.husk.memory-mib`: the guest's memory in MiB.
    pub(crate) memory_mib: Option<u64>,
}

/// Reads husk's annotations; an unknown one is an error, others are none of husk's business.
pub(crate) fn parse(annotations: &HashMap<String, String>) -> Result<Wishes, SpecError> {
    let mut wishes = Wishes::default();
    for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
        let bad = |wanted| SpecError::AnnotationValue { key: key.clone(), value: value.clone(), wanted };
        match key.as_str() {
            "io.husk.vcpus" => {
                let vcpus = value.parse().ok().filter(|vcpus| (1..=MAX_VCPUS).contains(vcpus));
                wishes.vcpus = Some(vcpus.ok_or_else(|| bad("a number from 1 to 64"))?);
            }
            "io.husk.memory-mib" => {
                let memory = value.parse().ok().filter(|memory| (MIN_MEMORY_MIB..=16 << 20).contains(memory));
                wishes.memory_mib = Some(memory.ok_or_else(|| bad("a number of MiB, at least 64"))?);
            }
            _ => return Err(SpecError::UnknownAnnotation(key.clone())),
        }
    }
    Ok(wishes)
}
