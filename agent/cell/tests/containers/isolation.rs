//! Mounts, devices and user namespaces, and attempts to get out.

use std::{fs, os::unix::fs::symlink, path::Path};

use serde_json::{Value, json};

use crate::harness::{Bundle, wait};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("isolation::read_only_root_and_masks", read_only_root_and_masks),
    ("isolation::mount_options", mount_options),
    ("isolation::nothing_propagates_back", nothing_propagates_back),
    ("isolation::links_do_not_lead_out", links_do_not_lead_out),
    ("isolation::old_root_is_gone", old_root_is_gone),
    ("isolation::copy_up", copy_up),
    ("isolation::device_filter", device_filter),
    ("isolation::devices", devices),
    ("isolation::user_namespace", user_namespace),
    ("isolation::cell_can_not_be_looked_into", cell_can_not_be_looked_into),
];

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

fn read_only_root_and_masks() {
    let bundle = Bundle::new("readonly");
    let mut spec = bundle.spec("touch /x 2>&1; touch /dev/x && echo dev writable; head -c 10 /proc/version | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/vm/swappiness; grep -c ' /proc/sys ' /proc/self/mountinfo");
    spec["root"]["readonly"] = json!(true);
    spec["linux"]["maskedPaths"].as_array_mut().unwrap().push(json!("/proc/version"));
    let (text, _) = bundle.run(&spec).unwrap();
    assert_eq!(
        text.matches("Read-only file system").count() + text.matches("read-only file system").count(),
        2,
        "{text}"
    );
    assert!(text.contains("dev writable\n0\n0\n") && text.ends_with("\n1\n"), "{text}");
}

fn mount_options() {
    let bundle = Bundle::new("mounts");
    let outside = Path::new("/tmp").join(format!("{}-outside", bundle.name));
    fs::create_dir_all(outside.join("sub")).unwrap();
    fs::write(outside.join("file"), "content").unwrap();
    nix::mount::mount(Some("none"), &outside.join("sub"), Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
        .unwrap();
    let mut spec = bundle.spec("touch /plain/x /ro/sub/x && echo ok; touch /ro/x; touch /rro/sub/x; cat /a/b/file; cp /bin/busybox /t/; mount | grep -E ' /(ro|rro|t) ' | sort; ls /ro/sub; touch /t/y && echo tmpfs; exit 0");
    for (destination, options) in
        [("/plain", json!(["bind"])), ("/ro", json!(["rbind", "ro", "rprivate"])), ("/rro", json!(["rbind", "rro"]))]
    {
        add_mount(
            &mut spec,
            json!({"destination": destination, "type": "bind", "source": outside, "options": options}),
        );
    }
    add_mount(
        &mut spec,
        json!({"destination": "/a/b/file", "type": "bind", "source": outside.join("file"), "options": ["ro"]}),
    );
    add_mount(
        &mut spec,
        json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["noexec", "nosuid", "size=8k", "ro"]}),
    );
    let (text, _) = bundle.run(&spec).unwrap();
    nix::mount::umount(&outside.join("sub")).unwrap();
    fs::remove_dir_all(&outside).unwrap();
    assert!(text.starts_with("ok\n"), "{text}");
    for refused in ["/ro/x: Read-only", "/rro/sub/x: Read-only", "/t/y: Read-only"] {
        assert!(text.contains(refused), "{refused}: {text}");
    }
    assert!(text.contains("content"), "{text}");
    assert!(text.contains(" /t type tmpfs (ro,nosuid,noexec") && text.contains("size=8k"), "{text}");

    for (mount, expected) in [
        (
            json!({"destination": "/m", "type": "bind", "source": "/no/such", "options": []}),
            "open the source /no/such: no such file or directory",
        ),
        (json!({"destination": "/m", "type": "tmpfs", "source": "x", "options": ["bogus=1"]}), "bogus"),
        (json!({"destination": "/m", "type": "nofs", "source": "x"}), "\"nofs\""),
        (json!({"destination": "/m", "source": "x"}), "no type"),
    ] {
        let mut spec = bundle.spec("true");
        add_mount(&mut spec, mount);
        let failed = bundle.run(&spec).unwrap_err().to_string();
        assert!(failed.starts_with("mount /m: ") && failed.contains(expected), "{failed}");
    }
}

