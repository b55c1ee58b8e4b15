//! The shim's log: one line an event, with the pod's id, on the FIFO `log` that containerd opened in the bundle (its lines go
//! into containerd's own log), or on stderr without one. A reader that is gone or slow loses lines and stops nothing.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Longest line in bytes: what a pipe takes in one piece (PIPE_BUF, pipe(7)), so that lines of two shims never mix.
const MAX_LINE: usize = 4096;

/// Sends every later event to stderr.
pub(crate) fn init_stderr(name: &str, level: &str) {
    set(None, name, level);
}

/// Sends every later event to the FIFO `log` in `bundle`.
pub(crate) fn init(bundle: &Path, pod: &str, level: &str) {
    // Opened for reading too: then it can be opened without containerd, and containerd's restart breaks no pipe.
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(bundle.join("log"))
        .ok();
    set(fifo, pod, level);
}

fn set(fifo: Option<File>, pod: &str, level: &str) {
    let outcome = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_ansi(false)
        .with_writer(Sink(fifo))
        .event_format(Lines { pod: pod.to_owned() })
        .try_init();
    if let Err(error) = outcome {
        let _ = writeln!(io::stderr(), "{pod}: cannot set up the log: {error}");
    }
}

/// Where lines go.
struct Sink(Option<File>);

/// One line on its way.
struct Line<'a>(&'a Sink);

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut line = bytes[..bytes.len().min(MAX_LINE)].to_vec();
        if let (true, Some(last)) = (bytes.len() > MAX_LINE, line.last_mut()) {
            *last = b'\n';
        }
        let _ = match &self.0.0 {
            Some(fifo) => (&mut &*fifo).write_all(&line),
            None => io::stderr().write_all(&line),
        };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

/// `time=... level=... pod=... message key=value`.
struct Lines {
    pod: String,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        write!(writer, "time=")?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, " level={} pod={} ", event.metadata().level().as_str().to_lowercase(), self.pod)?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
