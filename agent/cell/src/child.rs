//! The cell itself: `husk-agent cell`, one thread, two processes.
//!
//! The first reads the instruction, opens everything that belongs to the agent's namespaces, joins namespaces and forks the second,
//! which is the agent's child, born in the container's cgroup and new namespaces. The second builds the container around itself,
//! waits for the word, and becomes the program.

use std::{
    convert::Infallible,
    io::Write,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::Instant,
};

use nix::{
    fcntl::{FcntlArg, OFlag, open, openat},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, umask},
    unistd::{Gid, Uid, pipe2, sethostname, setresgid, setresuid},
};
use oci_spec::runtime::{LinuxSeccomp, Process, Spec};

use crate::{
    DEADLINE, PodNamespaces, devices,
    fault::{Doing, Fault, Step},
    message::{Channel, ChannelError, Instruction, Report, Task},
    mount_options, mounts,
    namespaces::{self, Plan, join, map_text},
    paths, pause,
    process::{self, Streams},
    rootfs, spawn,
    sys::{self, Forked},
    terminal,
};

/// Exit status of a cell that failed or was let go before its exec.
const FAILED: i32 = 127;

/// The longest cause that is told, characters: even escaped it fits into a report.
const MAX_CAUSE: usize = 2048;

/// The entry of `husk-agent cell`: call it first thing in `main`, before any thread exists, when the first argument is `cell`.
pub fn main() -> ! {
    // Container processes must not look into us (/proc/PID/fd, ptrace) while we are among them.
    let _ = nix::sys::prctl::set_dumpable(false);
    let code = match take_socket() {
        // Nobody could be told.
        Err(_) => FAILED,
        Ok(control) => match first(&control) {
            Ok(never) => match never {},
            Err(Ended::Done) => 0,
            Err(Ended::Failed(fault)) => {
                let _ = control.report(&Report::Failed { cause: shorten(&fault.to_string()) }, &[]);
                FAILED
            }
        },
    };
    std::process::exit(code)
}

/// A message has its size, and a cause may quote what the pod's author wrote: what is too long loses its middle.
fn shorten(cause: &str) -> String {
    let characters: Vec<char> = cause.chars().collect();
    if characters.len() <= MAX_CAUSE {
        return cause.to_owned();
    }
    let (head, tail) = (&characters[..MAX_CAUSE / 2], &characters[characters.len() - MAX_CAUSE / 2 + 3..]);
    head.iter().chain(&['.', '.', '.']).chain(tail).collect()
}

