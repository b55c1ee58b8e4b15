//! Users, groups and capabilities (capabilities(7)).

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::{JailError, failed, refusal};

/// What husk-fs keeps, and for what. Left out, among others: SYS_ADMIN (trusted.* attributes: an overlay in the guest uses user.*),
/// LINUX_IMMUTABLE, SYS_RESOURCE (reserved blocks, quota), LEASE.
const FILES: [Capability; 10] = [
    Capability::CAP_CHOWN,           // chown, as the guest's root
    Capability::CAP_DAC_OVERRIDE,    // files of any user: the guest's kernel has checked its own permissions
    Capability::CAP_DAC_READ_SEARCH, // open_by_handle_at(2)
    Capability::CAP_FOWNER,          // chmod, utimes and attributes of files of any user
    Capability::CAP_FSETID,          // keep set-id bits on write and chmod
    Capability::CAP_MKNOD, // device nodes in images; the shim mounts everything nodev, so that none is ever opened here
    Capability::CAP_SETGID, // create files as the guest's group
    Capability::CAP_SETUID, // create files as the guest's user
    Capability::CAP_SETFCAP, // file capabilities, which package managers set
    Capability::CAP_IPC_LOCK, // map the guest's memory where it is locked or huge pages
];

/// Becomes the user and group for good, without capabilities.
pub(crate) fn drop_all(uid: u32, gid: u32) -> Result<(), JailError> {
    bound_to(&CapsHashSet::new())?;
    setgroups(&[]).map_err(failed("leave all groups"))?;
    let (gid, uid) = (Gid::from_raw(gid), Uid::from_raw(uid));
    setresgid(gid, gid, gid).map_err(failed("change the group"))?;
    setresuid(uid, uid, uid).map_err(failed("change the user"))?;
    keep(&CapsHashSet::new())
}

/// Stays root, with the capabilities that serving files needs.
pub(crate) fn keep_for_files() -> Result<(), JailError> {
    let wanted: CapsHashSet = FILES.into_iter().collect();
    bound_to(&wanted)?;
    setgroups(&[]).map_err(failed("leave all groups"))?;
    keep(&wanted)
}

/// No program run later gets more, nobody looks in.
pub(crate) fn seal() -> Result<(), JailError> {
    prctl::set_no_new_privs().map_err(failed("forbid new privileges"))?;
    prctl::set_dumpable(false).map_err(failed("forbid tracing"))
}

/// Takes all others out of the bounding set.
fn bound_to(wanted: &CapsHashSet) -> Result<(), JailError> {
    for capability in caps::runtime::thread_all_supported().difference(wanted) {
        caps::drop(None, CapSet::Bounding, *capability).map_err(caps_failed("shrink the bounding set"))?;
    }
    Ok(())
}

/// Keeps those of `wanted` that are there, and checks it.
fn keep(wanted: &CapsHashSet) -> Result<(), JailError> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(caps_failed("read capabilities"))?;
    let kept: CapsHashSet = permitted.intersection(wanted).copied().collect();
    caps::clear(None, CapSet::Ambient).map_err(caps_failed("clear ambient capabilities"))?;
    caps::clear(None, CapSet::Inheritable).map_err(caps_failed("clear inheritable capabilities"))?;
    // What is effective must be permitted.
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).map_err(caps_failed("drop capabilities"))?;
    }
    let now = caps::read(None, CapSet::Permitted).map_err(caps_failed("read capabilities"))?;
    if now.is_subset(wanted) { Ok(()) } else { Err(refusal("check that capabilities are gone")) }
}

fn caps_failed(step: &'static str) -> impl FnOnce(caps::errors::CapsError) -> JailError {
    move |cause| JailError { step, cause: std::io::Error::other(cause) }
}
