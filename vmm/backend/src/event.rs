//! Events that two owners signal.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// A second descriptor of the same event, closed on exec. (vmm-sys-util's own copy is not, and takes dup(2), which the jail forbids.)
pub fn duplicate(event: &EventFd) -> io::Result<EventFd> {
    // SAFETY: `event` keeps its descriptor open while it is borrowed.
    let copy = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }.try_clone_to_owned()?;
    // SAFETY: the copy is an event's descriptor and owned by nobody else.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_signal_the_same() {
        let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        duplicate(&event).unwrap().write(3).unwrap();
        assert_eq!(event.read().unwrap(), 3);
    }
}
