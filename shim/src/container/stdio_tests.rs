//! Streams over real FIFOs and sockets, with a socket pair as the VMM's channel.

use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use husk_vmm_api::dial::Message;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::AsyncReadExt;

use super::*;
use crate::container::process::{Ending, Exit, Process};

/// A directory with FIFOs, removed at the test's end.
struct Fifos(PathBuf);

impl Fifos {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("husk-stdio-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        for fifo in ["in", "out", "err"] {
            nix::unistd::mkfifo(&path.join(fifo), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn paths(&self) -> Paths {
        Paths { stdin: self.path("in"), stdout: self.path("out"), stderr: self.path("err"), terminal: false }
    }

    /// containerd's reader of an output.
    fn reader(&self, name: &str) -> std::fs::File {
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.0.join(name)).unwrap()
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The guest dials a port.
fn dial_from_guest(vmm: &OwnedFd, port: u32) -> UnixStream {
    let (guest, host) = std::os::unix::net::UnixStream::pair().unwrap();
    let rights = [host.as_raw_fd()];
    let message = Message::GuestDialled { port }.encode();
    let control = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(vmm.as_raw_fd(), &[IoSlice::new(&message)], &control, MsgFlags::empty(), None).unwrap();
    guest.set_nonblocking(true).unwrap();
    UnixStream::from_std(guest).unwrap()
}

/// Reads a FIFO to its end on a thread of its own.
fn read_all(file: std::fs::File) -> tokio::task::JoinHandle<Vec<u8>> {
    let flags = nix::fcntl::OFlag::empty();
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        let mut file = file;
        file.read_to_end(&mut all).unwrap();
        all
    })
}

#[tokio::test]
async fn output_arrives_whole_and_ends() {
    let fifos = Fifos::new("output");
    let (dial, vmm) = Dial::new().unwrap();
    let (out, err) = (fifos.reader("out"), fifos.reader("err"));
    let pending = Pending::open(&fifos.paths(), &dial, "ns", "c").await.unwrap();
    let request = pending.request(None);
    let mut guest_out = dial_from_guest(&vmm, request.stdout_port);
    let guest_err = dial_from_guest(&vmm, request.stderr_port);
    let _guest_in = dial_from_guest(&vmm, request.stdin_port);
    let streams = pending.join().await.unwrap();
    let (out, err) = (read_all(out), read_all(err));
    // More than every buffer on the way holds together.
    let text = vec![b'x'; 3 << 20];
    guest_out.write_all(&text).await.unwrap();
    drop((guest_out, guest_err));
    streams.drain("c", Written::ALL).await;
    assert_eq!(out.await.unwrap().len(), text.len());
    assert!(err.await.unwrap().is_empty());
}

#[tokio::test]
async fn a_reader_that_waits_already_sees_no_end_before_the_output() {
    let fifos = Fifos::new("early");
    let (dial, vmm) = Dial::new().unwrap();
    let paths = Paths { stdout: fifos.path("out"), ..Paths::default() };
    for _ in 0..50 {
        // It blocks in open(2) or read(2) while the shim opens its end, as containerd's does.
        let path = fifos.path("out");
        let read = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
        let pending = Pending::open(&paths, &dial, "ns", "c").await.unwrap();
        let mut guest = dial_from_guest(&vmm, pending.request(None).stdout_port);
        let streams = pending.join().await.unwrap();
        guest.write_all(b"all of it").await.unwrap();
        drop(guest);
        streams.drain("c", Written::ALL).await;
        assert_eq!(read.await.unwrap(), b"all of it");
    }
}

#[tokio::test]
async fn a_reader_that_comes_back_finds_what_was_written_meanwhile() {
    let fifos = Fifos::new("reattach");
    let (dial, vmm) = Dial::new().unwrap();
    let first = fifos.reader("out");
    let paths = Paths { stdout: fifos.path("out"), ..Paths::default() };
    let pending = Pending::open(&paths, &dial, "ns", "c").await.unwrap();
    let mut guest = dial_from_guest(&vmm, pending.request(None).stdout_port);
    let streams = pending.join().await.unwrap();
    drop(first);
    guest.write_all(b"while containerd restarts").await.unwrap();
    let again = read_all(fifos.reader("out"));
    drop(guest);
    streams.drain("c", Written::ALL).await;
    assert_eq!(again.await.unwrap(), b"while containerd restarts");
}

#[tokio::test]
async fn stdin_ends_with_close_io_and_not_with_a_client() {
    let fifos = Fifos::new("stdin");
    let (dial, vmm) = Dial::new().unwrap();
    let paths = Paths { stdin: fifos.path("in"), ..Paths::default() };
    let pending = Pending::open(&paths, &dial, "ns", "c").await.unwrap();
    let mut guest = dial_from_guest(&vmm, pending.request(None).stdin_port);
    let mut streams = pending.join().await.unwrap();
    for word in ["one", "two"] {
        let mut client = OpenOptions::new().write(true).open(fifos.path("in")).unwrap();
        client.write_all(word.as_bytes()).unwrap();
        drop(client);
        let mut three = [0; 3];
        guest.read_exact(&mut three).await.unwrap();
        assert_eq!(three, word.as_bytes());
    }
    let mut last = OpenOptions::new().write(true).open(fifos.path("in")).unwrap();
    last.write_all(b"end").unwrap();
    streams.close_stdin();
    drop(last);
    let mut rest = Vec::new();
    guest.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"end");
}

