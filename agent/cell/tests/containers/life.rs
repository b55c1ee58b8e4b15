//! Creating, starting, joining and ending.

use std::{
    fs,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use husk_cell::{CellError, CgroupError, cgroup::Cgroup};
use serde_json::{Value, json};

use crate::Lacks;
use crate::harness::{Bundle, LIMIT, cgroup_root, has_controller, pipes, wait};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("life::pid_one_and_exit_code", pid_one_and_exit_code),
    ("life::killed", killed),
    ("life::dropped_starter_ends_it", dropped_starter_ends_it),
    ("life::exec_joins_everything", exec_joins_everything),
    ("life::exec_into_dead_container", exec_into_dead_container),
    ("life::many_creates_leak_nothing", many_creates_leak_nothing),
    ("life::at_the_same_time", at_the_same_time),
    ("life::pod_pid_namespace", pod_pid_namespace),
    ("life::freeze_and_kill", freeze_and_kill),
    ("life::limits_and_stats", limits_and_stats),
    ("life::out_of_memory", out_of_memory),
    ("life::cgroup_in_use", cgroup_in_use),
];

pub(crate) fn sh(script: &str) -> Value {
    json!({"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/"})
}

fn pid_one_and_exit_code() {
    let bundle = Bundle::new("one");
    let (output, status) = bundle.script("echo $$ $(hostname) $(cat /proc/1/comm); exit 7");
    assert_eq!((output.as_str(), status), ("1 cell sh\n", 7));
}

fn killed() {
    let bundle = Bundle::new("killed");
    let container = bundle.create(&bundle.spec("sleep 100")).unwrap();
    container.created.process.starter.start().unwrap();
    assert!(container.created.namespaces.alive());
    bundle.cgroup.kill().unwrap();
    assert_eq!(wait(&container.created.process.pidfd), 137);
    assert!(!container.created.namespaces.alive());
}

fn dropped_starter_ends_it() {
    let bundle = Bundle::new("dropped");
    let container = bundle.create(&bundle.spec("true")).unwrap();
    let process = container.created.process;
    drop(process.starter);
    assert_eq!(wait(&process.pidfd), 0);
}

const NAMES: [&str; 6] = ["mnt", "pid", "ipc", "uts", "cgroup", "net"];

fn exec_joins_everything() {
    let bundle = Bundle::new("exec");
    let mut spec = bundle.spec("sleep 100");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "network"}));
    let mut container = bundle.create(&spec).unwrap();
    let (starter, pidfd) = (container.created.process.starter, container.created.process.pidfd.try_clone().unwrap());
    starter.start().unwrap();
    let (stdio, output) = pipes();
    drop(stdio);
    container.output = output;
    let namespaces = container.created.namespaces.clone();
    let own = NAMES.map(|n| fs::read_link(format!("/proc/self/ns/{n}")).unwrap());
    let pid = container.created.process.pid;
    let theirs = NAMES.map(|n| fs::read_link(format!("/proc/{pid}/ns/{n}")).unwrap());
    let script = "for n in mnt pid ipc uts cgroup net; do readlink /proc/self/ns/$n; done; grep 0:: /proc/self/cgroup; hostname; exit 3";
    let (stdio, output) = pipes();
    let request = husk_cell::ExecRequest {
        namespaces,
        process: serde_json::from_value(sh(script)).unwrap(),
        seccomp: None,
        stdio,
        cgroup: bundle.cgroup.clone(),
    };
    let (text, status) = crate::harness::finish(husk_cell::exec(request).unwrap(), output).unwrap();
    assert!(text.ends_with("cell\n"), "{text}");
    assert!(text.contains("0::/\n"), "{text}");
    for (line, (own, their)) in text.lines().zip(own.iter().zip(&theirs)) {
        assert_eq!(line, their.to_str().unwrap());
        assert_ne!(own, their);
    }
    assert_eq!(status, 3);
    bundle.cgroup.kill().unwrap();
    wait(&pidfd);
}

fn exec_into_dead_container() {
    let bundle = Bundle::new("dead");
    let mut spec = bundle.spec("true");
    spec["process"]["args"] = json!(["sleep", "100"]);
    let container = bundle.create(&spec).unwrap();
    // Killed before its start, while its namespaces are pinned.
    bundle.cgroup.kill().unwrap();
    wait(&container.created.process.pidfd);
    let failed = bundle.exec(&container, &sh("true"));
    assert!(matches!(failed, Err(CellError::NotRunning)), "{failed:?}");
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn children() -> String {
    let pid = std::process::id();
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap()
}

fn many_creates_leak_nothing() {
    let bundle = Bundle::new("many");
    let good = bundle.spec("true");
    let mut bad = good.clone();
    bad["process"]["args"] = json!(["/nope"]);
    let mut worse = good.clone();
    worse["mounts"][0]["type"] = json!("nosuchfs");
    let before = (descriptors(), children());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let mut took = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        let container = bundle.create(&good).unwrap();
        took.push(begun.elapsed());
        assert_eq!(container.run().unwrap().1, 0);
    }
    for _ in 0..20 {
        assert!(bundle.run(&bad).is_err());
        assert!(bundle.create(&worse).is_err());
    }
    assert_eq!(before, (descriptors(), children()));
    assert_eq!(mounts, fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count());
    took.sort();
    println!("       create: median {:?}, 99 of 100 within {:?}", took[100], took[198]);
}

