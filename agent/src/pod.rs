//! What makes the booted guest the machine of one pod: clock, entropy, host name, kernel parameters, network, shared files.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use husk_agent_api::SHARED_DIR;
use husk_agent_api::agent::StartPodRequest;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use thiserror::Error;

use crate::net::{self, NetError};
use crate::sysctl::{self, SysctlError};
use crate::user::{self, UserError};

/// Most bytes of entropy taken at once.
const ENTROPY_MAX: usize = 512;

/// Why the pod could not be set up.
#[derive(Debug, Error)]
pub(crate) enum PodError {
    #[error("{length} bytes of entropy are more than {ENTROPY_MAX}")]
    EntropyLength { length: usize },
    #[error("Could not add entropy to the kernel's pool")]
    Entropy(#[source] io::Error),
    #[error("Could not set the clock")]
    Clock(#[source] Errno),
    #[error("Could not set the host name to {name:?}")]
    Hostname {
        name: String,
        #[source]
        source: Errno,
    },
    #[error("Could not mount the shared files {tag:?} at {SHARED_DIR}")]
    Shared {
        tag: String,
        #[source]
        source: io::Error,
    },
    #[error("Could not set a kernel parameter up")]
    Sysctl(#[from] SysctlError),
    #[error("Could not set the network up")]
    Net(#[from] NetError),
    #[error("Could not set the pod's user namespace up")]
    User(#[from] UserError),
}

/// Sets up everything that the request names. The network is configured while the shared files are being mounted.
pub(crate) async fn start(request: &StartPodRequest) -> Result<(), PodError> {
    if request.time_ns != 0 {
        set_clock(request.time_ns)?;
    }
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy)?;
    }
    let user_namespace = request.user_namespace.as_ref();
    if let Some(map) = user_namespace {
        user::enter(map, request).await?;
    } else if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .map_err(|source| PodError::Hostname { name: request.hostname.clone(), source })?;
    }
    let network = async {
        net::configure(request).await?;
        // After the interfaces, whose own parameters may be among them.
        match user_namespace {
            None => sysctl::set_all(&request.sysctls)?,
            Some(_) => sysctl::set_all(&user::network_parameters(&request.sysctls))?,
        }
        Ok(())
    };
    tokio::try_join!(mount_shared(request.shared_tag.clone()), network)?;
    Ok(())
}

fn set_clock(time_ns: u64) -> Result<(), PodError> {
    let time = TimeSpec::new((time_ns / 1_000_000_000) as i64, (time_ns % 1_000_000_000) as i64);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(PodError::Clock)
}

/// `struct rand_pool_info` of linux/random.h with room for the most that is taken.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; ENTROPY_MAX],
}

mod ioctls {
    // RNDADDENTROPY of random(4); its number holds the size of the two leading integers only.
    nix::ioctl_write_ptr_bad!(add_entropy, nix::request_code_write!(b'R', 0x03, 8), super::RandPoolInfo);
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// Adds to the kernel's pool, and has it used at once: pods from one template would otherwise draw the same numbers for a while.
fn add_entropy(bytes: &[u8]) -> Result<(), PodError> {
    if bytes.len() > ENTROPY_MAX {
        return Err(PodError::EntropyLength { length: bytes.len() });
    }
    let mut info =
        RandPoolInfo { entropy_count: bytes.len() as i32 * 8, buf_size: bytes.len() as i32, buf: [0; ENTROPY_MAX] };
    info.buf[..bytes.len()].copy_from_slice(bytes);
    let device = fs::OpenOptions::new().write(true).open("/dev/random").map_err(PodError::Entropy)?;
    // SAFETY: the kernel reads buf_size bytes of buf, which are within it, and keeps no pointer.
    unsafe { ioctls::add_entropy(device.as_raw_fd(), &info) }.map_err(|error| PodError::Entropy(error.into()))?;
    // SAFETY: RNDRESEEDCRNG of linux/random.h takes no argument.
    match unsafe { ioctls::reseed(device.as_raw_fd()) } {
        // The generator has never been seeded, so nothing was drawn from it either.
        Ok(_) | Err(Errno::ENODATA) => Ok(()),
        Err(error) => Err(PodError::Entropy(error.into())),
    }
}

/// Mounts the pod's share directory: virtiofs.rst of the kernel. The daemon answers the mount, so it is done on a thread.
async fn mount_shared(tag: String) -> Result<(), PodError> {
    if tag.is_empty() {
        return Ok(());
    }
    let mounting = tokio::task::spawn_blocking({
        let tag = tag.clone();
        move || {
            fs::create_dir_all(SHARED_DIR)?;
            mount(Some(tag.as_str()), SHARED_DIR, Some("virtiofs"), MsFlags::empty(), None::<&str>)?;
            Ok(())
        }
    });
    let mounted = mounting.await.map_err(io::Error::other).and_then(|mounted| mounted);
    mounted.map_err(|source| PodError::Shared { tag, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_entropy() {
        assert!(matches!(add_entropy(&[0; ENTROPY_MAX + 1]), Err(PodError::EntropyLength { length: 513 })));
    }
}