#[tokio::test]
async fn files_and_loggers_take_output_too() {
    let fifos = Fifos::new("logger");
    let (dial, vmm) = Dial::new().unwrap();
    let script = fifos.path("logger.sh");
    let taken = fifos.path("taken");
    std::fs::write(&script, format!("#!/bin/sh\nexec 5>&-\ncat <&3 > {taken}\necho $CONTAINER_ID $1 $2 >> {taken}\n"))
        .unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let paths = Paths { stdout: format!("binary://{script}?key=value"), ..Paths::default() };
    let pending = Pending::open(&paths, &dial, "ns", "c").await.unwrap();
    let request = pending.request(None);
    let mut guest = dial_from_guest(&vmm, request.stdout_port);
    let _stderr = dial_from_guest(&vmm, request.stderr_port);
    let mut streams = pending.join().await.unwrap();
    guest.write_all(b"logged\n").await.unwrap();
    drop((guest, _stderr));
    while streams.copies.join_next().await.is_some() {}
    let mut logger = streams.logger.take().unwrap();
    logger.wait().await;
    assert_eq!(std::fs::read_to_string(&taken).unwrap(), "logged\nc key value\n");

    // It closes descriptor 5 without a word.
    let paths = Paths { stdout: format!("binary-v2://{script}"), ..Paths::default() };
    let Err(error) = Pending::open(&paths, &dial, "ns", "c").await else { panic!("a silent logger is not ready") };
    assert!(error.to_string().contains("not say that it is ready"), "{error}");

    let file = fifos.path("new/folder/file.log");
    let paths = Paths { stdout: format!("file://{file}"), ..Paths::default() };
    let pending = Pending::open(&paths, &dial, "ns", "c").await.unwrap();
    let mut guest = dial_from_guest(&vmm, pending.request(None).stdout_port);
    let streams = pending.join().await.unwrap();
    guest.write_all(b"line\n").await.unwrap();
    drop(guest);
    streams.drain("c", Written::ALL).await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "line\n");
}