fn at_the_same_time() {
    let threads: Vec<_> = (0..8)
        .map(|n| {
            std::thread::spawn(move || {
                let bundle = Bundle::new("parallel");
                for _ in 0..5 {
                    assert_eq!(bundle.script(&format!("exit {n}")).1, n);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn pod_pid_namespace() {
    let path = std::env::temp_dir().join(format!("cell-pid-{}/pid", std::process::id()));
    let pause = husk_cell::ensure_pod_pid_namespace(&path).unwrap().expect("made now");
    assert_eq!(husk_cell::ensure_pod_pid_namespace(&path).unwrap(), None);
    let (a, b) = (Bundle::new("shared-a"), Bundle::new("shared-b"));
    let mut spec = a.spec("sleep 100");
    spec["linux"]["namespaces"][0] = json!({"type": "pid", "path": path});
    let first = a.create(&spec).unwrap();
    first.created.process.starter.start().unwrap();
    spec["root"]["path"] = json!(b.rootfs);
    spec["process"]["args"] = json!([
        "sh",
        "-c",
        "echo $$; cat /proc/1/comm; ps | grep -c 'sleep 100'; ls /proc/1/root/ 2>&1; (true &) ; exit 0"
    ]);
    let (text, status) = b.run(&spec).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_ne!(lines[0], "1");
    assert_eq!(lines[1], "pause");
    assert!(lines[3].contains("denied"), "{text}");
    assert_eq!(status, 0);
    a.cgroup.kill().unwrap();
    assert_eq!(wait(&first.created.process.pidfd), 137);
    // The first container is gone, its namespace is not.
    assert_eq!(b.run(&spec).unwrap().1, 0);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pause as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pause as i32), None).unwrap();
    let failed = b.run(&spec);
    assert!(failed.is_err(), "{failed:?}");
    nix::mount::umount(&path).unwrap();
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

fn freeze_and_kill() {
    let bundle = Bundle::new("freeze");
    let container = bundle.create(&bundle.spec("sleep 100 & sleep 100 & wait")).unwrap();
    container.created.process.starter.start().unwrap();
    bundle.cgroup.freeze(LIMIT).unwrap();
    let pids = bundle.cgroup.processes().unwrap();
    assert!(pids.contains(&container.created.process.pid), "{pids:?}");
    bundle.cgroup.thaw(LIMIT).unwrap();
    let busy = bundle.cgroup.remove(Duration::from_millis(50));
    assert!(matches!(busy, Err(CgroupError::Deadline { .. })), "{busy:?}");
    bundle.cgroup.kill().unwrap();
    assert_eq!(wait(&container.created.process.pidfd), 137);
    fs::create_dir_all(bundle.cgroup.path().join("a/b/c")).unwrap();
    bundle.cgroup.remove(LIMIT).unwrap();
    assert!(!bundle.cgroup.path().exists());
    bundle.cgroup.remove(LIMIT).unwrap();
}

fn limits_and_stats() {
    if !has_controller("memory") {
        std::panic::resume_unwind(Box::new(Lacks("a cgroup2 hierarchy with controllers")));
    }
    let bundle = Bundle::new("limits");
    let resources = json!({"memory": {"limit": 67108864, "swap": 67108864, "reservation": 1048576}, "cpu": {"shares": 512, "quota": 50000, "period": 100000},
        "pids": {"limit": 20}, "unified": {"memory.high": "60000000"}});
    bundle.cgroup.set(&serde_json::from_value(resources).unwrap()).unwrap();
    let (text, _) = bundle.script("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.weight; echo 1 > /sys/fs/cgroup/pids.max && echo writable; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22; do sleep 1 & done 2>&1");
    assert!(text.starts_with("67108864\n50000 100000\n20\n20\n"), "{text}");
    assert!(!text.contains("writable"), "{text}");
    assert!(text.contains("can't fork"), "{text}");
    let stats = bundle.cgroup.stats().unwrap();
    assert_eq!((stats.memory_max, stats.pids_max), (67108864, 20));
    assert!(stats.cpu_usage_us > 0 && stats.memory_stat.contains_key("anon"), "{stats:?}");
    let bad = json!({"unified": {"cgroup.procs": "1"}});
    assert!(bundle.cgroup.set(&serde_json::from_value(bad).unwrap()).is_err());
}

fn out_of_memory() {
    if !has_controller("memory") {
        std::panic::resume_unwind(Box::new(Lacks("a cgroup2 hierarchy with controllers")));
    }
    let bundle = Bundle::new("oom");
    let resources = json!({"memory": {"limit": 33554432, "swap": 33554432}});
    bundle.cgroup.set(&serde_json::from_value(resources).unwrap()).unwrap();
    let watch = bundle.cgroup.watch_memory().unwrap();
    assert_eq!(watch.count("oom_kill").unwrap(), 0);
    let mut spec = bundle.spec("");
    spec["process"]["args"] = json!(["tail", "/dev/zero"]);
    let (_, status) = bundle.run(&spec).unwrap();
    assert_eq!(status, 137);
    let mut fds = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&watch), nix::poll::PollFlags::POLLPRI)];
    assert_eq!(nix::poll::poll(&mut fds, 5000_u16).unwrap(), 1);
    assert_eq!(watch.count("oom_kill").unwrap(), 1);
    assert!(watch.as_raw_fd() > 2);
}

fn cgroup_in_use() {
    let bundle = Bundle::new("used");
    let path = format!("/{}", bundle.name);
    fs::create_dir(bundle.cgroup.path().join("stale")).unwrap();
    Cgroup::create(&cgroup_root(), &path).unwrap();
    let container = bundle.create(&bundle.spec("sleep 100")).unwrap();
    assert!(matches!(Cgroup::create(&cgroup_root(), &path), Err(CgroupError::Invalid(_))));
    drop(container.created.process.starter);
    wait(&container.created.process.pidfd);
}
