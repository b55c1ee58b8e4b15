//! Children that enter the jails and look around. They need root, and say so by failing.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::*;

/// Runs `work` in a child; its result is the exit code, 101 if it panics.
pub(crate) fn in_child(work: impl FnOnce() -> i32) -> WaitStatus {
    // SAFETY: the child runs `work` and exits without returning into the test harness.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends the process at once; nothing of the parent's is run.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

fn passes(work: impl FnOnce()) {
    let status = in_child(|| {
        work();
        0
    });
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}; the child's message is above");
}

#[test]
#[ignore = "needs root"]
fn the_vmm_sees_nothing_and_may_nothing() {
    passes(|| {
        let kept = File::open("/dev/null").unwrap();
        let lost = File::open("/etc/passwd").unwrap();
        let lost_number = lost.as_raw_fd();
        std::mem::forget(lost);
        let keep = [kept.as_raw_fd()];
        prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).unwrap();
        enter_vmm(&VmmJail { uid: 4242, gid: 4243, netns: None, keep: &keep }).unwrap();

        assert_eq!(nix::unistd::getresuid().unwrap().saved.as_raw(), 4242);
        assert_eq!(nix::unistd::getresgid().unwrap().saved.as_raw(), 4243);
        assert!(nix::unistd::getgroups().unwrap().is_empty());
        for set in [caps::CapSet::Permitted, caps::CapSet::Effective, caps::CapSet::Inheritable, caps::CapSet::Bounding]
        {
            assert!(caps::read(None, set).unwrap().is_empty(), "{set:?}");
        }
        assert!(prctl::get_no_new_privs().unwrap() && !prctl::get_dumpable().unwrap());
        assert_eq!(prctl::get_pdeathsig().unwrap(), Some(nix::sys::signal::Signal::SIGKILL));
        for path in ["/proc", "/etc/passwd", "../etc", "/dev/kvm"] {
            assert!(!Path::new(path).exists(), "{path}");
        }
        assert!(File::create("/file").is_err());
        assert!(std::net::TcpStream::connect("127.0.0.1:1").is_err());
        kept.metadata().unwrap();
        // SAFETY: asks about a number only.
        assert_eq!(unsafe { libc::fcntl(lost_number, libc::F_GETFD) }, -1);
        assert!(nix::unistd::setuid(nix::unistd::Uid::from_raw(0)).is_err());
        assert!(unshare(CloneFlags::CLONE_NEWNS).is_err());
    });
}

#[test]
#[ignore = "needs root"]
fn the_vmm_joins_the_pods_network() {
    // Outside the child: a thread that has just ended may still be counted.
    let pod = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    })
    .join()
    .unwrap();
    passes(|| {
        let inode = std::os::unix::fs::MetadataExt::ino(&pod.metadata().unwrap());
        let own = File::open("/proc/self/ns").unwrap();
        let jail = VmmJail { uid: 1, gid: 1, netns: Some(pod.as_raw_fd()), keep: &[pod.as_raw_fd(), own.as_raw_fd()] };
        enter_vmm(&jail).unwrap();
        let link = nix::fcntl::readlinkat(&own, "net").unwrap();
        assert_eq!(link.to_str().unwrap(), format!("net:[{inode}]"));
    });
}

#[test]
#[ignore = "needs root"]
fn refuses_what_is_no_jail() {
    passes(|| {
        let error = enter_vmm(&VmmJail { uid: 0, gid: 1, netns: None, keep: &[] }).unwrap_err();
        assert_eq!(error.cause.kind(), ErrorKind::InvalidInput);
        assert!(enter_vmm(&VmmJail { uid: 1, gid: 1, netns: Some(-1), keep: &[] }).is_err());
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let error = enter_fs(&FsJail { root: Path::new("/tmp"), keep: &[] }).unwrap_err();
        assert!(error.to_string().contains("one thread"), "{error}");
        drop(stop);
        let _ = other.join().unwrap();
    });
}

#[test]
#[ignore = "needs root"]
fn the_fs_daemon_sees_the_share_and_later_mounts_only() {
    passes(|| {
        // As the shim does: an own mount namespace, and the share a shared mount in it.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>).unwrap();
        let share = Path::new("/tmp/husk-jail-test");
        std::fs::create_dir_all(share).unwrap();
        mount(Some("tmpfs"), share, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        mount(None::<&str>, share, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        std::fs::create_dir_all(share.join("c/rootfs")).unwrap();
        let (ready, inside) = nix::unistd::pipe().unwrap();
        let (go, outside) = nix::unistd::pipe().unwrap();
        // SAFETY: the child only runs the lines below and exits.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let keep = [inside.as_raw_fd(), go.as_raw_fd()];
                enter_fs(&FsJail { root: share, keep: &keep }).unwrap();
                nix::unistd::write(&inside, b"x").unwrap();
                nix::unistd::read(&go, &mut [0]).unwrap();
                let code = look_around();
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                nix::unistd::read(&ready, &mut [0]).unwrap();
                mount(Some("tmpfs"), &share.join("c/rootfs"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
                std::fs::write(share.join("c/rootfs/file"), "late").unwrap();
                nix::unistd::write(&outside, b"x").unwrap();
                let status = waitpid(child, None).unwrap();
                nix::mount::umount2(share, nix::mount::MntFlags::MNT_DETACH).unwrap();
                let _ = std::fs::remove_dir(share);
                assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
            }
        }
    });
}

/// In the fs daemon's jail; 0 if all is as it should be.
fn look_around() -> i32 {
    let found = [
        std::fs::read_to_string("/c/rootfs/file").is_ok_and(|text| text == "late"),
        std::fs::write("/c/rootfs/new", "").is_ok(),
        std::os::unix::fs::chown("/c/rootfs/new", Some(77), Some(77)).is_ok(),
        std::fs::write("/c/planted", "").is_err_and(|error| error.kind() == ErrorKind::ReadOnlyFilesystem),
        !Path::new("/proc").exists() && !Path::new("/../etc").exists(),
        unshare(CloneFlags::CLONE_NEWNS).is_err(),
        mount(Some("tmpfs"), "/c", Some("tmpfs"), MsFlags::empty(), None::<&str>).is_err(),
        !caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap_or(true),
        caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_CHOWN).unwrap_or(false),
    ];
    found.iter().position(|good| !good).map_or(0, |number| 1 + i32::try_from(number).unwrap_or(0))
}