fn nothing_propagates_back() {
    use nix::mount::{MsFlags, mount, umount};
    let bundle = Bundle::new("propagation");
    let outside = Path::new("/tmp").join(format!("{}-outside", bundle.name));
    fs::create_dir_all(&outside).unwrap();
    let none = None::<&str>;
    mount(Some("none"), &outside, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &outside, none, MsFlags::MS_SHARED, none).unwrap();
    fs::create_dir(outside.join("inner")).unwrap();
    let lines = || fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let before = lines();
    for (options, grows) in [(json!(["rbind"]), 0), (json!(["rbind", "rslave"]), 0), (json!(["rbind", "rshared"]), 1)] {
        let mut spec = bundle.spec("true");
        add_mount(&mut spec, json!({"destination": "/m", "type": "bind", "source": outside, "options": options}));
        add_mount(&mut spec, json!({"destination": "/m/inner", "type": "tmpfs", "source": "tmpfs"}));
        assert_eq!(bundle.run(&spec).unwrap().1, 0);
        assert_eq!(lines(), before + grows, "{options}");
    }
    umount(&outside.join("inner")).unwrap();
    umount(&outside).unwrap();
    fs::remove_dir(&outside).unwrap();
}

fn links_do_not_lead_out() {
    let bundle = Bundle::new("links");
    let outside = Path::new("/tmp").join(format!("{}-outside", bundle.name));
    fs::create_dir_all(&outside).unwrap();
    symlink(&outside, bundle.rootfs.join("absolute")).unwrap();
    symlink(format!("../../../../..{}", outside.display()), bundle.rootfs.join("relative")).unwrap();
    symlink("/proc/self/fd/3", bundle.rootfs.join("magic")).unwrap();
    let mut spec = bundle.spec("cat /absolute/a/f /relative/b/f");
    fs::write(outside.join("source"), "x").unwrap();
    for destination in ["/absolute/a/f", "/relative/b/f"] {
        add_mount(
            &mut spec,
            json!({"destination": destination, "type": "bind", "source": outside.join("source"), "options": ["bind"]}),
        );
    }
    assert_eq!(bundle.run(&spec).unwrap().0, "xx");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "something was made outside");
    let inside = bundle.rootfs.join(outside.strip_prefix("/").unwrap());
    assert!(inside.join("a/f").exists() && inside.join("b/f").exists());

    let mut spec = bundle.spec("true");
    add_mount(&mut spec, json!({"destination": "/magic/x", "type": "tmpfs", "source": "tmpfs"}));
    assert!(bundle.run(&spec).is_err());

    fs::remove_dir(bundle.rootfs.join("proc")).unwrap();
    symlink("/tmp", bundle.rootfs.join("proc")).unwrap();
    let failed = bundle.run(&bundle.spec("true")).unwrap_err().to_string();
    assert!(failed.starts_with("mount /proc: make the target: "), "{failed}");
    fs::remove_dir_all(&outside).unwrap();
}

fn old_root_is_gone() {
    let bundle = Bundle::new("oldroot");
    let (text, _) = bundle.script("cat /proc/self/mountinfo; ls -a /..; umount / 2>&1");
    assert!(!text.contains("unified") && !text.contains(" /work"), "{text}");
    let roots = text.lines().filter(|l| l.split(' ').nth(4) == Some("/")).count();
    assert_eq!(roots, 1, "{text}");
    let propagated = text
        .lines()
        .take_while(|l| l.contains(" - "))
        .filter(|l| l.contains("shared:") || l.contains("master:"))
        .count();
    assert_eq!(propagated, 0, "{text}");
}

fn copy_up() {
    let bundle = Bundle::new("copyup");
    let var = bundle.rootfs.join("var/lib");
    fs::create_dir_all(var.join("deep")).unwrap();
    fs::write(var.join("deep/file"), "kept").unwrap();
    fs::set_permissions(var.join("deep/file"), std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(var.join("deep/file"), Some(1000), Some(5)).unwrap();
    symlink("deep/file", var.join("link")).unwrap();
    let mut spec = bundle.spec("cat /var/lib/link; stat -c ' %a %u %g' /var/lib/deep/file; touch /var/lib/new");
    add_mount(
        &mut spec,
        json!({"destination": "/var/lib", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=755"]}),
    );
    assert_eq!(bundle.run(&spec).unwrap().0, "kept 640 1000 5\n");
    assert!(!var.join("new").exists());
}

fn device_filter() {
    let bundle = Bundle::new("filter");
    let rules = json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}]);
    bundle.cgroup.restrict_devices(&serde_json::from_value::<Vec<_>>(rules).unwrap()).unwrap();
    let (text, _) = bundle.script("mknod /tmp/mem c 1 1 && echo made; head -c 1 /tmp/mem; mknod /tmp/kmsg c 1 11; head -c 1 /tmp/kmsg; mknod /tmp/loop b 7 0; head -c 1 /tmp/loop; head -c 1 /dev/zero | wc -c; echo x > /dev/null && head -c 1 /dev/urandom | wc -c");
    assert!(text.starts_with("made\n"), "{text}");
    assert_eq!(text.matches("Operation not permitted").count(), 3, "{text}");
    assert!(text.ends_with("1\n1\n"), "{text}");
}

