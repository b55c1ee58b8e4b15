//! What the process is and has: user, limits, terminal, errors of exec.

use std::{fs, io::Read};

use husk_cell::Stdio;
use serde_json::{Value, json};

use crate::harness::{Bundle, wait};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("process::exec_errors", exec_errors),
    ("process::environment", environment),
    ("process::scheduling", scheduling),
    ("process::time_offsets", time_offsets),
    ("process::descriptors", descriptors),
    ("process::capabilities", capabilities),
    ("process::seccomp", seccomp),
    ("process::terminal", terminal),
    ("process::terminal_of_exec", terminal_of_exec),
    ("process::working_directory", working_directory),
];

fn exec_errors() {
    let bundle = Bundle::new("errors");
    fs::write(bundle.rootfs.join("text"), "hello").unwrap();
    fs::write(bundle.rootfs.join("script"), "#!/no/interpreter\n").unwrap();
    for (name, mode) in [("text", 0o644), ("script", 0o755)] {
        fs::set_permissions(bundle.rootfs.join(name), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    }
    for (program, expected) in [
        ("/nope", "exec \"/nope\": no such file or directory"),
        ("nope", "exec \"nope\": executable file not found in $PATH"),
        ("/text", "exec \"/text\": permission denied"),
        ("/etc", "exec \"/etc\": permission denied"),
        ("/script", "exec \"/script\": no such file or directory (the file is there: its interpreter is not)"),
    ] {
        let mut spec = bundle.spec("");
        spec["process"]["args"] = json!([program]);
        assert_eq!(bundle.run(&spec).unwrap_err().to_string(), expected);
    }
    let mut spec = bundle.spec("");
    spec["process"]["args"] = json!(["/".to_owned() + &"\u{1}".repeat(100_000)]);
    let failed = bundle.run(&spec).unwrap_err().to_string();
    assert!(failed.starts_with("exec \"/\u{1}") && failed.len() < 4096, "{failed}");
}

fn environment() {
    let bundle = Bundle::new("environment");
    let mut spec = bundle.spec("id -u; id -g; id -G; umask; echo $HOME; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; hostname; cat /proc/sys/kernel/shm_rmid_forced; env | sort | tr '\\n' ' '");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 63});
    spec["process"]["oomScoreAdj"] = json!(500);
    spec["process"]["env"] = json!(["PATH=/bin", "A=b c"]);
    spec["linux"]["sysctl"] = json!({"kernel.shm_rmid_forced": "1"});
    spec["domainname"] = json!("example");
    let (text, _) = bundle.run(&spec).unwrap();
    assert!(text.starts_with("1000\n1000\n1000 5 6\n0077\n/home/web\n1024\n2048\n500\ncell\n1\n"), "{text}");
    assert!(text.contains("A=b c") && !text.contains("CARGO"), "{text}");
}

fn scheduling() {
    let bundle = Bundle::new("scheduling");
    let mut spec = bundle.spec("cut -d' ' -f19,41 /proc/self/stat; ionice; grep SigIgn /proc/self/status; echo $TWICE");
    spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
    spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
    spec["process"]["env"] = json!(["PATH=/bin", "TWICE=first", "TWICE=second"]);
    let (text, _) = bundle.run(&spec).unwrap();
    // SCHED_BATCH is 3 (linux/sched.h). No signal is ignored, whatever the C library left so.
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "7 3", "{text}");
    assert!(lines[1].ends_with("prio 6") && lines[2].ends_with("\t0000000000000000"), "{text}");
    assert_eq!(lines[3], "second", "{text}");
    spec["process"]["ioPriority"]["priority"] = json!(8);
    let error = bundle.run(&spec).unwrap_err().to_string();
    assert!(error.contains("I/O priority 8"), "{error}");
}

fn time_offsets() {
    let bundle = Bundle::new("time");
    let mut spec = bundle.spec("cat /proc/uptime; sleep 1000");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 1}, "monotonic": {"secs": 5}});
    let container = bundle.create(&spec).unwrap();
    let process =
        json!({"user": {"uid": 0, "gid": 0}, "args": ["cat", "/proc/uptime"], "env": ["PATH=/bin"], "cwd": "/"});
    let (text, _) = bundle.exec(&container, &process).unwrap();
    let uptime: f64 = text.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1_000_000.0, "{text}");
    spec["linux"]["timeOffsets"] = json!({"realtime": {"secs": 1}});
    let Err(error) = bundle.create(&spec) else { panic!("there is no offset of the wall clock") };
    assert!(error.to_string().contains("realtime"), "{error}");
}

fn descriptors() {
    let bundle = Bundle::new("descriptors");
    let mut spec = bundle.spec("");
    // ls has the directory it lists as the fourth.
    spec["process"]["args"] = json!(["ls", "/proc/self/fd"]);
    assert_eq!(bundle.run(&spec).unwrap().0, "0\n1\n2\n3\n");
}

