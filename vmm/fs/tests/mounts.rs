//! A share as the shim makes it: overlays and bind mounts, some read-only, some added later. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;

use harness::{Guest, bind, name, overlay, own_mounts};
use husk_fs::wire::{MkdirIn, RenameIn, opcode};

/// A share on a mount of its own, with `c/rootfs` and `c/mounts/0` there but not mounted on.
fn share() -> (Guest, std::path::PathBuf) {
    own_mounts();
    let directory = tempfile::tempdir().unwrap();
    let (share, host) = (directory.path().join("share"), directory.path().join("host"));
    fs::create_dir_all(share.join("c/rootfs")).unwrap();
    fs::create_dir_all(share.join("c/mounts/0")).unwrap();
    fs::create_dir(&host).unwrap();
    (Guest::at(directory, share), host)
}

#[test]
fn an_overlay_that_appears_later_is_entered() {
    let (mut guest, host) = share();
    let before = guest.walk("c/rootfs").unwrap();
    assert_eq!(before.entry_valid, 0, "so that the guest asks again");
    let lower = overlay(&host, &guest.host("c/rootfs"));
    fs::create_dir(lower.join("etc")).unwrap();
    fs::write(lower.join("etc/passwd"), "root").unwrap();
    let after = guest.walk("c/rootfs").unwrap();
    assert_ne!(before.nodeid, after.nodeid);
    let file = guest.walk("c/rootfs/etc/passwd").unwrap();
    let open = guest.open(file.nodeid, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(file.nodeid, open.fh, 0, 100).unwrap(), b"root");
    // Copied up by the open; still the same node.
    guest.write(file.nodeid, open.fh, 4, b"!", 0).unwrap();
    assert_eq!(guest.walk("c/rootfs/etc/passwd").unwrap().nodeid, file.nodeid);
    assert_eq!(fs::read(host.join("upper/etc/passwd")).unwrap(), b"root!");
    assert_eq!(fs::read(lower.join("etc/passwd")).unwrap(), b"root");
    guest.caller = (1, 2);
    fs::create_dir(guest.host("c/rootfs/tmp")).unwrap();
    let tmp = guest.walk("c/rootfs/tmp").unwrap().nodeid;
    let new = guest.create(tmp, "f", libc::O_RDWR, 0o644).unwrap().0;
    assert_eq!((new.attr.uid, new.attr.gid), (1, 2));
    guest.call(opcode::SYNCFS, 1, &[0; 8]).unwrap();
    for child in ["etc", "tmp"] {
        guest.walk(&format!("c/rootfs/{child}")).unwrap();
    }
}

#[test]
fn a_volume_of_two_containers_is_one_and_a_read_only_one_another() {
    let (mut guest, host) = share();
    for path in ["c/mounts/1", "d/mounts/0"] {
        fs::create_dir_all(guest.host(path)).unwrap();
    }
    fs::write(host.join("f"), "x").unwrap();
    bind(&host, &guest.host("c/mounts/0"), false);
    bind(&host, &guest.host("d/mounts/0"), false);
    bind(&host, &guest.host("c/mounts/1"), true);
    let one = guest.walk("c/mounts/0/f").unwrap();
    let same = guest.walk("d/mounts/0/f").unwrap();
    let readonly = guest.walk("c/mounts/1/f").unwrap();
    assert_eq!(one.nodeid, same.nodeid);
    assert_ne!(one.nodeid, readonly.nodeid);
    let open = guest.open(one.nodeid, libc::O_WRONLY).unwrap();
    guest.write(one.nodeid, open.fh, 0, b"y", 0).unwrap();
    assert_eq!(guest.open(readonly.nodeid, libc::O_WRONLY).unwrap_err(), libc::EROFS);
    assert_eq!(guest.open(readonly.nodeid, libc::O_RDONLY | libc::O_TRUNC).unwrap_err(), libc::EROFS);
    let parent = guest.walk("c/mounts/1").unwrap().nodeid;
    let writable = guest.walk("c/mounts/0").unwrap().nodeid;
    assert_eq!(guest.create(parent, "new", libc::O_RDWR, 0o600).unwrap_err(), libc::EROFS);
    assert_eq!(guest.with(opcode::MKDIR, parent, &MkdirIn::default(), &["new"]), Err(libc::EROFS));
    assert_eq!(guest.call(opcode::UNLINK, parent, &name("f")), Err(libc::EROFS));
    let rename = guest.with(opcode::RENAME, writable, &RenameIn { newdir: parent }, &["f", "g"]);
    assert!(matches!(rename, Err(libc::EXDEV | libc::EROFS)), "{rename:?}");
    assert_eq!(fs::read(host.join("f")).unwrap(), b"y");
}

#[test]
fn a_file_and_a_tmpfs_are_bound() {
    use nix::mount::{MsFlags, mount};
    let (mut guest, host) = share();
    fs::write(host.join("hosts"), "127.0.0.1 localhost").unwrap();
    fs::write(guest.host("c/mounts/1"), "").unwrap();
    bind(&host.join("hosts"), &guest.host("c/mounts/1"), true);
    let file = guest.walk("c/mounts/1").unwrap();
    let open = guest.open(file.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.nodeid, open.fh, 0, 100).unwrap(), b"127.0.0.1 localhost");
    mount(Some("tmpfs"), &guest.host("c/mounts/0"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let volume = guest.walk("c/mounts/0").unwrap().nodeid;
    let (file, open) = guest.create(volume, "f", libc::O_RDWR, 0o644).unwrap();
    let plain = guest.walk("c").unwrap();
    assert_ne!(plain.attr.ino >> 48, file.attr.ino >> 48, "another device, so other numbers");
    // A tmpfs no longer finds a file by its handle after its last name is gone, but this one is open.
    guest.call(opcode::UNLINK, volume, &name("f")).unwrap();
    for n in 0..5000 {
        fs::write(guest.host(&format!("c/mounts/0/{n}")), "").unwrap();
        guest.lookup(volume, &n.to_string()).unwrap();
    }
    assert_eq!(guest.getattr(file.nodeid).unwrap().attr.nlink, 0);
    guest.write(file.nodeid, open.fh, 0, b"x", 0).unwrap();
}

#[test]
fn a_live_volume_is_asked_for_each_time_and_apart_from_a_private_one() {
    use nix::mount::{MsFlags, mount};
    let (mut guest, host) = share();
    fs::create_dir_all(guest.host("c/live/0")).unwrap();
    fs::create_dir(host.join("late")).unwrap();
    fs::write(host.join("f"), "").unwrap();
    bind(&host, &guest.host("c/live/0"), false);
    bind(&host, &guest.host("c/mounts/0"), false);
    let (live, private) = (guest.walk("c/live/0/late").unwrap(), guest.walk("c/mounts/0/late").unwrap());
    assert_eq!((live.entry_valid, live.entry_valid_nsec), (0, 0));
    assert_ne!(live.nodeid, private.nodeid, "or one would show what is mounted in the other");
    mount(Some("tmpfs"), &guest.host("c/live/0/late"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    fs::write(guest.host("c/live/0/late/new"), "").unwrap();
    assert!(guest.walk("c/live/0/late/new").is_ok());
    assert_eq!(guest.walk("c/mounts/0/late/new").unwrap_err(), libc::ENOENT);
    // Files are one, with their pages and locks.
    assert_eq!(guest.walk("c/live/0/f").unwrap().nodeid, guest.walk("c/mounts/0/f").unwrap().nodeid);
}
