//! A busybox image, a spec as containerd makes it, and a container that ends with its test.

use std::{
    fs,
    io::{PipeReader, Read},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use husk_cell::{CellError, CreateRequest, Created, ExecRequest, Process, Stdio, cgroup::Cgroup};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
};
use serde_json::{Value, json};

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// The cgroup2 hierarchy of this machine: the whole one, or the one without controllers of a hybrid machine.
pub(crate) fn cgroup_root() -> PathBuf {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
        .expect("a cgroup2 hierarchy")
}

pub(crate) fn has_controller(name: &str) -> bool {
    fs::read_to_string(cgroup_root().join("cgroup.controllers")).unwrap().split_whitespace().any(|c| c == name)
}

/// A root file system and a cgroup of its own.
pub(crate) struct Bundle {
    pub(crate) name: String,
    pub(crate) rootfs: PathBuf,
    pub(crate) cgroup: Cgroup,
}

impl Bundle {
    pub(crate) fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("cell-{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let rootfs = Path::new("/tmp").join(&name);
        for directory in ["bin", "etc", "tmp", "root", "proc", "sys", "dev"] {
            fs::create_dir_all(rootfs.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n")
            .unwrap();
        let cgroup = Cgroup::create(&cgroup_root(), &format!("/{name}")).unwrap();
        Self { name, rootfs, cgroup }
    }

    /// What containerd would send for `sh -c SCRIPT`.
    pub(crate) fn spec(&self, script: &str) -> Value {
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_KILL",
            "CAP_MKNOD",
            "CAP_NET_BIND_SERVICE",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SYS_CHROOT"
        ]);
        json!({
            "ociVersion": "1.1.0",
            "root": {"path": self.rootfs},
            "hostname": "cell",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 2048}],
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev", "relatime"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/no-such"],
                "readonlyPaths": ["/proc/sys", "/proc/bus"],
            },
        })
    }

    pub(crate) fn create(&self, spec: &Value) -> Result<Container, CellError> {
        let (stdio, output) = pipes();
        let created = self.create_with(spec, stdio)?;
        Ok(Container { created, output })
    }

    pub(crate) fn create_with(&self, spec: &Value, stdio: Stdio) -> Result<Created, CellError> {
        let spec = serde_json::from_value(spec.clone()).unwrap();
        husk_cell::create(CreateRequest { id: self.name.clone(), spec, stdio, cgroup: self.cgroup.clone() })
    }

    /// Makes it, lets it run, and returns its output and exit status.
    pub(crate) fn run(&self, spec: &Value) -> Result<(String, i32), CellError> {
        self.create(spec)?.run()
    }

    /// The same for a script and the spec above.
    pub(crate) fn script(&self, script: &str) -> (String, i32) {
        self.run(&self.spec(script)).unwrap()
    }

    /// One more process in a container.
    pub(crate) fn exec(&self, container: &Container, process: &Value) -> Result<(String, i32), CellError> {
        let (stdio, output) = pipes();
        let request = ExecRequest {
            namespaces: container.created.namespaces.clone(),
            process: serde_json::from_value(process.clone()).unwrap(),
            seccomp: None,
            stdio,
            cgroup: self.cgroup.clone(),
        };
        finish(husk_cell::exec(request)?, output)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.cgroup.kill();
        if let Err(error) = self.cgroup.remove(LIMIT) {
            eprintln!("{}: {error}", self.name);
        }
        let _ = fs::remove_dir_all(&self.rootfs);
    }
}

/// A container that waits for its start, or runs.
pub(crate) struct Container {
    pub(crate) created: Created,
    pub(crate) output: PipeReader,
}

impl Container {
    pub(crate) fn run(self) -> Result<(String, i32), CellError> {
        finish(self.created.process, self.output)
    }
}

pub(crate) fn finish(process: Process, mut output: PipeReader) -> Result<(String, i32), CellError> {
    let Process { pidfd, starter, .. } = process;
    let started = starter.start();
    if started.is_err() {
        wait(&pidfd);
    }
    started?;
    let status = wait(&pidfd);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    Ok((text, status))
}

/// Reaps: exit code, or 128 and the signal.
pub(crate) fn wait(pidfd: &OwnedFd) -> i32 {
    let timeout = PollTimeout::try_from(LIMIT).unwrap();
    let ready = poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
    assert_eq!(ready, 1, "the process did not end in time");
    match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED).unwrap() {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}

/// Null input; output and errors in one pipe.
pub(crate) fn pipes() -> (Stdio, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let stderr = writer.try_clone().unwrap();
    let stdin = fs::File::open("/dev/null").unwrap();
    (Stdio::Fds { stdin: stdin.into(), stdout: writer.into(), stderr: stderr.into() }, reader)
}

const APPLETS: [&str; 39] = [
    "sh", "cat", "echo", "ls", "id", "hostname", "touch", "mkdir", "mknod", "dd", "sleep", "readlink", "test", "tty",
    "stty", "wc", "grep", "head", "tail", "stat", "mount", "umount", "true", "false", "ps", "kill", "env", "pwd",
    "chmod", "chown", "ln", "rm", "sort", "sysctl", "nproc", "find", "tr", "cut", "ionice",
];
