//! The parent's side: starts a cell, tells it what to do, and waits for what comes out.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio as ChildStdio},
    time::{Duration, Instant},
};

use nix::{
    sched::CloneFlags,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        stat::{SFlag, fstat},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Gid, Uid, fchown},
};
use oci_spec::runtime::{Process as OciProcess, Spec};

use crate::{
    CellError, CreateRequest, Created, DEADLINE, ExecRequest, PodNamespaces, Process, Stdio,
    cgroup::Cgroup,
    message::{Channel, ChannelError, Instruction, Report, Task},
    namespaces::{Namespaces, kinds, root_of, wait_exited},
    paths,
    sys::{self, MountAttr},
};

/// How long a killed child may take to become a zombie before it is left to the agent's reaper.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// Holds a made process before its exec. Dropping it unused makes the process exit.
#[derive(Debug)]
pub struct Starter {
    control: Channel,
}

impl Starter {
    /// Lets the process exec, and waits until it did (blocks, at most [`DEADLINE`]). On failure the process exits by itself
    /// and is reaped by the agent like any other; the error says why, e.g. `exec "/nope": no such file or directory`.
    pub fn start(self) -> Result<(), CellError> {
        const AWAITED: &str = "executed the program";
        self.control.send(b"start", &[]).map_err(|e| channel_error(e, "took the word to start"))?;
        match self.control.receive(Some(Instant::now() + DEADLINE)) {
            // The socket closes on exec: that is the success.
            Err(ChannelError::Closed) => Ok(()),
            Err(error) => Err(channel_error(error, AWAITED)),
            Ok((bytes, _)) => match report(&bytes)? {
                Report::Failed { cause } => Err(CellError::Child(cause)),
                Report::Born { .. } | Report::Ready => Err(CellError::Ended { awaited: AWAITED }),
            },
        }
    }
}

/// Makes a container up to the exec of its first process. Blocks. On failure nothing is left but the cgroup.
pub fn create(request: CreateRequest) -> Result<Created, CellError> {
    let CreateRequest { id, spec, stdio, cgroup } = request;
    check(&spec)?;
    let mut warnings = Vec::new();
    let apparmor = spec.process().as_ref().map(|p| apparmor_profile(p, &mut warnings)).transpose()?.flatten();
    let kinds = kinds(spec.linux().as_ref());
    let root = root_of(spec.linux().as_ref());
    let instruction = Instruction {
        task: Task::Create { spec: Box::new(spec) },
        terminal: stdio.terminal(),
        namespaces: Vec::new(),
        apparmor,
    };
    stdio.give_to(root)?;
    let made = run(&id, &instruction, Some(&cgroup), stdio, &[])?;
    let pin = made.pidfd.try_clone().map_err(CellError::io("duplicate a pidfd"));
    match pin.and_then(|init| Namespaces::pin(made.pid, init, &kinds, root)) {
        Ok(namespaces) => Ok(Created { process: made.into_process(warnings), namespaces }),
        Err(error) => {
            kill_and_reap(&made.pidfd);
            Err(error)
        }
    }
}

/// Makes one more process in a running container, up to its exec. Blocks.
pub fn exec(request: ExecRequest) -> Result<Process, CellError> {
    let ExecRequest { namespaces, process, seccomp, stdio, cgroup } = request;
    if !namespaces.alive() {
        return Err(CellError::NotRunning);
    }
    let mut warnings = Vec::new();
    let instruction = Instruction {
        apparmor: apparmor_profile(&process, &mut warnings)?,
        task: Task::Exec { process: Box::new(process), seccomp: seccomp.map(Box::new) },
        terminal: stdio.terminal(),
        namespaces: namespaces.pins().map(|(kind, _)| kind.bits()).collect(),
    };
    stdio.give_to(namespaces.root())?;
    let pins: Vec<RawFd> = namespaces.pins().map(|(_, fd)| fd.as_raw_fd()).collect();
    match run("exec", &instruction, Some(&cgroup), stdio, &pins) {
        Ok(made) => Ok(made.into_process(warnings)),
        // Its init died under our hands: the cause below would be a puzzle to the caller.
        Err(_) if !namespaces.alive() => Err(CellError::NotRunning),
        Err(error) => Err(error),
    }
}

/// Starts the init of a new pid namespace (see [`crate::ensure_pod_pid_namespace`]); returns its pid and pidfd.
pub(crate) fn pause(pod: Option<PodNamespaces>) -> Result<(u32, OwnedFd), CellError> {
    let task = Task::Pause { pod: pod.map(Box::new) };
    let instruction = Instruction { task, terminal: None, namespaces: Vec::new(), apparmor: None };
    let made = run("pause", &instruction, None, Stdio::Terminal { width: 0, height: 0 }, &[])?;
    Ok((made.pid, made.pidfd))
}