/// The agent's socket came as descriptor 0, where the process's own input will be: moves it out of the way.
fn take_socket() -> nix::Result<Channel> {
    let moved = nix::fcntl::fcntl(std::io::stdin(), FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: the descriptor is new, so nobody else owns it.
    let control = unsafe { OwnedFd::from_raw_fd(moved) };
    // 1 is /dev/null.
    sys::duplicate_onto(std::io::stdout(), 0)?;
    Ok(Channel::new(control))
}

/// Why a cell process ends other than by exec.
enum Ended {
    /// Its part is done.
    Done,
    /// It failed.
    Failed(Fault),
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

/// What the agent sent, opened up.
struct Parts {
    cgroup: OwnedFd,
    streams: Option<[OwnedFd; 3]>,
    terminal: Option<(u16, u16)>,
    joined: Vec<(CloneFlags, OwnedFd)>,
    apparmor: bool,
    proc: OwnedFd,
}

fn first(control: &Channel) -> Result<Infallible, Ended> {
    let channel = |e: ChannelError| Fault::new(format!("{e}"));
    let (_, fds) = control.receive(Some(Instant::now() + DEADLINE)).map_err(channel)?;
    let mut fds = fds.into_iter();
    let mut next = |what: &str| fds.next().ok_or_else(|| Fault::new(format!("no descriptor of {what}")));
    let instruction = Instruction::unpack(next("the instruction")?).map_err(channel)?;
    // Modes are as we give them; the process gets its own umask.
    umask(Mode::empty());
    let Instruction { task, terminal, namespaces, apparmor } = instruction;
    let task = match task {
        Task::Pause { pod } => return make_pause(control, pod.as_deref()),
        other => other,
    };
    let cgroup = next("the cgroup")?;
    let streams = match terminal {
        None => Some([next("stdin")?, next("stdout")?, next("stderr")?]),
        Some(_) => None,
    };
    let mut joined = Vec::new();
    for kind in spawn::namespace_flags(&namespaces) {
        joined.push((kind, next("a namespace")?));
    }
    let path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let proc = open("/proc", path, Mode::empty()).doing(|| "open /proc")?;
    let parts = Parts { cgroup, streams, terminal, joined, apparmor: apparmor.is_some(), proc };
    match task {
        Task::Create { spec } => make_container(control, &spec, parts),
        Task::Exec { process, seccomp } => make_process(control, &process, seccomp.as_deref(), parts),
        Task::Pause { .. } => Err(Ended::Done),
    }
}

/// Forks; the first process reports the birth, does what is left for it to do, and ends. Only the child returns.
fn fork(
    control: &Channel,
    new: CloneFlags,
    cgroup: Option<&OwnedFd>,
    after: impl FnOnce(i32) -> Step<()>,
) -> Result<(), Ended> {
    // SAFETY: this program has one thread: main is called before any is made, and the cell makes none.
    match unsafe { sys::fork_into(new.bits() as u32 as u64, cgroup.map(AsFd::as_fd)) }.doing(|| "fork")? {
        Forked::Child => Ok(()),
        Forked::Parent { pid, pidfd } => {
            let done = after(pid);
            let reported = control.report(&Report::Born { pid: pid as u32 }, &[pidfd.as_raw_fd()]);
            done?;
            reported.map_err(|e| Fault::new(e.to_string()))?;
            Err(Ended::Done)
        }
    }
}

/// Forks into a new user namespace; the child returns once that has its maps.
fn fork_mapped(control: &Channel, new: CloneFlags, cgroup: Option<&OwnedFd>, maps: &[String; 2]) -> Result<(), Ended> {
    let (mapped, tell) = pipe2(OFlag::O_CLOEXEC).doing(|| "make a pipe")?;
    fork(control, new, cgroup, |pid| {
        namespaces::write_id_maps(pid, &maps[0], &maps[1])?;
        std::fs::File::from(tell).write_all(b"m").doing(|| "tell of the maps")
    })?;
    let mut byte = [0];
    // The first process either writes or ends, so this ends.
    match nix::unistd::read(&mapped, &mut byte).doing(|| "wait for the maps")? {
        0 => Err(Ended::Done),
        _ => Ok(()),
    }
}

fn make_container(control: &Channel, spec: &Spec, parts: Parts) -> Result<Infallible, Ended> {
    let linux = spec.linux().as_ref();
    let process = spec.process().as_ref().ok_or_else(|| Fault::new("the spec has no process"))?;
    let root = spec.root().as_ref().ok_or_else(|| Fault::new("the spec has no root"))?;
    let mut plan = Plan::of(linux)?;
    let new_user = plan.new.contains(CloneFlags::CLONE_NEWUSER);
    let user_namespace = new_user || plan.joins_user();
    let tree = rootfs::open_rootfs(root.path())?;
    let prepared = mounts::prepare(spec, user_namespace)?;
    before_fork(process, &parts, plan.joins_user())?;
    join(&plan.joined)?;

    // A cgroup namespace is rooted where its maker is: the child makes it, once born in its cgroup.
    let cgroup_namespace = plan.new.contains(CloneFlags::CLONE_NEWCGROUP);
    plan.new.remove(CloneFlags::CLONE_NEWCGROUP);
    if plan.new.contains(namespaces::NEWTIME) {
        namespaces::make_time(linux, &parts.proc)?;
        plan.new.remove(namespaces::NEWTIME);
    }
    let born_in = (!plan.joins_user()).then_some(&parts.cgroup);
    match linux {
        Some(linux) if new_user => {
            let maps = [linux.uid_mappings(), linux.gid_mappings()].map(|maps| map_text(maps.as_ref()));
            fork_mapped(control, plan.new, born_in, &maps)?;
        }
        _ => fork(control, plan.new, born_in, |_| Ok(()))?,
    }
    if user_namespace {
        become_root()?;
    }
    build(control, spec, process, parts, Layout { tree, prepared, cgroup_namespace, new: plan.new, user_namespace })
}

/// What the child needs to build the container.
struct Layout {
    tree: OwnedFd,
    prepared: Vec<mounts::Prepared>,
    cgroup_namespace: bool,
    new: CloneFlags,
    user_namespace: bool,
}

fn build(control: &Channel, spec: &Spec, process: &Process, parts: Parts, layout: Layout) -> Result<Infallible, Ended> {
    let linux = spec.linux().as_ref();
    if layout.cgroup_namespace {
        unshare(CloneFlags::CLONE_NEWCGROUP).doing(|| "make a cgroup namespace")?;
    }
    if layout.new.contains(CloneFlags::CLONE_NEWUTS) {
        set_names(spec)?;
    }
    if layout.new.contains(CloneFlags::CLONE_NEWNET) {
        loopback_up()?;
    }
    let root = rootfs::enter(layout.tree)?;
    let late = mounts::mount_all(&root, layout.prepared)?;
    devices::populate(&root, spec, layout.user_namespace)?;
    paths::walk(&root.root, process.cwd(), paths::Missing::Directory, paths::Links::Follow)
        .doing(|| format!("make cwd \"{}\"", process.cwd().display()))?;
    let terminal = open_terminal(&root.root, process, parts.terminal)?;
    if let Some(terminal) = &terminal {
        terminal.bind_console(&root.root)?;
        terminal.give_to(process.user().uid())?;
    }
    set_sysctls(spec, &parts.proc)?;
    for path in linux.iter().flat_map(|l| l.readonly_paths().iter().flatten()) {
        mounts::make_read_only(&root, Path::new(path))?;
    }
    for path in linux.iter().flat_map(|l| l.masked_paths().iter().flatten()) {
        mounts::mask(&root, Path::new(path))?;
    }
    mounts::seal(&late)?;
    if let Some(word) = linux.and_then(|l| l.rootfs_propagation().as_deref()).filter(|w| !w.is_empty()) {
        let flags = mount_options::propagation(word)
            .ok_or_else(|| Fault::new(format!("unknown rootfsPropagation \"{word}\"")))?;
        mounts::set_propagation(&root.root, flags).doing(|| "set the root's propagation")?;
    }
    if spec.root().as_ref().and_then(|r| r.readonly()).unwrap_or(false) {
        sys::set_attributes(&root.root, mounts::read_only(), false).doing(|| "make the root read-only")?;
    }
    let root = root.leave_old()?;
    if let Some(personality) = linux.and_then(|l| l.personality().as_ref()) {
        process::set_personality(personality)?;
    }
    let seccomp = linux.and_then(|l| l.seccomp().as_ref());
    finish(control, process, seccomp, &root, parts, terminal)
}

fn make_process(
    control: &Channel,
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    mut parts: Parts,
) -> Result<Infallible, Ended> {
    let joined = std::mem::take(&mut parts.joined);
    let user_namespace = joined.iter().any(|(kind, _)| *kind == CloneFlags::CLONE_NEWUSER);
    before_fork(process, &parts, user_namespace)?;
    // From within a cgroup namespace no process can be born or moved into a cgroup by one that is outside of it (cgroups(7),
    // nsdelegate): the child joins that one, once born inside. With a user namespace the move is already done.
    let (late, early): (Vec<_>, Vec<_>) =
        joined.into_iter().partition(|(kind, _)| !user_namespace && *kind == CloneFlags::CLONE_NEWCGROUP);
    join(&early)?;
    drop(early);
    fork(control, CloneFlags::empty(), (!user_namespace).then_some(&parts.cgroup), |_| Ok(()))?;
    join(&late)?;
    drop(late);
    if user_namespace {
        become_root()?;
    }
    // Joining the mount namespace has made its root ours.
    let root =
        open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).doing(|| "open the root")?;
    let terminal = open_terminal(&root, process, parts.terminal)?;
    if let Some(terminal) = &terminal {
        terminal.give_to(process.user().uid())?;
    }
    finish(control, process, seccomp, &root, parts, terminal)
}

/// The terminal, if there is to be one: of the size that the client has told, else of the spec's.
fn open_terminal(root: &OwnedFd, process: &Process, size: Option<(u16, u16)>) -> Step<Option<terminal::Terminal>> {
    let clamp = |length: u64| u16::try_from(length).unwrap_or(u16::MAX);
    let size = match (size, process.console_size()) {
        (Some((0, 0)), Some(wanted)) => Some((clamp(wanted.width()), clamp(wanted.height()))),
        (size, _) => size,
    };
    size.map(|size| terminal::open(root, size)).transpose()
}

/// Reports that all is ready, waits for the word, and becomes the program.
fn finish(
    control: &Channel,
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    root: &OwnedFd,
    parts: Parts,
    terminal: Option<terminal::Terminal>,
) -> Result<Infallible, Ended> {
    let plan = process::Plan::of(process, seccomp, root)?;
    let apparmor = parts.apparmor.then(|| open_apparmor(&parts.proc)).transpose()?;
    let (master, streams) = match (terminal, parts.streams) {
        (Some(terminal), _) => (Some(terminal.master), Streams::Terminal(terminal.slave)),
        (None, Some(fds)) => (None, Streams::Fds(fds)),
        (None, None) => return Err(Fault::new("no streams").into()),
    };
    // Nothing of the agent's but the socket is left open while we wait.
    drop((parts.cgroup, parts.proc, parts.joined));
    let rights: Vec<_> = master.as_ref().map(AsRawFd::as_raw_fd).into_iter().collect();
    control.report(&Report::Ready, &rights).map_err(|e| Fault::new(e.to_string()))?;
    drop(master);
    match control.receive(None) {
        Ok(_) => {}
        // The agent has dropped us.
        Err(_) => return Err(Ended::Done),
    }
    Ok(plan.execute(process, streams, apparmor.as_ref())?)
}

/// What only the agent's root may do, and a child inherits.
fn before_fork(process: &Process, parts: &Parts, joins_user: bool) -> Step<()> {
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .doing(|| format!("set oom_score_adj to {score}"))?;
    }
    process::raise_hard_limits(process)?;
    if joins_user {
        // The root of a joined user namespace may not put a child into the cgroup: we go there first, slower, and the child with us.
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let procs = openat(&parts.cgroup, "cgroup.procs", flags, Mode::empty()).doing(|| "open cgroup.procs")?;
        nix::unistd::write(&procs, b"0").doing(|| "join the cgroup")?;
    }
    Ok(())
}

