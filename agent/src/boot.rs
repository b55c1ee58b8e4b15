//! From the kernel's start of process 1 to the connection with the shim: only the mounts that a pod needs, and the dial under way
//! while they are made. In a template the mounts come first, and the shim dials.

use std::fs;
use std::io;
use std::path::Path;

use husk_agent_api::hello::{self, Hello};
use husk_agent_api::{NONCE_KEY, RPC_PORT, TEMPLATE_KEY};
use husk_cell::CgroupError;
use husk_cell::cgroup::Cgroup;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use thiserror::Error;
use tokio::io::AsyncWriteExt;

use crate::dial::{Connection, Dialler};
use crate::template;

/// Why the guest could not come up.
#[derive(Debug, Error)]
pub(crate) enum BootError {
    /// A step that is one system call on one path.
    #[error("Could not {step} {path}")]
    Step {
        step: &'static str,
        path: &'static str,
        #[source]
        source: io::Error,
    },
    /// The command line lacks the nonce or it is no 32 hexadecimal digits.
    #[error("The kernel command line has no {NONCE_KEY}= of 32 hexadecimal digits")]
    Nonce,
    /// The initramfs as root.
    #[error("Could not leave the initial root")]
    Root(#[source] husk_cell::CellError),
    /// No cgroup for containers.
    #[error("Could not make the cgroup of the pod")]
    Cgroup(#[source] CgroupError),
    /// Nobody answered.
    #[error("Could not reach the shim at vsock port {RPC_PORT}")]
    Dial(#[source] io::Error),
    /// No connection with whoever restored the template.
    #[error("Could not take the shim's connection at vsock port {RPC_PORT}")]
    Template(#[source] io::Error),
}

/// Where cgroup v2 is mounted.
pub(crate) const CGROUP_DIR: &str = "/sys/fs/cgroup";

/// The cgroup below it that all containers' are in.
pub(crate) const POD_CGROUP: &str = "pod";

/// The pod-wide /dev/shm, bound into containers that share the pod's ipc namespace. As large as containerd makes it (its CRI plugin's
/// defaultShmSize); who wants more mounts an emptyDir in memory there.
pub(crate) const SHM_DIR: &str = "/run/husk/shm";

/// Open files of the agent, and of containers whose spec sets no limit: the kernel's fs.nr_open, which is what containers get from
/// a containerd under systemd. The kernel's own default of 1024 is too small for both.
const OPEN_FILES: u64 = 1 << 20;

/// Sets the machine up and connects to the shim.
pub(crate) async fn boot(dialler: &Dialler) -> Result<Connection, BootError> {
    husk_cell::prepare_root().map_err(BootError::Root)?;
    mount_at("proc", "/proc", "proc", SAFE, None)?;
    let command_line = read("/proc/cmdline")?;
    crate::log::start(&command_line);
    let nonce = parameter(&command_line, NONCE_KEY).and_then(parse_nonce).ok_or(BootError::Nonce)?;
    if command_line.split_whitespace().any(|word| word == TEMPLATE_KEY) {
        mounts()?;
        // What else is to run in the template runs now.
        tokio::task::yield_now().await;
        let restored = async {
            let connection = greet(template::restored().await?, nonce).await?;
            template::forget_entropy()?;
            Ok(connection)
        };
        return restored.await.map_err(BootError::Template);
    }
    let dialled = async { greet(dialler.dial(RPC_PORT).await?, nonce).await };
    let dialled = async { dialled.await.map_err(BootError::Dial) };
    // The first poll of `dialled` sends the connection request; the mounts are made while it travels.
    let (connection, ()) = tokio::try_join!(dialled, async { mounts() })?;
    Ok(connection)
}

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// What the agent and the makers of containers use; containers have their own devpts, mqueue and proc.
fn mounts() -> Result<(), BootError> {
    // The kernel's killer must never choose the agent; cells set their own score.
    write("/proc/self/oom_score_adj", "-1000")?;
    mount_at("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, Some("mode=0755"))?;
    mount_at("sysfs", "/sys", "sysfs", SAFE, None)?;
    mount_at("cgroup2", CGROUP_DIR, "cgroup2", SAFE, Some("nsdelegate,memory_recursiveprot"))?;
    mount_at("tmpfs", "/run", "tmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))?;
    mount_at("tmpfs", SHM_DIR, "tmpfs", SAFE, Some("mode=1777,size=65536k"))?;
    // Absent where the kernel has no such file system; needed for AppArmor profiles only.
    match mount(Some("securityfs"), "/sys/kernel/security", Some("securityfs"), SAFE, None::<&str>) {
        Ok(()) | Err(Errno::ENODEV | Errno::ENOENT) => {}
        Err(error) => tracing::warn!("Could not mount securityfs: {error}"),
    }
    // Memory is compacted when somebody needs it, never in advance: an idle guest would wake up for that twice a second
    // (Documentation/admin-guide/sysctl/vm.rst, compaction_proactiveness).
    write("/proc/sys/vm/compaction_proactiveness", "0")?;
    // Statistics are folded once a minute (vm.rst, stat_interval). The task that does it each second starts the scheduler's fair server
    // (kernel/sched/deadline.c), whose timer wakes the guest 0.95 s later, which lets the task run again, and so on.
    write("/proc/sys/vm/stat_interval", "60")?;
    pod_cgroup().map_err(BootError::Cgroup)?;
    // As the kubelet sets it on a node: else an allocation larger than all that the machine has before it grows would fail (overcommit-accounting.rst).
    write("/proc/sys/vm/overcommit_memory", "1")?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .map_err(step("raise the limit of open files of", "/init"))
}

/// The cgroup of all containers, made if it is not there.
pub(crate) fn pod_cgroup() -> Result<Cgroup, CgroupError> {
    Cgroup::parent(Path::new(CGROUP_DIR), POD_CGROUP)
}

async fn greet(mut connection: Connection, nonce: [u8; 16]) -> io::Result<Connection> {
    connection.write_all(&Hello { version: hello::VERSION, nonce }.encode()).await?;
    Ok(connection)
}

/// The value of `key=value` on the kernel command line; the last one counts, as in the kernel.
pub(crate) fn parameter<'a>(command_line: &'a str, key: &str) -> Option<&'a str> {
    command_line.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).next_back()
}

fn parse_nonce(digits: &str) -> Option<[u8; 16]> {
    if digits.len() != 32 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some(u128::from_str_radix(digits, 16).ok()?.to_be_bytes())
}

fn mount_at(
    source: &str,
    target: &'static str,
    kind: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), BootError> {
    fs::create_dir_all(target).map_err(step("make", target))?;
    mount(Some(source), target, Some(kind), flags, options).map_err(step("mount", target))
}

fn read(path: &'static str) -> Result<String, BootError> {
    fs::read_to_string(path).map_err(step("read", path))
}

fn write(path: &'static str, text: &str) -> Result<(), BootError> {
    fs::write(path, text).map_err(step("write", path))
}

fn step<E: Into<io::Error>>(step: &'static str, path: &'static str) -> impl FnOnce(E) -> BootError {
    move |source| BootError::Step { step, path, source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_last_of_a_parameter() {
        let line = "console=hvc0 husk.nonce=aa husk.noncex=bb quiet husk.nonce=cc\n";
        assert_eq!(parameter(line, "husk.nonce"), Some("cc"));
        assert_eq!(parameter(line, "quiet"), None);
        assert_eq!(parameter("", "husk.nonce"), None);
    }

    #[test]
    fn a_nonce_is_32_hexadecimal_digits() {
        let mut nonce = [0; 16];
        nonce[0] = 0xab;
        nonce[15] = 1;
        assert_eq!(parse_nonce("ab000000000000000000000000000001"), Some(nonce));
        assert_eq!(parse_nonce("+b000000000000000000000000000001"), None);
        assert_eq!(parse_nonce("ab"), None);
        assert_eq!(parse_nonce(&"a".repeat(33)), None);
    }
}
