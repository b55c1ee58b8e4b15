//! husk-vmm: one pod's virtual machine. The shim starts it with a configuration and descriptors; it builds the machine, runs it,
//! and tells by its exit code how it ended.

mod bus;
mod control;
mod hw;
mod lock;
mod machine;
mod phases;

use std::error::Error;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use clap::Parser;
use event_manager::SubscriberOps;
use husk_backend::files::FileChannel;
use husk_jail::seccomp::{self, ThreadKind};
use husk_jail::{VmmJail, enter_vmm};
use husk_vmm_api::config::{Start, VmConfig};
use husk_vmm_api::exit::ExitReason;
use tracing_subscriber::EnvFilter;

use machine::{Ending, EndingSubscriber, EventLoop, Taker};
use phases::Phases;

/// Longest configuration in bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// Runs one virtual machine under KVM.
///
/// husk-vmm is started by husk's shim, once for each pod. It reads its configuration, JSON, from an inherited descriptor; all
/// else that it needs (KVM, kernel, initramfs, sockets, taps) comes as inherited descriptors too, which the configuration names
/// by number. It opens nothing by path.
///
/// Exit codes: 0 the guest powered off or the shim asked for the end; 1 the VMM failed, see the last line of its log on standard
/// error; 3 the guest reset itself; 4 the guest's kernel panicked; 5 the snapshot to go on from can't be used, see the same line.
///
/// HUSK_LOG sets what is logged, as in "debug" or "husk_vmm=trace"; without it, "info".
#[derive(Parser)]
#[command(name = "husk-vmm", version)]
struct Args {
    /// Descriptor to read the configuration from, to its end.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(3..))]
    config_fd: RawFd,
}

fn main() -> ExitCode {
    let phases = Phases::start();
    husk_jail::bound_arenas();
    let args = Args::parse();
    let filter = EnvFilter::try_from_env("HUSK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_env_filter(filter).init();
    let reason = run(args.config_fd, phases).unwrap_or_else(|error| {
        tracing::error!("{}", chain(error.as_ref()));
        let of_snapshot = error.downcast_ref().is_some_and(machine::BuildError::is_of_snapshot);
        if of_snapshot { ExitReason::Snapshot } else { ExitReason::Failed }
    });
    ExitCode::from(reason.code())
}

fn run(config_fd: RawFd, phases: Phases) -> Result<ExitReason, Box<dyn Error>> {
    let mut descriptors = Taker::default();
    let mut json = String::new();
    File::from(descriptors.take("configuration", config_fd)?).take(CONFIG_MAX).read_to_string(&mut json)?;
    let config: VmConfig = serde_json::from_str(&json)?;
    let span = tracing::info_span!("pod", id = config.id);
    let _entered = span.enter();
    machine::check(&config)?;
    phases.end("config");

    if let Some(jail) = &config.jail {
        let keep = keep(&config);
        enter_vmm(&VmmJail { uid: jail.uid, gid: jail.gid, netns: jail.netns, keep: &keep })?;
    }
    phases.end("jail");

    let inherited = descriptors.take_all(&config)?;
    let control = descriptors.take("control socket", config.control)?;
    let files = config.disks.map(|fd| descriptors.take("channel for disks", fd)).transpose()?;
    let files = files.map(FileChannel::new).transpose()?;
    let ending = Arc::new(Ending::new()?);
    let mut events = EventLoop::new()?;
    events.add_subscriber(Arc::new(Mutex::new(EndingSubscriber(ending.clone()))));
    let machine = machine::build(&config, inherited, &mut events, ending.clone(), phases.clone())?;
    let running = machine.start()?;
    control::start(control.into(), files, running, ending.clone(), phases)?;
    // Last, since threads inherit the filter of the one that starts them.
    seccomp::install(ThreadKind::Devices)?;
    let reason = serve(&mut events, &ending)?;
    tracing::info!("The VM ended: {reason}");
    Ok(reason)
}

/// Serves the devices until the VM ends.
fn serve(events: &mut EventLoop, ending: &Ending) -> Result<ExitReason, Box<dyn Error>> {
    loop {
        events.run()?;
        if let Some(reason) = ending.reason() {
            // What the guest sent to its devices before the end still goes out.
            events.run_with_timeout(0)?;
            return Ok(reason);
        }
    }
}

/// The descriptors that the configuration names and that are used after the jail is entered.
fn keep(config: &VmConfig) -> Vec<RawFd> {
    let mut keep = vec![config.kvm, config.control, config.dial, config.console];
    match &config.start {
        Start::Boot { kernel, initramfs, .. } => keep.extend([*kernel, *initramfs]),
        Start::Restore { state, memory, code } => {
            keep.extend([*state, *memory]);
            keep.extend(code.map(|code| code.file));
        }
    }
    keep.extend(config.save.iter().flat_map(|snapshot| [snapshot.state, snapshot.memory]));
    keep.extend(config.disks);
    keep.extend(config.nets.iter().filter_map(|net| net.tap));
    keep.extend(config.fs.as_ref().and_then(|fs| fs.socket));
    keep
}

/// An error and its sources in one line.
fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(line, ": {error}");
        source = error.source();
    }
    line
}