/// Becomes root of the user namespace that we are in.
fn become_root() -> Step<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).doing(|| "become group 0 of the user namespace")?;
    setresuid(uid, uid, uid).doing(|| "become user 0 of the user namespace")
}

fn set_names(spec: &Spec) -> Step<()> {
    if let Some(name) = spec.hostname() {
        sethostname(name).doing(|| format!("set hostname {name}"))?;
    }
    if let Some(name) = spec.domainname() {
        // SAFETY: the pointer and length are of a live string.
        let done = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
        nix::errno::Errno::result(done).doing(|| format!("set domainname {name}"))?;
    }
    Ok(())
}

/// A new network namespace starts with its loopback down.
fn loopback_up() -> Step<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket =
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).doing(|| "make a socket")?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads one ifreq (netdevice(7)).
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    nix::errno::Errno::result(done).map(drop).doing(|| "bring the loopback up")
}

/// Writes the spec's kernel parameters through the agent's /proc, for the container's could be anything; what they mean is decided by
/// our namespaces.
fn set_sysctls(spec: &Spec, proc: &OwnedFd) -> Step<()> {
    spec.linux()
        .iter()
        .flat_map(|linux| linux.sysctl().iter().flatten())
        .try_for_each(|(name, value)| set_sysctl(proc, name, value))
}

