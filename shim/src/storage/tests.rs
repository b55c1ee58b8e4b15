//! Real mounts, in a mount namespace of the test's own thread.

use std::fs::{self, read_to_string, write};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs a test on a thread with a mount namespace of its own, in a directory of its own.
fn apart(test: impl FnOnce(&Path) + Send + 'static) {
    let directory = std::env::temp_dir().join(format!("husk-storage-{:?}", std::thread::current().id()));
    let here = directory.clone();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        fs::create_dir_all(&here).unwrap();
        mount(Some("tmpfs"), &here, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        test(&here);
    })
    .join()
    .unwrap();
    // The mount went with the thread's namespace.
    let _ = fs::remove_dir(directory);
}

#[test]
#[ignore = "needs root"]
fn binds_files_and_directories_read_only() {
    apart(|here| {
        fs::create_dir_all(here.join("source/below")).unwrap();
        mount(Some("tmpfs"), &here.join("source/below"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        write(here.join("source/below/file"), "x").unwrap();
        let upper = BindOptions { readonly: true, recursive: true, ..Default::default() };
        bind(&here.join("source"), &here.join("upper"), upper).unwrap();
        assert_eq!(write(here.join("upper/new"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
        write(here.join("upper/below/file"), "x").unwrap();
        let target = here.join("a/target");
        bind(&here.join("source"), &target, BindOptions { readonly_below: true, ..upper }).unwrap();
        assert_eq!(read_to_string(target.join("below/file")).unwrap(), "x");
        for place in ["new", "below/new"] {
            let error = write(target.join(place), "").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{place}");
        }
        write(here.join("source/below/file"), "y").unwrap();
        assert_eq!(read_to_string(target.join("below/file")).unwrap(), "y");

        let file = here.join("b/file");
        bind(&here.join("source/below/file"), &file, BindOptions::default()).unwrap();
        write(&file, "z").unwrap();
        assert_eq!(read_to_string(here.join("source/below/file")).unwrap(), "z");

        unmount(&target).unwrap();
        unmount(&target).unwrap();
        unmount(&here.join("absent")).unwrap();
        assert!(!target.join("below").exists());
        let error = bind(&here.join("none"), &target, BindOptions::default()).unwrap_err();
        assert!(error.to_string().contains("none") && error.to_string().contains("a/target"), "{error}");
        assert!(bind(Path::new("/proc/self/root"), &target, BindOptions::default()).is_err());
    });
}

#[test]
#[ignore = "needs root"]
fn later_mounts_appear_in_slaves_only() {
    apart(|here| {
        mount(None::<&str>, here, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        fs::create_dir_all(here.join("source/late")).unwrap();
        let (slave, private) = (here.join("slave"), here.join("private"));
        let how = |propagation| BindOptions { recursive: true, propagation, ..Default::default() };
        bind(&here.join("source"), &slave, how(Propagation::Slave)).unwrap();
        bind(&here.join("source"), &private, how(Propagation::Private)).unwrap();
        mount(Some("tmpfs"), &here.join("source/late"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        write(here.join("source/late/file"), "").unwrap();
        assert!(slave.join("late/file").exists());
        assert!(!private.join("late/file").exists());
    });
}

#[test]
#[ignore = "needs root and overlayfs"]
fn mounts_overlays_whose_options_pass_a_page() {
    apart(|here| {
        let long = "l".repeat(200);
        let mut lower = Vec::new();
        for number in 0..60 {
            let layer = here.join(format!("{long}{number}"));
            fs::create_dir_all(&layer).unwrap();
            write(layer.join(format!("file{number}")), number.to_string()).unwrap();
            lower.push(layer.to_str().unwrap().to_owned());
        }
        let (upper, work) = (here.join("upper"), here.join("work"));
        fs::create_dir_all(&upper).unwrap();
        fs::create_dir_all(&work).unwrap();
        let overlay = RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                format!("lowerdir={}", lower.join(":")),
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
            ],
        };
        let root = here.join("root");
        mount_rootfs(std::slice::from_ref(&overlay), &root, &here.join("scratch")).unwrap();
        assert_eq!(read_to_string(root.join("file59")).unwrap(), "59");
        write(root.join("new"), "").unwrap();
        assert!(upper.join("new").exists());
        unmount(&root).unwrap();

        // All or nothing: the second fails, so the first goes.
        let bad = RootfsMount { kind: "nosuch".into(), ..RootfsMount::default() };
        assert!(mount_rootfs(&[overlay.clone(), bad], &root, &here.join("scratch")).is_err());
        assert!(!root.join("file59").exists());

        // A place below the root is not led out of it by the image's links.
        std::os::unix::fs::symlink("/tmp", here.join(format!("{long}0/escape"))).unwrap();
        let inner = RootfsMount {
            kind: "bind".into(),
            source: upper.to_str().unwrap().into(),
            target: "/escape".into(),
            options: vec!["bind".into()],
        };
        assert!(mount_rootfs(&[overlay, inner], &root, &here.join("scratch")).is_err());
    });
}

#[test]
#[ignore = "needs root"]
fn maps_ids_of_volumes_and_layers() {
    use std::os::unix::fs::{MetadataExt, chown};
    apart(|here| {
        let owner = |path: &Path| (fs::metadata(path).unwrap().uid(), fs::metadata(path).unwrap().gid());
        for directory in ["low1", "low2", "up", "work", "volume"] {
            fs::create_dir(here.join(directory)).unwrap();
        }
        write(here.join("low1/file"), "1").unwrap();
        write(here.join("low2/other"), "2").unwrap();
        chown(here.join("low2/other"), Some(33), Some(44)).unwrap();
        for directory in ["up", "work"] {
            chown(here.join(directory), Some(1000), Some(2000)).unwrap();
        }
        let options = [
            "uidmap=0:1000:100".to_owned(),
            "gidmap=0:2000:100".to_owned(),
            format!("workdir={}", here.join("work").display()),
            format!("upperdir={}", here.join("up").display()),
            format!("lowerdir={}:{}", here.join("low1").display(), here.join("low2").display()),
        ];
        let overlay = RootfsMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: options.to_vec(),
            ..Default::default()
        };
        let (root, scratch) = (here.join("root"), here.join("scratch"));
        mount_rootfs(std::slice::from_ref(&overlay), &root, &scratch).unwrap();
        assert_eq!(owner(&root.join("file")), (1000, 2000));
        assert_eq!(owner(&root.join("other")), (1033, 2044));
        assert_eq!(owner(&here.join("low2/other")), (33, 44));
        // Copied up with the ids that it shows.
        fs::write(root.join("other"), "new").unwrap();
        assert_eq!(owner(&here.join("up/other")), (1033, 2044));
        assert!(!scratch.exists());
        unmount(&root).unwrap();

        let missing = RootfsMount { options: vec!["uidmap=0:1000:100".into()], ..overlay.clone() };
        assert!(mount_rootfs(&[missing], &root, &scratch).is_err());
        let mut bad = overlay;
        bad.options.push("lowerdir=/no/such/layer".into());
        let error = mount_rootfs(&[bad], &root, &scratch).unwrap_err();
        assert!(crate::error::chain(&error).contains("/no/such/layer"), "{error}");
        assert!(!scratch.exists());

        let namespace = IdMap::of_options("0:1000:100", "0:2000:100").unwrap().namespace().unwrap();
        let mapped = idmap::Mapped { namespace: namespace.into(), recursive: false };
        write(here.join("volume/file"), "x").unwrap();
        let target = here.join("mounts/0");
        bind_mapped(&here.join("volume"), &target, BindOptions::default(), Some(&mapped)).unwrap();
        assert_eq!(owner(&target.join("file")), (1000, 2000));
        chown(target.join("file"), Some(1005), Some(2006)).unwrap();
        assert_eq!(owner(&here.join("volume/file")), (5, 6));
        // Not every file system's ids can be mapped.
        let refused = bind_mapped(Path::new("/proc"), &here.join("mounts/1"), BindOptions::default(), Some(&mapped));
        let said = crate::error::chain(&refused.unwrap_err());
        assert!(
            said.contains("/proc") && said.contains("cannot map the user ids of that file system's files"),
            "{said}"
        );
        // A file system that was mounted as a whole gets a mapped mount on top.
        let tmpfs = RootfsMount {
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            options: vec!["uidmap=0:1000:100".into(), "gidmap=0:2000:100".into()],
            ..Default::default()
        };
        mount_rootfs(&[tmpfs], &root, &scratch).unwrap();
        assert_eq!(owner(&root), (1000, 2000));
        unmount(&root).unwrap();
    });
}

#[test]
#[ignore = "needs root"]
fn makes_missing_targets_within_the_root_only() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    apart(|here| {
        let root = here.join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("other")).unwrap();
        mount(Some("tmpfs"), &root.join("other"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::create_dir(here.join("outside")).unwrap();
        write(root.join("etc/there"), "x").unwrap();
        symlink("/etc", root.join("absolute")).unwrap();
        symlink("../../outside", root.join("up")).unwrap();
        symlink("/nowhere", root.join("etc/link")).unwrap();
        let targets = ["/etc/hosts", "/etc/there", "/absolute/a", "/up/b", "/other/c", "/none/d", "/etc/link", "/"];
        make_targets(&root, &targets.map(Into::into));
        let mut there: Vec<_> =
            fs::read_dir(root.join("etc")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        there.sort();
        assert_eq!(there, ["a", "hosts", "link", "there"]);
        let made = fs::metadata(root.join("etc/hosts")).unwrap();
        assert_eq!((made.len(), made.permissions().mode() & 0o7777, made.uid()), (0, 0o644, 0));
        assert_eq!(read_to_string(root.join("etc/there")).unwrap(), "x");
        for empty in ["outside", "root/other"] {
            assert!(fs::read_dir(here.join(empty)).unwrap().next().is_none(), "{empty}");
        }
        make_targets(&here.join("absent"), &["/etc/hosts".into()]);
    });
}
