//! A vhost-user back end for tests, at the level of bytes: it logs what it is told and answers what must be answered.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

pub(crate) struct BackEnd {
    log: Arc<Mutex<Vec<String>>>,
    thread: JoinHandle<()>,
}

impl BackEnd {
    /// Serves a connection on a thread of its own.
    pub(crate) fn start(mut stream: UnixStream, queues: u64) -> Self {
        let log = Arc::new(Mutex::new(Vec::new()));
        let shared = log.clone();
        let thread = std::thread::spawn(move || {
            let mut header = [0; 12];
            while stream.read_exact(&mut header).is_ok() {
                let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
                let mut body = vec![0; word(8) as usize];
                stream.read_exact(&mut body).unwrap();
                let first = || u32::from_le_bytes(body[..4].try_into().unwrap());
                let mut log = shared.lock().unwrap();
                // vhost-user, "Front-end message types".
                let answer: Option<Vec<u8>> = match word(0) {
                    1 => Some(((1u64 << 30) | (1 << 32) | (1 << 29)).to_le_bytes().to_vec()),
                    11 => {
                        log.push(format!("stop {}", first()));
                        Some(body.clone())
                    }
                    15 => Some(1u64.to_le_bytes().to_vec()),
                    17 => Some(queues.to_le_bytes().to_vec()),
                    2 => {
                        log.push("features".into());
                        None
                    }
                    3 => {
                        log.push("owner".into());
                        None
                    }
                    5 => {
                        log.push(format!("memory {}", first()));
                        None
                    }
                    12 => {
                        log.push(format!("ring {}", first()));
                        None
                    }
                    18 => {
                        let what = if body[4] == 1 { "enable" } else { "disable" };
                        log.push(format!("{what} {}", first()));
                        None
                    }
                    _ => None,
                };
                if let Some(answer) = answer {
                    let mut reply = header[..4].to_vec();
                    reply.extend(5u32.to_le_bytes());
                    reply.extend((answer.len() as u32).to_le_bytes());
                    reply.extend(answer);
                    if stream.write_all(&reply).is_err() {
                        return;
                    }
                }
            }
        });
        Self { log, thread }
    }

    /// While the guard lives the back end answers nothing.
    pub(crate) fn hold(&self) -> MutexGuard<'_, Vec<String>> {
        self.log.lock().unwrap()
    }

    /// What it was told until the connection closed.
    pub(crate) fn finish(self) -> Vec<String> {
        self.thread.join().unwrap();
        let log = self.log.lock().unwrap();
        log.clone()
    }
}
