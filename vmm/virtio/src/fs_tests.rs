//! The device against a back end that speaks vhost-user by the library's own back-end half, and against a silent one.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use vm_memory::FileOffset;

use super::*;
use crate::testing::{BackEnd, Counts, Driver};

fn shared_memory() -> Arc<GuestMemory> {
    let file =
        std::fs::File::from(nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(4 << 20).unwrap();
    let range = (GuestAddress(0), 4 << 20, Some(FileOffset::new(file, 0)));
    Arc::new(GuestMemory::from_ranges_with_files([range]).unwrap())
}

fn activation(memory: &Arc<GuestMemory>, counts: &Arc<Counts>) -> Activation {
    let queues = [0x10000, 0x20000]
        .map(|base| Some((Driver::new(memory, base, 64).queue(false), Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))));
    Activation {
        memory: memory.clone(),
        features: 1 << VIRTIO_F_VERSION_1,
        queues: queues.into(),
        interrupt: counts.clone(),
    }
}

#[test]
fn hands_memory_and_queues_over_and_takes_them_back() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = BackEnd::start(theirs, 3);
    let attached = Fs::attach(Some(ours), "husk", 1).unwrap();
    let mut device = attached.device.lock().unwrap();
    assert_eq!(device.queue_max_sizes(), [1024, 1024]);
    let mut config = [0xee; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..5], b"husk\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    let (memory, counts) = (shared_memory(), Arc::new(Counts::default()));
    for _ in 0..2 {
        device.activate(activation(&memory, &counts)).unwrap();
        device.reset();
    }
    drop(device);
    drop(attached);
    let log = back_end.finish();
    let round = [
        "features",
        "memory 1",
        "ring 0",
        "ring 1",
        "enable 0",
        "enable 1",
        "disable 0",
        "disable 1",
        "stop 0",
        "stop 1",
    ];
    assert_eq!(log, [&["owner"], &round[..], &round[..]].concat());
}

#[test]
fn a_back_end_that_closes_is_noticed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = BackEnd::start(theirs.try_clone().unwrap(), 3);
    let attached = Fs::attach(Some(ours), "husk", 1).unwrap();
    let (memory, counts) = (shared_memory(), Arc::new(Counts::default()));
    attached.device.lock().unwrap().activate(activation(&memory, &counts)).unwrap();
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(attached.subscriber);
    assert_eq!(events.run_with_timeout(0).unwrap(), 0);
    theirs.shutdown(std::net::Shutdown::Both).unwrap();
    back_end.finish();
    events.run_with_timeout(1000).unwrap();
    assert_eq!(counts.needs_reset.load(SeqCst), 1);
    assert_eq!(events.run_with_timeout(0).unwrap(), 0);
}

#[test]
fn a_silent_back_end_costs_two_seconds_and_no_more() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let begun = Instant::now();
    assert!(Fs::attach(Some(ours), "husk", 1).is_err());
    assert!(begun.elapsed() < Duration::from_secs(4));
}

#[test]
fn the_event_loop_cuts_a_stop_that_is_not_answered() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = BackEnd::start(theirs, 3);
    let attached = Fs::attach(Some(ours), "husk", 1).unwrap();
    let (memory, counts) = (shared_memory(), Arc::new(Counts::default()));
    attached.device.lock().unwrap().activate(activation(&memory, &counts)).unwrap();
    let held = back_end.hold();
    let device = attached.device.clone();
    let begun = Instant::now();
    let vcpu = std::thread::spawn(move || device.lock().unwrap().reset());
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(attached.subscriber);
    while !vcpu.is_finished() && begun.elapsed() < Duration::from_secs(5) {
        events.run_with_timeout(100).unwrap();
    }
    vcpu.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4));
    drop(held);
    back_end.finish();
}

#[test]
fn refuses_what_the_back_end_or_the_device_can_not_do() {
    for (tag, queues) in [("", 1), ("x", 0), ("x", 255), ("0123456789012345678901234567890123456", 1)] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(Fs::attach(Some(ours), tag, queues).is_err());
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = BackEnd::start(theirs, 3);
    let error = Fs::attach(Some(ours), "husk", 3).err().unwrap();
    assert!(matches!(error, FsError::BackEnd(VhostUserError::Queues { has: 3, needs: 4 })));
    back_end.finish();
}

#[test]
fn memory_without_a_file_can_not_be_shared() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let back_end = BackEnd::start(theirs, 3);
    assert!(ours.as_raw_fd() >= 0);
    let attached = Fs::attach(Some(ours), "husk", 1).unwrap();
    let counts = Arc::new(Counts::default());
    let error = attached.device.lock().unwrap().activate(activation(&crate::testing::memory(), &counts)).unwrap_err();
    assert!(error.reason.contains("not backed by a file"));
    drop(attached);
    back_end.finish();
}
