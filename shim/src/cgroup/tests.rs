//! Paths of all three kinds of hosts; with root, a real cgroup.

use super::*;

const V2: &str =
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n31 23 0:27 / /tmp rw - tmpfs tmpfs rw";
const HYBRID: &str = "33 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
    34 33 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
    35 33 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct\n\
    36 33 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset";

fn paths(cgroup: &PodCgroup) -> Vec<&str> {
    cgroup.directories.iter().filter_map(|directory| directory.path.to_str()).collect()
}

#[test]
fn finds_the_directories_of_each_kind_of_host() {
    let path = "/kubepods/burstable/pod1/abc";
    let v2 = PodCgroup::in_mounts(path, V2).unwrap();
    assert_eq!(paths(&v2), ["/sys/fs/cgroup/kubepods/burstable/pod1/abc"]);
    let hybrid = PodCgroup::in_mounts(path, HYBRID).unwrap();
    assert_eq!(
        paths(&hybrid),
        [
            "/sys/fs/cgroup/unified/kubepods/burstable/pod1/abc",
            "/sys/fs/cgroup/cpu,cpuacct/kubepods/burstable/pod1/abc",
            "/sys/fs/cgroup/cpuset/kubepods/burstable/pod1/abc"
        ]
    );
    assert_eq!(hybrid.directories[2].kind, Kind::V1 { cpuset: true });
    assert!(matches!(PodCgroup::in_mounts(path, ""), Err(CgroupError::NoHierarchy)));
}

#[test]
fn tells_a_path_from_the_root_of_a_partial_mount() {
    let line = "30 23 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
    let inside = PodCgroup::in_mounts("/docker/x/pod/abc", line).unwrap();
    assert_eq!(paths(&inside), ["/sys/fs/cgroup/pod/abc"]);
}

#[test]
fn expands_the_form_of_systemd() {
    let expanded = |text: &str| relative(text).unwrap().into_os_string().into_string().unwrap();
    assert_eq!(
        expanded("kubepods-besteffort-pod1.slice:cri-containerd:abc"),
        "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope"
    );
    assert_eq!(expanded(":runc:abc"), "system.slice/runc-abc.scope");
    assert_eq!(expanded("-.slice::abc"), "abc.scope");
    // Not systemd's: taken as it is.
    assert_eq!(expanded("/a:b:c"), "a:b:c");
    assert_eq!(expanded("k8s.io:x"), "k8s.io:x");
    assert_eq!(expanded("a--b.slice:x:y"), "a--b.slice:x:y");
}

#[test]
fn refuses_paths_that_lead_out() {
    for path in ["", "/", "/a/../../b", "..", "a\0b"] {
        assert!(matches!(relative(path), Err(CgroupError::Path { .. })), "{path:?}");
    }
    assert!(relative(&"a/".repeat(3000)).is_err());
}

#[test]
#[ignore = "needs root and writable cgroups"]
fn kills_and_removes_what_is_there() {
    let path = format!("/husk-test-{}/leaf", std::process::id());
    let cgroup = PodCgroup::find(&path).unwrap();
    for directory in &cgroup.directories {
        directory.make().unwrap();
    }
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    for directory in &cgroup.directories {
        fs::write(directory.path.join("cgroup.procs"), child.id().to_string()).unwrap();
    }
    // The zombie is reaped elsewhere, as the shim does.
    let reaper = std::thread::spawn(move || child.wait());
    cgroup.remove(Duration::from_secs(10)).unwrap();
    cgroup.remove(Duration::from_secs(10)).unwrap();
    assert!(!reaper.join().unwrap().unwrap().success());
    for directory in &cgroup.directories {
        assert!(!directory.path.exists());
        fs::remove_dir(directory.path.parent().unwrap()).unwrap();
    }
}

#[test]
#[ignore = "needs root and writable cgroups"]
fn joins_and_leaves() {
    let path = format!("/husk-test-join-{}", std::process::id());
    let cgroup = PodCgroup::find(&path).unwrap();
    cgroup.join().unwrap();
    assert!(fs::read_to_string("/proc/self/cgroup").unwrap().contains(&path));
    cgroup.leave().unwrap();
    assert!(!fs::read_to_string("/proc/self/cgroup").unwrap().contains(&path));
    cgroup.remove(Duration::from_secs(1)).unwrap();
}

#[test]
#[ignore = "needs root and writable cgroups"]
fn confines_to_cpus_and_takes_it_back() {
    let path = format!("/husk-test-cpus-{}/leaf", std::process::id());
    let cgroup = PodCgroup::find(&path).unwrap();
    for directory in &cgroup.directories {
        directory.make().unwrap();
    }
    let v1 = cgroup.directories.iter().find(|directory| directory.kind == Kind::V1 { cpuset: true });
    let directory = v1.unwrap_or(&cgroup.directories[0]);
    let read = |directory: &Path| fs::read_to_string(cpuset_file(directory, "cpus")).unwrap().trim().to_owned();
    let all = match v1 {
        Some(_) => read(&directory.root),
        None => fs::read_to_string(directory.root.join("cpuset.cpus.effective")).unwrap().trim().to_owned(),
    };
    cgroup.confine("0", "0").unwrap();
    assert_eq!(read(&directory.path), "0");
    cgroup.confine("", "").unwrap();
    assert_eq!(read(&directory.path), all);
    cgroup.remove(Duration::from_secs(1)).unwrap();
    for directory in &cgroup.directories {
        fs::remove_dir(directory.path.parent().unwrap()).unwrap();
    }
}

#[test]
fn finds_the_cgroups_of_a_process() {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    for directory in directories(&own).unwrap() {
        let processes = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap();
        assert!(processes.lines().any(|pid| pid == std::process::id().to_string()), "{}", directory.display());
    }
    assert!(directories("7:no-such-controller:/x\n").unwrap().is_empty());
}