#[tokio::test]
async fn an_end_does_not_wait_for_what_was_left_running() {
    let fifos = Fifos::new("daemon");
    let (dial, vmm) = Dial::new().unwrap();
    let reader = fifos.reader("out");
    let paths = Paths { stdout: fifos.path("out"), ..Paths::default() };
    let pending = Pending::open(&paths, &dial, "ns", "c").await.unwrap();
    // It stays open: something in the guest still has the pipe.
    let mut guest = dial_from_guest(&vmm, pending.request(None).stdout_port);
    let streams = pending.join().await.unwrap();
    let reader = read_all(reader);
    guest.write_all(b"all of it").await.unwrap();
    tokio::time::timeout(DRAIN_STALL, streams.drain("c", Written { stdout: 9, stderr: 0 })).await.unwrap();
    assert_eq!(reader.await.unwrap(), b"all of it");
}

#[test]
fn targets_are_read_as_containerd_writes_them() {
    assert_eq!(Target::parse("").unwrap(), None);
    assert_eq!(Target::parse("/a").unwrap(), Some(Target::Fifo("/a".into())));
    assert_eq!(Target::parse("fifo:///a").unwrap(), Some(Target::Fifo("/a".into())));
    assert_eq!(Target::parse("file:///a").unwrap(), Some(Target::File("/a".into())));
    for (scheme, says_ready) in [("binary", false), ("binary-v2", true)] {
        let wanted = Target::Binary { uri: "/a?b=c".to_owned(), says_ready };
        assert_eq!(Target::parse(&format!("{scheme}:///a?b=c")).unwrap(), Some(wanted));
    }
    assert!(matches!(Target::parse("http://x"), Err(StdioError::Scheme(_))));
}

/// Of an exec that has written five bytes and left a program behind that holds its output open.
async fn told_after(first: [&str; 3]) -> Duration {
    let fifos = Fifos::new(&first.concat());
    let (dial, vmm) = Dial::new().unwrap();
    // Opened as containerd does it: in the background, until there is a writer.
    let read = |path| tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
    let (out, err) = (read(fifos.path("out")), read(fifos.path("err")));
    let pending = Pending::open(&fifos.paths(), &dial, "ns", "c").await.unwrap();
    let request = pending.request(None);
    let mut guest_out = dial_from_guest(&vmm, request.stdout_port);
    let guest_err = dial_from_guest(&vmm, request.stderr_port);
    let _guest_in = dial_from_guest(&vmm, request.stdin_port);
    let process = Arc::new(Process::new("e", fifos.paths(), Vec::new()));
    process.begin_start("c").unwrap();
    let waiting = tokio::spawn({
        let process = Arc::clone(&process);
        async move { process.wait().await }
    });
    let mut pending = Some(pending);
    let begun = Instant::now();
    for step in first {
        match step {
            "start" => {
                *process.streams.lock().await = Some(pending.take().unwrap().join().await.unwrap());
                process.finish_start(true);
            }
            "write" => guest_out.write_all(b"said\n").await.unwrap(),
            _ => {
                let (process, exit) = (Arc::clone(&process), Exit::now(0));
                assert!(process.set_ending(Ending { exit, written: Written { stdout: 5, stderr: 0 } }));
                tokio::spawn(async move {
                    process.settle().await;
                    process.end(exit);
                });
                tokio::task::yield_now().await;
            }
        }
    }
    waiting.await.unwrap();
    let took = begun.elapsed();
    drop((guest_out, guest_err));
    process.streams.lock().await.take().unwrap().drain("e", Written::ALL).await;
    assert_eq!((out.await.unwrap().as_slice(), err.await.unwrap().len()), (b"said\n".as_slice(), 0));
    took
}

#[tokio::test]
async fn an_end_is_told_at_once_whatever_comes_first_and_whoever_holds_the_output() {
    for first in [
        ["start", "write", "end"],
        ["start", "end", "write"],
        ["write", "start", "end"],
        ["write", "end", "start"],
        ["end", "write", "start"],
        ["end", "start", "write"],
    ] {
        let took = told_after(first).await;
        // A stall would take two seconds.
        assert!(took < Duration::from_millis(1500), "{first:?}: {took:?}");
    }
}
