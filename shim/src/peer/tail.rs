//! Reads the lines that a helper or the guest's console writes, passes each on to the log, and keeps the last few as the cause of an end.
//! Lines come from below: their length and number are bounded.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tracing::{debug, info};

/// Lines kept.
const KEPT: usize = 8;

/// Longest line in bytes; longer ones are cut in pieces.
const MAX_LINE: usize = 512;

/// The last lines of one source; its end is that of the channel.
#[derive(Clone, Debug)]
pub(crate) struct Tail(watch::Receiver<VecDeque<String>>);

impl Tail {
    /// Reads `pipe` to its end in the background. Lines of a `source` that is husk's own are logged as info, others as debug.
    pub(crate) fn read(pipe: OwnedFd, source: &'static str, is_own: bool) -> std::io::Result<Self> {
        let mut pipe = pipe::Receiver::from_owned_fd(pipe)?;
        let (kept, lines) = watch::channel(VecDeque::with_capacity(KEPT));
        tokio::spawn(async move {
            let mut splitter = Splitter::default();
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
                splitter.push(&buffer[..length], |line| keep(&kept, source, is_own, line));
            }
            splitter.finish(|line| keep(&kept, source, is_own, line));
        });
        Ok(Self(lines))
    }

    /// The last lines, after the source's end or, at the latest, `limit`.
    pub(crate) async fn last(&self, limit: Duration) -> String {
        let mut lines = self.0.clone();
        let _ = tokio::time::timeout(limit, lines.wait_for(|_| false)).await;
        let lines = lines.borrow();
        lines.iter().map(String::as_str).collect::<Vec<_>>().join(" | ")
    }

    /// Waits for a line that holds `text`; false if the source ends without one.
    pub(crate) async fn until(&self, text: &str) -> bool {
        let mut lines = self.0.clone();
        let found = lines.wait_for(|lines| lines.iter().any(|line| line.contains(text))).await;
        found.is_ok()
    }
}

/// Logs and keeps one line.
fn keep(kept: &watch::Sender<VecDeque<String>>, source: &'static str, is_own: bool, line: &str) {
    if is_own {
        info!("{source}: {line}");
    } else {
        debug!("{source}: {line}");
    }
    kept.send_modify(|lines| {
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    });
}

/// Cuts bytes into lines of printable text.
#[derive(Default)]
struct Splitter(Vec<u8>);

impl Splitter {
    fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        for &byte in bytes {
            if byte == b'\n' || self.0.len() == MAX_LINE {
                self.finish(&mut each);
            }
            if byte != b'\n' {
                self.0.push(byte);
            }
        }
    }

    fn finish(&mut self, mut each: impl FnMut(&str)) {
        let text: String = String::from_utf8_lossy(&self.0).chars().filter(|c| !c.is_control()).collect();
        self.0.clear();
        if !text.trim().is_empty() {
            each(text.trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_cleaned_and_bounded() {
        let mut lines = Vec::new();
        let mut splitter = Splitter::default();
        splitter.push(b"one\r\n\n\x1b[1mtwo\nthr", |line| lines.push(line.to_owned()));
        splitter.push(b"ee", |line| lines.push(line.to_owned()));
        splitter.push(&[b'x'; 3 * MAX_LINE], |line| lines.push(line.to_owned()));
        splitter.finish(|line| lines.push(line.to_owned()));
        assert_eq!(lines[0], "one");
        assert_eq!(lines[1], "[1mtwo");
        assert!(lines[2].starts_with("threex"));
        assert!(lines.iter().all(|line| line.len() <= MAX_LINE));
    }

    #[tokio::test]
    async fn keeps_the_last_lines() {
        let (read, write) = std::io::pipe().unwrap();
        let tail = Tail::read(read.into(), "test", true).unwrap();
        for number in 0..100 {
            use std::io::Write;
            writeln!(&write, "line {number}").unwrap();
        }
        drop(write);
        let last = tail.last(Duration::from_secs(5)).await;
        assert!(last.ends_with("line 99") && !last.contains("line 91"), "{last}");
    }

    #[tokio::test]
    async fn waits_for_a_line_or_the_end() {
        let (read, write) = std::io::pipe().unwrap();
        let tail = Tail::read(read.into(), "test", true).unwrap();
        {
            use std::io::Write;
            write!(&write, "first\nit is rea").unwrap();
            assert!(tokio::time::timeout(Duration::from_millis(50), tail.until("ready")).await.is_err());
            writeln!(&write, "dy").unwrap();
        }
        let limit = Duration::from_secs(5);
        assert!(tokio::time::timeout(limit, tail.until("ready")).await.unwrap());
        drop(write);
        assert!(!tokio::time::timeout(limit, tail.until("never")).await.unwrap());
    }
}
