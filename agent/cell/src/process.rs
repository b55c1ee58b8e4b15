//! The last steps of a process: streams, directory, limits, user, capabilities, seccomp, exec.

use std::{
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    ffi::{CStr, CString},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        personality::{self, Persona},
        resource::{Resource, setrlimit},
        stat::{Mode, SFlag, fstat, umask},
    },
    unistd::{Gid, Uid, execve, fchdir, fchown, setgroups, setresgid, setresuid, setsid},
};
use oci_spec::runtime::{LinuxPersonality, LinuxPersonalityDomain, LinuxSeccomp, PosixRlimitType, Process};

use crate::{
    capabilities::Sets,
    devices::NULL,
    fault::{Doing, Fault, Step, describe},
    paths::{self, Links, Missing},
    scheduling,
    seccomp::{self, Filter},
    sys, user,
};

/// More than the kernel takes in one exec.
const MAX_STRINGS: usize = 65536;
/// PATH of a process whose environment has none (as in runc and execvp's own default without the current directory).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// linux/personality.h
const PER_LINUX32: libc::c_int = 8;

/// The streams that a process gets.
pub(crate) enum Streams {
    /// Descriptors 0, 1, 2.
    Fds([OwnedFd; 3]),
    /// A terminal's slave for all three.
    Terminal(OwnedFd),
}

/// All that can be worked out before the word to start.
pub(crate) struct Plan {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    search: Vec<Vec<u8>>,
    sets: Sets,
    filter: Option<Filter>,
    directory: OwnedFd,
}

impl Plan {
    /// Reads the process; `root` is the container's, which is our root.
    pub(crate) fn of(process: &Process, seccomp: Option<&LinuxSeccomp>, root: &OwnedFd) -> Step<Self> {
        let arguments = strings(process.args().as_deref().unwrap_or_default(), "args")?;
        if arguments.first().is_none_or(|first| first.is_empty()) {
            return Err(Fault::new("the process has no program"));
        }
        let mut variables = last_values(process.env().as_deref().unwrap_or_default());
        if !variables.iter().any(|v| v.starts_with("HOME=")) {
            variables.push(format!("HOME={}", user::home(root, process.user().uid())));
        }
        let path = variables.iter().rev().find_map(|v| v.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
        let search = path.split(':').filter(|d| d.starts_with('/')).map(|d| d.as_bytes().to_vec()).collect();
        Ok(Self {
            arguments,
            search,
            environment: strings(&variables, "env")?,
            sets: Sets::of(process.capabilities().as_ref())?,
            filter: seccomp.map(seccomp::compile).transpose()?,
            directory: open_cwd(process.cwd(), root)?,
        })
    }

    /// Becomes the process. Returns only what went wrong.
    pub(crate) fn execute(
        mut self,
        process: &Process,
        streams: Streams,
        apparmor: Option<&OwnedFd>,
    ) -> Step<Infallible> {
        let user = process.user();
        place_streams(streams, user.uid())?;
        sys::new_session_keyring(c"_ses").doing(|| "join a new session keyring")?;
        // A directory that only the user may enter is entered after the change of user.
        let entered = fchdir(&self.directory);
        set_rlimits(process)?;
        scheduling::apply(process)?;
        sys::reset_signals();
        if let Some(attribute) = apparmor {
            let profile = process.apparmor_profile().as_deref().unwrap_or_default();
            nix::unistd::write(attribute, format!("exec {profile}").as_bytes())
                .doing(|| format!("enter AppArmor profile {profile}"))?;
        }
        // Whatever is still open ends with exec, the socket to the agent included: that is how it learns of our success.
        sys::close_on_exec_from(3).doing(|| "close descriptors")?;

        let no_new_privileges = process.no_new_privileges().unwrap_or(false);
        self.sets.drop_bounding()?;
        nix::sys::prctl::set_keepcaps(true).doing(|| "keep capabilities")?;
        change_user(process)?;
        nix::sys::prctl::set_keepcaps(false).doing(|| "stop keeping capabilities")?;
        if entered.is_err() {
            fchdir(&self.directory).doing(|| format!("chdir to cwd \"{}\"", process.cwd().display()))?;
        }
        ensure_inside()?;
        umask(Mode::from_bits_truncate(user.umask().unwrap_or(0o022) & 0o777));
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which goes next; with it, the filter sees as little of us as can be.
        if !no_new_privileges && let Some(filter) = &mut self.filter {
            raise_effective()?;
            filter.install()?;
        }
        self.sets.apply()?;
        if no_new_privileges {
            nix::sys::prctl::set_no_new_privs().doing(|| "set no_new_privs")?;
            if let Some(filter) = &mut self.filter {
                filter.install()?;
            }
        }
        Err(self.exec())
    }

    fn exec(&self) -> Fault {
        let program = &self.arguments[0];
        let shown = program.to_string_lossy();
        if program.as_bytes().contains(&b'/') {
            return explain(program, &shown, self.try_exec(program));
        }
        let mut denied = None;
        for directory in &self.search {
            let candidate = [directory.as_slice(), b"/", program.as_bytes()].concat();
            let Ok(candidate) = CString::new(candidate) else { continue };
            match self.try_exec(&candidate) {
                Errno::ENOENT if !exists(&candidate) => {}
                Errno::ENOTDIR => {}
                Errno::EACCES => denied = Some(candidate),
                errno => return explain(&candidate, &candidate.to_string_lossy(), errno),
            }
        }
        match denied {
            Some(path) => explain(&path, &path.to_string_lossy(), Errno::EACCES),
            None => Fault::new(format!("exec \"{shown}\": executable file not found in $PATH")),
        }
    }

    fn try_exec(&self, path: &CStr) -> Errno {
        match execve(path, &self.arguments, &self.environment) {
            Err(errno) => errno,
            Ok(never) => match never {},
        }
    }
}

fn exists(path: &CStr) -> bool {
    nix::sys::stat::lstat(path).is_ok()
}

fn explain(path: &CStr, shown: &str, errno: Errno) -> Fault {
    let hint = if errno == Errno::ENOENT && exists(path) { " (the file is there: its interpreter is not)" } else { "" };
    Fault::new(format!("exec \"{shown}\": {}{hint}", describe(errno)))
}

/// Sets the execution domain (personality(2)).
pub(crate) fn set_personality(personality: &LinuxPersonality) -> Step<()> {
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    };
    personality::set(Persona::from_bits_retain(domain)).map(drop).doing(|| "set the personality")
}