/// A process that waits for its start.
struct Made {
    pid: u32,
    pidfd: OwnedFd,
    control: Channel,
    terminal: Option<OwnedFd>,
}

impl Made {
    fn into_process(self, warnings: Vec<String>) -> Process {
        Process {
            pid: self.pid,
            pidfd: self.pidfd,
            starter: Starter { control: self.control },
            terminal: self.terminal,
            warnings,
        }
    }
}

impl Stdio {
    /// Gives pipes to the root of a user namespace, who then can give them to the process's user.
    fn give_to(&self, root: Option<(u32, u32)>) -> Result<(), CellError> {
        let (Self::Fds { stdin, stdout, stderr }, Some((uid, gid))) = (self, root) else { return Ok(()) };
        for stream in [stdin, stdout, stderr] {
            let stat = fstat(stream).map_err(CellError::system("look at a stream"))?;
            if paths::is(&stat, SFlag::S_IFIFO) {
                fchown(stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                    .map_err(CellError::system("give a stream to the user namespace's root"))?;
            }
        }
        Ok(())
    }

    fn terminal(&self) -> Option<(u16, u16)> {
        match *self {
            Self::Fds { .. } => None,
            Self::Terminal { width, height } => Some((width, height)),
        }
    }
}

/// A started cell that is not gone yet.
struct Cell {
    pidfd: OwnedFd,
    control: Channel,
}

/// Starts a cell, hands over the instruction and waits for the process it makes.
fn run(
    name: &str,
    instruction: &Instruction,
    cgroup: Option<&Cgroup>,
    stdio: Stdio,
    namespaces: &[RawFd],
) -> Result<Made, CellError> {
    let deadline = Instant::now() + DEADLINE;
    let memory = instruction.pack().map_err(|e| channel_error(e, "took its instruction"))?;
    let directory = cgroup
        .map(|c| File::open(c.path()).map_err(CellError::io(format!("open cgroup {}", c.path().display()))))
        .transpose()?;
    let mut fds = vec![memory.as_raw_fd()];
    fds.extend(directory.as_ref().map(AsRawFd::as_raw_fd));
    if let Stdio::Fds { stdin, stdout, stderr } = &stdio {
        fds.extend([stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()]);
    }
    fds.extend(namespaces);

    let cell = start_cell(name)?;
    let sent = cell.control.send(b"instruction", &fds).map_err(|e| channel_error(e, "took its instruction"));
    // The child has its own copies now; keeping ours would keep pipes open.
    drop(stdio);
    let mut born = None;
    let outcome = sent.and_then(|()| collect(&cell.control, deadline, &mut born));
    match (outcome, born) {
        (Ok(terminal), Some((pid, pidfd))) => {
            // It ends by itself once it has reported the birth.
            if !wait_exited(cell.pidfd.as_fd(), deadline.saturating_duration_since(Instant::now())) {
                kill_and_reap(&cell.pidfd);
            }
            reap(&cell.pidfd);
            Ok(Made { pid, pidfd, control: cell.control, terminal })
        }
        (outcome, born) => {
            kill_and_reap(&cell.pidfd);
            if let Some((_, pidfd)) = born {
                kill_and_reap(&pidfd);
            }
            Err(outcome.err().unwrap_or(CellError::Ended { awaited: BIRTH }))
        }
    }
}

const BIRTH: &str = "reported the process that it made";

/// Reads reports until the process is both born and ready; returns its terminal.
fn collect(
    control: &Channel,
    deadline: Instant,
    born: &mut Option<(u32, OwnedFd)>,
) -> Result<Option<OwnedFd>, CellError> {
    let mut ready = None;
    loop {
        let awaited = if born.is_none() { BIRTH } else { "had the process ready to exec" };
        let (bytes, fds) = control.receive(Some(deadline)).map_err(|e| channel_error(e, awaited))?;
        let mut fds = fds.into_iter();
        match report(&bytes)? {
            Report::Born { pid } => *born = fds.next().map(|pidfd| (pid, pidfd)),
            Report::Ready => ready = Some(fds.next()),
            Report::Failed { cause } => {
                // The birth may have been reported later than the failure: look once more, to have something to reap.
                if born.is_none()
                    && let Ok((bytes, fds)) = control.receive(Some(deadline))
                    && let Ok(Report::Born { pid }) = report(&bytes)
                {
                    *born = fds.into_iter().next().map(|pidfd| (pid, pidfd));
                }
                return Err(CellError::Child(cause));
            }
        }
        if born.is_some()
            && let Some(terminal) = ready.take()
        {
            return Ok(terminal);
        }
    }
}

/// Starts our own program again as `cell`, with the socket as descriptor 0 and nothing else.
fn start_cell(name: &str) -> Result<Cell, CellError> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(CellError::system("make a socket pair"))?;
    // A container's process that gets hold of /proc/PID/exe of a cell can't write to the agent's program (CVE-2019-5736): the
    // cell runs from a read-only mount that is attached nowhere.
    let program = sys::clone_tree(None, c"/proc/self/exe", false).map_err(CellError::system("clone /proc/self/exe"))?;
    let read_only = MountAttr { set: sys::attr::RDONLY, ..MountAttr::default() };
    sys::set_attributes(&program, read_only, false).map_err(CellError::system("make /proc/self/exe read-only"))?;
    // No pre_exec: the standard library then uses posix_spawn, and nothing of ours runs between fork and exec.
    let child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .arg0("husk-agent")
        .arg("cell")
        // For whoever looks at the list of processes.
        .arg(name)
        .env_clear()
        .stdin(ChildStdio::from(theirs))
        .stdout(ChildStdio::null())
        .stderr(ChildStdio::null())
        .spawn()
        .map_err(CellError::io("start the cell"))?;
    // It waits for its instruction, so it can't have ended and been reaped by anybody.
    let pidfd = sys::pidfd_open(child.id() as i32).map_err(CellError::system("open the cell's pidfd"))?;
    Ok(Cell { pidfd, control: Channel::new(ours) })
}

