//! The control socket: its end is the VM's end, whether the shim is gone or has had its answer to Stop.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use husk_vmm_api::exit::ExitReason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use crate::machine::Ending;

/// Ends the VM once the next answer is written.
#[derive(Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on the next flushed answer is the last.
    pub(super) fn after_answer(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The connection with the shim.
pub(super) struct ControlSocket {
    stream: UnixStream,
    ending: Arc<Ending>,
    stop: Stop,
}

impl ControlSocket {
    /// Wraps the stream; with the switch that ends the VM after an answer.
    pub(super) fn new(stream: UnixStream, ending: Arc<Ending>) -> (Self, Stop) {
        let stop = Stop::default();
        (Self { stream, ending, stop: stop.clone() }, stop)
    }

    fn closed(&self) {
        if self.ending.reason().is_none() {
            tracing::info!("The shim closed the control socket");
            self.ending.end(ExitReason::PowerOff);
        }
    }
}

impl AsyncRead for ControlSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (room, before) = (buf.remaining(), buf.filled().len());
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if result.is_err() || (room > 0 && buf.filled().len() == before) {
            self.closed();
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for ControlSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        if result.is_err() {
            self.closed();
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        // ttrpc flushes once after each message.
        if self.stop.0.load(Ordering::Relaxed) {
            self.ending.end(ExitReason::PowerOff);
        }
        Poll::Ready(result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
