//! Tests of stdio.rs: pipes on one side, Unix sockets for the shim's connections on the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use super::*;
use crate::dial::from_descriptor;

const PATIENCE: Duration = Duration::from_secs(20);

fn connection() -> (Connection, StdStream) {
    let (ours, theirs) = StdStream::pair().unwrap();
    (from_descriptor(ours.into()).unwrap(), theirs)
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap()
}

fn output(end: OwnedFd) -> Arc<Output> {
    Arc::new(Output { end: Descriptor::new(end).unwrap(), read: AtomicU64::new(0) })
}

#[tokio::test]
async fn what_was_written_is_counted_before_and_after_it_is_read() {
    let (read, write) = pipe();
    let (ours, mut theirs) = connection();
    let output = output(read);
    let outputs = Outputs { stdout: Some(output.clone()), stderr: None };
    let mut write = fs::File::from(write);
    write.write_all(&[1; 1000]).unwrap();
    assert_eq!(outputs.written(), Written { stdout: 1000, stderr: 0 });
    let copying = tokio::spawn(copy_output(output, ours));
    let mut got = vec![0; 1000];
    let got = tokio::task::spawn_blocking(move || theirs.read_exact(&mut got).map(|()| theirs)).await;
    write.write_all(&[1; 234]).unwrap();
    assert_eq!(outputs.written().stdout, 1234);
    drop((write, got));
    tokio::time::timeout(PATIENCE, copying).await.unwrap().unwrap();
    assert_eq!(outputs.written().stdout, 1234);
}

#[tokio::test]
async fn output_arrives_whole_and_ends() {
    let (read, write) = pipe();
    let (ours, mut theirs) = connection();
    let copying = tokio::spawn(copy_output(output(read), ours));
    let data: Vec<u8> = (0..3_000_000u32).map(|number| number as u8).collect();
    let writer = std::thread::spawn({
        let data = data.clone();
        move || fs::File::from(write).write_all(&data).unwrap()
    });
    let reader = std::thread::spawn(move || {
        // Slower than the writer: the pipe must fill and stop it.
        std::thread::sleep(Duration::from_millis(50));
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        got
    });
    tokio::time::timeout(PATIENCE, copying).await.unwrap().unwrap();
    writer.join().unwrap();
    assert!(reader.join().unwrap() == data);
}

#[tokio::test]
async fn output_goes_on_without_the_shim() {
    let (read, write) = pipe();
    let (ours, theirs) = connection();
    drop(theirs);
    let copying = tokio::spawn(copy_output(output(read), ours));
    let writer = std::thread::spawn(move || fs::File::from(write).write_all(&vec![1; 1_000_000]));
    tokio::time::timeout(PATIENCE, copying).await.unwrap().unwrap();
    assert!(writer.join().unwrap().is_ok());
}

#[tokio::test]
async fn input_ends_with_the_shims() {
    let (read, write) = pipe();
    let (ours, mut theirs) = connection();
    let copying = tokio::spawn(copy_input(Descriptor::new(write).unwrap(), ours));
    theirs.write_all(b"hello").unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    tokio::time::timeout(PATIENCE, copying).await.unwrap().unwrap();
    let mut got = Vec::new();
    fs::File::from(read).read_to_end(&mut got).unwrap();
    assert_eq!(got, b"hello");
}

#[tokio::test]
async fn input_ends_with_its_reader() {
    let (read, write) = pipe();
    let (ours, mut theirs) = connection();
    let copying = tokio::spawn(copy_input(Descriptor::new(write).unwrap(), ours));
    tokio::task::yield_now().await;
    drop(read);
    tokio::time::timeout(PATIENCE, copying).await.unwrap().unwrap();
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn a_full_input_pipe_waits_for_its_reader() {
    let (read, write) = pipe();
    let (ours, mut theirs) = connection();
    let copying = tokio::spawn(copy_input(Descriptor::new(write).unwrap(), ours));
    let writer = std::thread::spawn(move || theirs.write_all(&vec![7; 1_000_000]));
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let mut got = Vec::new();
        fs::File::from(read).read_to_end(&mut got).unwrap();
        got.len()
    });
    tokio::time::timeout(PATIENCE, copying).await.unwrap().unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(reader.join().unwrap(), 1_000_000);
}

#[tokio::test]
async fn a_terminal_echoes_resizes_and_ends() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let (stdin, mut their_stdin) = connection();
    let (stdout, mut their_stdout) = connection();
    let connections = Connections { stdin: Some(stdin), stdout: Some(stdout), stderr: None };
    let terminal = attach(Ends::default(), connections, Some(pty.master)).unwrap().terminal.unwrap();
    terminal.resize(100, 1 << 20).unwrap();
    their_stdin.write_all(b"x\n").unwrap();
    their_stdin.shutdown(std::net::Shutdown::Write).unwrap();
    let shell = std::thread::spawn(move || {
        let mut line = [0; 16];
        let mut slave = fs::File::from(pty.slave);
        let length = slave.read(&mut line).unwrap();
        slave.write_all(b"last words").unwrap();
        line[..length].to_vec()
    });
    let screen = tokio::task::spawn_blocking(move || {
        let mut got = Vec::new();
        their_stdout.read_to_end(&mut got).unwrap();
        got
    });
    let screen = tokio::time::timeout(PATIENCE, screen).await.unwrap().unwrap();
    assert_eq!(shell.join().unwrap(), b"x\n");
    assert_eq!(screen, b"x\r\nlast words");
}