fn kill_and_reap(pidfd: &OwnedFd) {
    if sys::pidfd_kill(pidfd).is_ok() && wait_exited(pidfd.as_fd(), KILL_LIMIT) {
        reap(pidfd);
    }
}

/// Collects an exited child. Somebody else may have done it: that is as good.
fn reap(pidfd: &OwnedFd) {
    let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
}

fn report(bytes: &[u8]) -> Result<Report, CellError> {
    serde_json::from_slice(bytes).map_err(|source| CellError::Protocol { doing: "understand a cell's report", source })
}

fn channel_error(error: ChannelError, awaited: &'static str) -> CellError {
    match error {
        ChannelError::Closed => CellError::Ended { awaited },
        ChannelError::Deadline => CellError::Deadline { awaited, limit: DEADLINE },
        ChannelError::System(doing, errno) => CellError::System { doing: doing.into(), source: errno.into() },
        ChannelError::Json(doing, source) => CellError::Protocol { doing, source },
    }
}

/// What can be said about a spec without doing anything.
fn check(spec: &Spec) -> Result<(), CellError> {
    const MAX_MOUNTS: usize = 1024;
    let invalid = |text: &str| Err(CellError::Invalid(text.to_owned()));
    let Some(process) = spec.process() else { return invalid("the spec has no process") };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return invalid("the spec's process has no args");
    }
    if spec.root().is_none() {
        return invalid("the spec has no root");
    }
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    if mounts.len() > MAX_MOUNTS {
        return invalid("the spec has more than 1024 mounts");
    }
    for mount in mounts {
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
            return Err(CellError::Invalid(format!(
                "mount {:?}: id-mapped mounts are not supported",
                mount.destination()
            )));
        }
    }
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    if namespaces.is_some_and(|n| n.len() > 8) {
        return invalid("the spec has more than 8 namespaces");
    }
    Ok(())
}

/// The profile that the process is to run under, which must be loaded.
fn apparmor_profile(process: &OciProcess, warnings: &mut Vec<String>) -> Result<Option<String>, CellError> {
    if let Some(label) = process.selinux_label().as_deref().filter(|l| !l.is_empty()) {
        warnings.push(format!("SELinux label \"{label}\" ignored: the guest has no SELinux"));
    }
    let Some(profile) = process.apparmor_profile().as_deref().filter(|p| !p.is_empty() && *p != "unconfined") else {
        return Ok(None);
    };
    let loaded = std::fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default();
    if !profile_is_listed(&loaded, profile) {
        return Err(CellError::Invalid(format!("the AppArmor profile \"{profile}\" is not loaded in the guest")));
    }
    Ok(Some(profile.to_owned()))
}

/// Whether `name` is in AppArmor's list of loaded profiles (securityfs, apparmor/profiles), whose lines are `name (mode)`.
pub fn profile_is_listed(list: &str, name: &str) -> bool {
    list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(listed, _)| listed == name))
}

/// CLONE_NEW* flags as they go over the wire.
pub(crate) fn namespace_flags(bits: &[i32]) -> Vec<CloneFlags> {
    bits.iter().map(|&bits| CloneFlags::from_bits_truncate(bits)).collect()
}
