//! Events: a second descriptor of one, and waiting for several.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

/// A second descriptor of the same event, closed on exec. (vmm-sys-util's own copy is not, and takes dup(2), which the jail forbids.)
pub fn duplicate(event: &EventFd) -> io::Result<EventFd> {
    // SAFETY: `event` keeps its descriptor open while it is borrowed.
    let copy = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }.try_clone_to_owned()?;
    // SAFETY: the copy is an event's descriptor and owned by nobody else.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

/// Waits until one of the events is signalled, however long that takes: for a thread that has nothing else to do.
pub fn wait(events: &[&EventFd]) -> io::Result<()> {
    // SAFETY: the events keep their descriptors open while they are borrowed.
    let fds = events.iter().map(|event| unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) });
    let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_signal_the_same() {
        let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        duplicate(&event).unwrap().write(3).unwrap();
        wait(&[&EventFd::new(0).unwrap(), &event]).unwrap();
        assert_eq!(event.read().unwrap(), 3);
    }
}