fn capabilities() {
    let bundle = Bundle::new("capabilities");
    let script = "grep -E 'Cap|NoNewPrivs|Groups' /proc/self/status | tr -d '\\t\\n '";
    let mut spec = bundle.spec(script);
    spec["process"]["capabilities"] = json!({
        "bounding": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"], "permitted": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE"],
        "effective": ["CAP_CHOWN"], "inheritable": ["CAP_NET_BIND_SERVICE"], "ambient": ["CAP_NET_BIND_SERVICE", "CAP_CHOWN"]});
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let (text, _) = bundle.run(&spec).unwrap();
    let net = "0000000000000400";
    let expected = format!("CapInh:{net}CapPrm:{net}CapEff:{net}CapBnd:0000000000000401CapAmb:{net}NoNewPrivs:1");
    assert!(text.contains(&expected), "{text}");

    spec["process"]["noNewPrivileges"] = json!(false);
    spec["process"]["user"] = json!({"uid": 0, "gid": 0});
    spec["process"]["capabilities"] = Value::Null;
    let (text, _) = bundle.run(&spec).unwrap();
    let none = "0000000000000000";
    assert!(text.contains(&format!("CapPrm:{none}CapEff:{none}CapBnd:{none}CapAmb:{none}NoNewPrivs:0")), "{text}");
}

fn seccomp() {
    let bundle = Bundle::new("seccomp");
    for no_new_privileges in [true, false] {
        for uid in [0, 1000] {
            let mut spec = bundle.spec("mkdir /tmp/x; cat /proc/self/status | grep Seccomp:");
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["process"]["user"]["uid"] = json!(uid);
            spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]});
            let (text, _) = bundle.run(&spec).unwrap();
            assert!(text.contains("not supported") && text.contains("Seccomp:\t2"), "{text}");
        }
    }
}

fn read_all(master: std::os::fd::OwnedFd) -> String {
    let mut text = Vec::new();
    // EIO is a terminal's end of file.
    let _ = fs::File::from(master).read_to_end(&mut text);
    String::from_utf8_lossy(&text).replace('\r', "")
}

fn terminal() {
    let bundle = Bundle::new("terminal");
    let mut spec = bundle.spec("tty; stty size; echo hi > /dev/console; test -t 2 && echo yes; stat -c %u /dev/pts/0; ls /dev/pts | cat; sh -c 'echo to tty > /dev/tty'");
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    spec["process"]["terminal"] = json!(true);
    let created = bundle.create_with(&spec, Stdio::Terminal { width: 132, height: 50 }).unwrap();
    created.process.starter.start().unwrap();
    let text = read_all(created.process.terminal.unwrap());
    assert_eq!(wait(&created.process.pidfd), 0);
    assert_eq!(text, "/dev/pts/0\n50 132\nhi\nyes\n1000\n0\nptmx\nto tty\n");

    spec["mounts"].as_array_mut().unwrap().remove(2);
    let failed = bundle.create_with(&spec, Stdio::Terminal { width: 0, height: 0 }).err().expect("no devpts");
    assert!(failed.to_string().contains("devpts"), "{failed}");
}

fn terminal_of_exec() {
    let bundle = Bundle::new("tty-exec");
    let container = bundle.create(&bundle.spec("sleep 100")).unwrap();
    container.created.process.starter.start().unwrap();
    let process = husk_cell::exec(husk_cell::ExecRequest {
        namespaces: container.created.namespaces.clone(),
        process: serde_json::from_value(crate::life::sh("tty; read line; echo got $line")).unwrap(),
        seccomp: None,
        stdio: Stdio::Terminal { width: 80, height: 24 },
        cgroup: bundle.cgroup.clone(),
    })
    .unwrap();
    process.starter.start().unwrap();
    let master = process.terminal.unwrap();
    nix::unistd::write(&master, b"word\n").unwrap();
    let text = read_all(master);
    assert!(text.contains("/dev/pts/0\n") && text.ends_with("got word\n"), "{text}");
    wait(&process.pidfd);
    bundle.cgroup.kill().unwrap();
    wait(&container.created.process.pidfd);
}

fn working_directory() {
    let bundle = Bundle::new("cwd");
    let mut spec = bundle.spec("pwd");
    spec["process"]["cwd"] = json!("/made/for/this");
    assert_eq!(bundle.run(&spec).unwrap().0, "/made/for/this\n");
    spec["process"]["cwd"] = json!("/etc/passwd");
    assert!(bundle.run(&spec).unwrap_err().to_string().contains("cwd"));
    // A magic link is but its text: either nothing is there, or it is in the container.
    std::os::unix::fs::symlink("/proc/self/fd/5", bundle.rootfs.join("link")).unwrap();
    spec["process"]["args"] = json!(["pwd", "-P"]);
    for hostile in ["/proc/1/root", "/proc/self/cwd", "/link"]
        .map(String::from)
        .into_iter()
        .chain((0..16).map(|n| format!("/proc/self/fd/{n}/..")))
    {
        spec["process"]["cwd"] = json!(hostile);
        match bundle.run(&spec) {
            Ok((text, _)) => assert!(text.starts_with('/'), "{hostile}: {text}"),
            Err(error) => assert!(error.to_string().contains("cwd"), "{hostile}: {error}"),
        }
    }
}