fn set_sysctl(proc: &OwnedFd, name: &str, value: &str) -> Step<()> {
    let doing = || format!("set sysctl {name}");
    // A name with slashes has its dots for itself (sysctl(8)).
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if path.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(Fault::new(format!("sysctl name \"{name}\"")));
    }
    let file = openat(
        proc,
        format!("sys/{path}").as_str(),
        OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
        Mode::empty(),
    )
    .doing(doing)?;
    std::fs::File::from(file).write_all(value.as_bytes()).doing(doing)
}

/// The file that takes the profile for the next exec (AppArmor's own since Linux 5.8, else the one shared by all modules).
fn open_apparmor(proc: &OwnedFd) -> Step<OwnedFd> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    openat(proc, "self/attr/apparmor/exec", flags, Mode::empty())
        .or_else(|_| openat(proc, "self/attr/exec", flags, Mode::empty()))
        .doing(|| "open the AppArmor attribute")
}

/// The init of the pod's shared pid namespace: in an empty root of its own, so that nothing can be had from it.
fn make_pause(control: &Channel, pod: Option<&PodNamespaces>) -> Result<Infallible, Ended> {
    let tree = sys::new_filesystem("tmpfs", Some("tmpfs"), &[], sys::attr::RDONLY)
        .map_err(|(what, errno)| Fault::new(format!("{what}: {errno}")))?;
    let new = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    match pod {
        None => fork(control, new, None, |_| Ok(()))?,
        Some(pod) => {
            let path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let proc = open("/proc", path, Mode::empty()).doing(|| "open /proc")?;
            let more = CloneFlags::CLONE_NEWUSER
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS;
            fork_mapped(control, new | more, None, &[pod.uid_map.clone(), pod.gid_map.clone()])?;
            become_root()?;
            if !pod.hostname.is_empty() {
                sethostname(&pod.hostname).doing(|| format!("set hostname {}", pod.hostname))?;
            }
            for (name, value) in &pod.ipc_parameters {
                set_sysctl(&proc, name, value)?;
            }
        }
    }
    drop(rootfs::enter(tree)?.leave_old()?);
    pause::give_up_privileges()?;
    control.report(&Report::Ready, &[]).map_err(|e| Fault::new(e.to_string()))?;
    // The socket stays open, unused: closing it means owning it, and the agent has closed its end.
    pause::reap_for_ever()
}

#[cfg(test)]
mod tests {
    use super::{MAX_CAUSE, shorten};

    #[test]
    fn a_long_cause_keeps_its_ends() {
        assert_eq!(shorten("mount /x: no"), "mount /x: no");
        let short = shorten(&format!("mount /{}: file name too long", "ä".repeat(5000)));
        assert_eq!(short.chars().count(), MAX_CAUSE);
        assert!(short.starts_with("mount /ä") && short.ends_with("ä: file name too long"), "{short}");
    }
}
