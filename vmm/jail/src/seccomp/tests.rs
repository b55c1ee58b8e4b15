//! Children that try what is allowed and what is not.

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::*;
use crate::tests::in_child;

const KINDS: [ThreadKind; 6] = [
    ThreadKind::Vcpu,
    ThreadKind::Devices,
    ThreadKind::Control,
    ThreadKind::Disk,
    ThreadKind::FsMain,
    ThreadKind::FsQueue,
];

#[test]
fn every_table_compiles_and_names_a_call_once() {
    for kind in KINDS {
        let program = compile(kind, SeccompAction::KillProcess).unwrap();
        assert!(program.len() < 4096, "{kind:?}: {} instructions", program.len());
        let mut calls: Vec<_> = tables(kind).into_iter().flatten().map(|allowed| allowed.call).collect();
        calls.sort_unstable();
        let all = calls.len();
        calls.dedup();
        assert_eq!(calls.len(), all, "{kind:?} names a call twice");
    }
}

#[test]
fn lets_every_kind_allocate_log_and_end() {
    for kind in KINDS {
        let status = in_child(|| {
            install(kind).unwrap();
            let large = vec![1_u8; 8 << 20];
            eprint!("");
            drop(large);
            7
        });
        assert!(matches!(status, WaitStatus::Exited(_, 7)), "{kind:?}: {status:?}");
    }
}

#[test]
fn kills_who_calls_something_else() {
    let forbidden: [(&str, fn()); 5] = [
        ("socket", || drop(std::net::UdpSocket::bind("127.0.0.1:0"))),
        ("execve", || drop(std::process::Command::new("/bin/true").status())),
        ("kill", || {
            let _ = nix::sys::signal::kill(nix::unistd::getppid(), None);
        }),
        ("ioctl of a terminal", || {
            // SAFETY: the request takes no pointer.
            unsafe { libc::ioctl(0, libc::TIOCEXCL) };
        }),
        ("executable memory", || {
            // SAFETY: a new mapping at an address of the kernel's choice.
            unsafe {
                let (access, how) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::mmap(std::ptr::null_mut(), 4096, access, how, -1, 0)
            };
        }),
    ];
    for kind in KINDS {
        for (name, attempt) in forbidden {
            let status = in_child(|| {
                install(kind).unwrap();
                attempt();
                7
            });
            assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{kind:?}, {name}: {status:?}");
        }
    }
}

#[test]
fn only_the_file_daemon_opens_files() {
    for (kind, opens) in [
        (ThreadKind::Vcpu, false),
        (ThreadKind::Devices, false),
        (ThreadKind::Control, false),
        (ThreadKind::Disk, false),
        (ThreadKind::FsQueue, true),
    ] {
        let status = in_child(|| {
            install(kind).unwrap();
            i32::from(std::fs::File::open("/").is_err())
        });
        assert_eq!(matches!(status, WaitStatus::Exited(_, 0)), opens, "{kind:?}: {status:?}");
    }
}
