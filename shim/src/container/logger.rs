//! A `binary:` logger: a program of the host's that takes a container's output on descriptors 3 and 4 and says on 5 that it is
//! ready (containerd, core/runtime/v2 README, "Logging").

use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tracing::warn;

use super::stdio::StdioError;

/// Longest wait for the logger to be ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for the logger's end after the end of its input.
const END_LIMIT: Duration = Duration::from_secs(12);

/// A running logger.
#[derive(Debug)]
pub(super) struct Logger {
    program: PathBuf,
    child: Child,
}

/// A logger and the pipes that it reads.
pub(super) struct Started {
    pub(super) logger: Logger,
    pub(super) stdout: pipe::Sender,
    pub(super) stderr: pipe::Sender,
}

impl Logger {
    /// Starts the program of `/path?key=value&key2=value2` with the keys and values as its arguments, and waits until it is ready.
    ///
    /// One that must say so (`binary-v2`) writes a byte to descriptor 5; of others it is enough that they close it.
    pub(super) async fn start(uri: &str, says_ready: bool, namespace: &str, id: &str) -> Result<Started, StdioError> {
        let (path, arguments) = parse(uri);
        let program = PathBuf::from(path);
        let failed = |doing| {
            let program = program.clone();
            move |source| StdioError::Logger { program, doing, source }
        };
        let (out_read, out_write) = io::pipe().map_err(failed("make its pipes"))?;
        let (err_read, err_write) = io::pipe().map_err(failed("make its pipes"))?;
        let (ready_read, ready_write) = io::pipe().map_err(failed("make its pipes"))?;
        let mut command = std::process::Command::new(&program);
        command
            .args(arguments)
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mappings = [(out_read.into(), 3), (err_read.into(), 4), (ready_write.into(), 5)];
        command
            .fd_mappings(mappings.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).into())
            .map_err(|collision| failed("give it its pipes")(io::Error::other(collision)))?;
        let mut command = tokio::process::Command::from(command);
        let child = command.kill_on_drop(true).spawn().map_err(failed("run it"))?;
        // The command holds copies of the logger's ends, whose closing is what is waited for.
        drop(command);
        let sender = |fd: io::PipeWriter| pipe::Sender::from_owned_fd(fd.into());
        let stdout = sender(out_write).map_err(failed("use its pipes"))?;
        let stderr = sender(err_write).map_err(failed("use its pipes"))?;
        let mut ready = pipe::Receiver::from_owned_fd(ready_read.into()).map_err(failed("use its pipes"))?;
        let mut byte = [0; 1];
        match tokio::time::timeout(READY_LIMIT, ready.read(&mut byte)).await {
            Err(_) => return Err(failed("it is not ready after 10 s")(io::ErrorKind::TimedOut.into())),
            Ok(outcome) => {
                let length = outcome.map_err(failed("wait until it is ready"))?;
                if says_ready && length == 0 {
                    return Err(failed("it did not say that it is ready")(io::ErrorKind::UnexpectedEof.into()));
                }
            }
        };
        Ok(Started { logger: Self { program, child }, stdout, stderr })
    }

    /// Waits for its end.
    #[cfg(test)]
    pub(super) async fn wait(&mut self) {
        self.child.wait().await.unwrap();
    }

    /// Lets it write what it has, in the background; kills it if it does not end then.
    pub(super) fn finish(mut self) {
        tokio::spawn(async move {
            if tokio::time::timeout(END_LIMIT, self.child.wait()).await.is_err() {
                warn!("the logger {} is killed: it did not end with its input", self.program.display());
                let _ = self.child.kill().await;
            }
        });
    }
}

/// Path and arguments of the URI (what follows `binary://`).
fn parse(uri: &str) -> (String, Vec<String>) {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(&key.replace('+', " ")));
        if !value.is_empty() {
            arguments.push(decode(&value.replace('+', " ")));
        }
    }
    (decode(path), arguments)
}

/// Undoes percent-encoding (RFC 3986, 2.1); what is none stays as it is.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn uris_become_programs_and_arguments() {
        assert_eq!(parse("/bin/log"), ("/bin/log".to_owned(), vec![]));
        let (path, arguments) = parse("/opt/my%20log?id=a+b&flag&x=%2Fy%zz");
        assert_eq!(path, "/opt/my log");
        assert_eq!(arguments, ["id", "a b", "flag", "x", "/y%zz"]);
    }
}