/// Opens the working directory: inside the root by its walk, and no link of /proc can lead it elsewhere (CVE-2024-21626).
fn open_cwd(cwd: &Path, root: &OwnedFd) -> Step<OwnedFd> {
    let doing = || format!("chdir to cwd \"{}\"", cwd.display());
    let directory = paths::walk(root, cwd, Missing::Fail, Links::Follow).doing(doing)?;
    if !paths::is(&fstat(&directory).doing(doing)?, SFlag::S_IFDIR) {
        return Err(Errno::ENOTDIR).doing(doing);
    }
    Ok(directory)
}

/// The kernel itself says whether the working directory is below the root (getcwd(2)).
fn ensure_inside() -> Step<()> {
    let mut buffer = [0_u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the length given.
    let length = unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) };
    match Errno::result(length) {
        Ok(_) if buffer[0] == b'/' => Ok(()),
        Ok(_) => Err(Fault::new("the working directory is outside of the root")),
        Err(errno) => Err(errno).doing(|| "look at the working directory"),
    }
}

fn place_streams(streams: Streams, uid: u32) -> Step<()> {
    setsid().doing(|| "start a session")?;
    match streams {
        Streams::Fds(fds) => {
            for (number, fd) in (0..).zip(&fds) {
                give(fd, uid);
                sys::duplicate_onto(fd, number).doing(|| "place the streams")?;
            }
        }
        Streams::Terminal(slave) => {
            sys::take_terminal(&slave).doing(|| "take the terminal")?;
            for number in 0..3 {
                sys::duplicate_onto(&slave, number).doing(|| "place the terminal")?;
            }
        }
    }
    Ok(())
}

/// Gives a stream to the process's user, so that it may open /dev/stdout and the like. Best effort, and never /dev/null.
fn give(fd: &OwnedFd, uid: u32) {
    if let Ok(stat) = fstat(fd)
        && stat.st_uid != uid
        && !(paths::is(&stat, SFlag::S_IFCHR) && stat.st_rdev == NULL)
    {
        let _ = fchown(fd.as_fd(), Some(Uid::from_raw(uid)), None::<Gid>);
    }
}

fn change_user(process: &Process) -> Step<()> {
    let user = process.user();
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setgroups(&groups).doing(|| "set the additional groups")?;
    setresgid(gid, gid, gid).doing(|| format!("change to gid {gid}"))?;
    setresuid(uid, uid, uid).doing(|| format!("change to uid {uid}"))
}

/// The change of user has emptied the effective set; the permitted one was kept.
fn raise_effective() -> Step<()> {
    let permitted = caps::read(None, caps::CapSet::Permitted).map_err(|e| Fault::new(e.to_string()))?;
    caps::set(None, caps::CapSet::Effective, &permitted).map_err(|e| Fault::new(format!("raise capabilities: {e}")))
}

/// Raises hard limits as far as the process needs. Runs as the agent's root: a user namespace's root may only lower them.
pub(crate) fn raise_hard_limits(process: &Process) -> Step<()> {
    for limit in process.rlimits().iter().flatten() {
        let resource = resource(limit.typ())?;
        let (soft, hard) = nix::sys::resource::getrlimit(resource).doing(|| "read a limit")?;
        if limit.hard() > hard {
            setrlimit(resource, soft, limit.hard()).doing(|| format!("raise {}", limit.typ()))?;
        }
    }
    Ok(())
}

fn set_rlimits(process: &Process) -> Step<()> {
    for limit in process.rlimits().iter().flatten() {
        let doing = || format!("set {} to {}:{}", limit.typ(), limit.soft(), limit.hard());
        setrlimit(resource(limit.typ())?, limit.soft(), limit.hard()).doing(doing)?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Step<Resource> {
    Ok(match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    })
}

/// Each variable once, in its first place with its last value, as in runc: an image's and the pod's may both be there.
fn last_values(variables: &[String]) -> Vec<String> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut kept: Vec<String> = Vec::new();
    for variable in variables {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        match places.entry(name) {
            Entry::Occupied(place) => kept[*place.get()].clone_from(variable),
            Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(variable.clone());
            }
        }
    }
    kept
}

fn strings(texts: &[String], what: &str) -> Step<Vec<CString>> {
    if texts.len() > MAX_STRINGS {
        return Err(Fault::new(format!("{what}: more than {MAX_STRINGS} entries")));
    }
    texts
        .iter()
        .map(|text| {
            CString::new(text.as_bytes())
                .map_err(|_| Fault::new(format!("{what}: a NUL byte in \"{}\"", text.escape_debug())))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::last_values;

    #[test]
    fn the_last_value_counts() {
        let given = ["PATH=/a", "X=1", "PATH=/b", "EMPTY=", "odd", "X=2=3"].map(str::to_owned);
        assert_eq!(last_values(&given), ["PATH=/b", "X=2=3", "EMPTY=", "odd"]);
    }
}