fn devices() {
    let bundle = Bundle::new("devices");
    let mut spec = bundle.spec("cd /dev; stat -c '%n %F %t:%T %a' null zero full random urandom tty sub/fuse; for l in fd stdin stdout stderr ptmx; do readlink $l; done; echo err > /dev/stderr");
    spec["linux"]["devices"] = json!([{"path": "/dev/sub/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 432, "uid": 1000, "gid": 5}]);
    let (text, _) = bundle.run(&spec).unwrap();
    assert!(text.contains("null character special file 1:3 666"), "{text}");
    assert!(text.contains("sub/fuse character special file a:e5 660"), "{text}");
    assert!(
        text.contains("/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\nerr\n"),
        "{text}"
    );
}

fn user_namespace() {
    let bundle = Bundle::new("userns");
    for directory in ["", "etc", "tmp", "root", "dev"] {
        std::os::unix::fs::chown(bundle.rootfs.join(directory), Some(100_000), Some(100_000)).unwrap();
    }
    let mut spec = bundle.spec("id -u; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && head -c 1 /dev/zero | wc -c; touch /tmp/mine && echo wrote; grep 0:: /proc/self/cgroup; ls /sys | grep -c kernel");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    let (text, status) = bundle.run(&spec).unwrap();
    assert_eq!((text.trim_start(), status), ("0\n 0 100000 65536\n1\nwrote\n0::/\n1\n", 0));
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(bundle.rootfs.join("tmp/mine")).unwrap());
    assert_eq!(owner, 100_000);

    spec["process"]["args"] = json!(["sleep", "100"]);
    let container = bundle.create(&spec).unwrap();
    let process = container.created.process;
    let namespaces = container.created.namespaces;
    process.starter.start().unwrap();
    let (stdio, output) = crate::harness::pipes();
    let exec = husk_cell::exec(husk_cell::ExecRequest {
        namespaces,
        process: serde_json::from_value(crate::life::sh(
            "id -u; cat /proc/self/uid_map | tr -s ' '; grep 0:: /proc/self/cgroup",
        ))
        .unwrap(),
        seccomp: None,
        stdio,
        cgroup: bundle.cgroup.clone(),
    })
    .unwrap();
    assert_eq!(crate::harness::finish(exec, output).unwrap().0, "0\n 0 100000 65536\n0::/\n");
    bundle.cgroup.kill().unwrap();
    wait(&process.pidfd);

    spec["linux"]["uidMappings"] = json!([]);
    assert!(bundle.create(&spec).is_err());
}

fn cell_can_not_be_looked_into() {
    let bundle = Bundle::new("peek");
    let container = bundle.create(&bundle.spec("sleep 100")).unwrap();
    let process = container.created.process;
    let namespaces = container.created.namespaces;
    process.starter.start().unwrap();
    // A process that was made in the container and waits for its start.
    let (stdio, _output) = crate::harness::pipes();
    let waiting = husk_cell::exec(husk_cell::ExecRequest {
        namespaces: namespaces.clone(),
        process: serde_json::from_value(crate::life::sh("true")).unwrap(),
        seccomp: None,
        stdio,
        cgroup: bundle.cgroup.clone(),
    })
    .unwrap();
    let (stdio, output) = crate::harness::pipes();
    let script = "for p in /proc/[0-9]*; do echo $p $(readlink $p/exe) $(readlink $p/fd/1) $(ls $p/root/ 2>&1); done";
    let mut peeking = crate::life::sh(script);
    peeking["capabilities"] = bundle.spec("")["process"]["capabilities"].clone();
    let peek = husk_cell::exec(husk_cell::ExecRequest {
        namespaces,
        process: serde_json::from_value(peeking).unwrap(),
        seccomp: None,
        stdio,
        cgroup: bundle.cgroup.clone(),
    })
    .unwrap();
    let text = crate::harness::finish(peek, output).unwrap().0;
    assert!(
        text.contains("/proc/1 /bin/busybox pipe:") && text.contains("denied") && !text.contains("containers"),
        "{text}"
    );
    drop(waiting.starter);
    wait(&waiting.pidfd);
    bundle.cgroup.kill().unwrap();
    wait(&process.pidfd);
}
