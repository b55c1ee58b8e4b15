//! The end of the machine: everything on disks written, then power off. A process 1 that merely ends would make the kernel panic.

use std::sync::mpsc;
use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};

/// A file system whose daemon is gone may never finish its sync.
const SYNC_DEADLINE: Duration = Duration::from_secs(3);

/// What the agent ends with itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Machine {
    /// The virtual machine.
    PowerOff,
    /// Only the process: in tests.
    Exit,
}

impl Machine {
    /// Syncs, for a bounded time, and ends the machine.
    pub(crate) fn off(self) -> ! {
        let (done, synced) = mpsc::channel();
        std::thread::spawn(move || {
            nix::unistd::sync();
            // The receiver may have given up.
            let _ = done.send(());
        });
        if synced.recv_timeout(SYNC_DEADLINE).is_err() {
            eprintln!("husk-agent: file systems were not in sync after {SYNC_DEADLINE:?}");
        }
        self.off_now()
    }

    fn off_now(self) -> ! {
        if let Self::Exit = self {
            std::process::exit(0);
        }
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        eprintln!("husk-agent: could not power off: {error}");
        // The kernel panics, which the VMM sees too.
        std::process::exit(1)
    }
}

/// Makes a panic of any thread end the machine too, after its message.
pub(crate) fn on_panic(machine: Machine) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        machine.off()
    }));
}
