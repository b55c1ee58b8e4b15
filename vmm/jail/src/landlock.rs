//! Landlock (landlock(7)): a second wall behind the empty root. What is open already stays usable.

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};

use crate::JailError;

/// The newest version of Landlock that the lists of accesses are taken from; older kernels take what they know.
const NEWEST: ABI = ABI::V6;

/// Denies every access to files by path, TCP, abstract sockets and signals to processes outside. Does nothing where the kernel has no Landlock.
pub(crate) fn deny_all() -> Result<(), JailError> {
    let status = restrict().map_err(|cause| JailError {
        step: "deny file system access (Landlock)",
        cause: std::io::Error::other(cause),
    })?;
    if status == RulesetStatus::NotEnforced {
        tracing::debug!("The kernel has no Landlock; the empty root stands alone");
    }
    Ok(())
}

fn restrict() -> Result<RulesetStatus, landlock::RulesetError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    Ok(ruleset.restrict_self()?.ruleset)
}
