//! The state machine under drivers that follow the rules, and drivers that don't.

use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::device::ActivateError;
use crate::testing::{Counts, Driver, memory};

struct Device {
    fails: bool,
    active: bool,
    activations: usize,
    sizes: Vec<u16>,
}

impl VirtioDevice for Device {
    fn name(&self) -> &'static str {
        "test"
    }
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.active);
        if self.fails {
            return Err(ActivateError { device: "test", reason: "asked to".into() });
        }
        self.active = true;
        self.activations += 1;
        self.sizes =
            activation.queues.iter().map(|queue| queue.as_ref().map_or(0, |(queue, _)| queue.size())).collect();
        Ok(())
    }
    fn positions(&self) -> Option<Vec<Position>> {
        Some(vec![Position { available: 7, used: 5 }; 2])
    }
    fn reset(&mut self) {
        self.active = false;
    }
}

fn setup() -> (Transport, Arc<Mutex<Device>>, Driver) {
    let memory = memory();
    let device = Arc::new(Mutex::new(Device { fails: false, active: false, activations: 0, sizes: Vec::new() }));
    let events = (0..2).map(|_| Arc::new(EventFd::new(0).unwrap())).collect();
    let driver = Driver::new(&memory, 0x10000, 16);
    (Transport::new(device.clone(), memory, events), device, driver)
}

fn status(transport: &mut Transport, value: u8) -> StatusChange {
    transport.set_status(value, || Arc::new(Counts::default()))
}

fn negotiate(transport: &mut Transport) {
    assert_eq!(status(transport, ACKNOWLEDGE), StatusChange::Accepted);
    assert_eq!(status(transport, ACKNOWLEDGE | DRIVER), StatusChange::Accepted);
    transport.driver_feature_select = 1;
    transport.set_driver_features(1);
    assert_eq!(status(transport, ACKNOWLEDGE | DRIVER | FEATURES_OK), StatusChange::Accepted);
}

fn set_up_queue(transport: &mut Transport, driver: &Driver) {
    transport.set_queue(QueueField::Descriptors(Half::Low, driver.descriptors() as u32));
    transport.set_queue(QueueField::Available(Half::Low, driver.available() as u32));
    transport.set_queue(QueueField::Used(Half::Low, driver.used_ring() as u32));
    transport.set_queue(QueueField::Enable(1));
}

const READY: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn a_driver_that_follows_the_rules_activates_the_device() {
    let (mut transport, device, driver) = setup();
    negotiate(&mut transport);
    transport.set_queue(QueueField::Size(8));
    set_up_queue(&mut transport, &driver);
    assert_eq!(status(&mut transport, READY), StatusChange::Activated);
    assert_eq!(transport.status(), READY);
    assert_eq!(device.lock().unwrap().sizes, [8, 0]);
    assert_eq!(status(&mut transport, 0), StatusChange::Reset);
    assert!(!device.lock().unwrap().active);
    assert_eq!(transport.queue().unwrap().size, 16);
    negotiate(&mut transport);
    set_up_queue(&mut transport, &driver);
    assert_eq!(status(&mut transport, READY), StatusChange::Activated);
    assert_eq!(device.lock().unwrap().activations, 2);
}

#[test]
fn status_bits_come_in_order_and_never_go() {
    let (mut transport, ..) = setup();
    for value in [DRIVER, FEATURES_OK, DRIVER_OK, ACKNOWLEDGE | FEATURES_OK, 0x10, ACKNOWLEDGE | 0x20] {
        assert_eq!(status(&mut transport, value), StatusChange::Refused, "{value:#x}");
        assert_eq!(transport.status(), 0);
    }
    status(&mut transport, ACKNOWLEDGE | DRIVER);
    assert_eq!(status(&mut transport, ACKNOWLEDGE), StatusChange::Refused);
    assert_eq!(transport.status(), ACKNOWLEDGE | DRIVER);
    assert_eq!(status(&mut transport, ACKNOWLEDGE | DRIVER | FAILED), StatusChange::Accepted);
    assert_eq!(transport.status(), ACKNOWLEDGE | DRIVER | FAILED);
}

#[test]
fn features_that_were_not_offered_or_no_version_1_are_refused() {
    for (word, bits) in [(1, 1 | 2), (0, 1), (1, 0)] {
        let (mut transport, ..) = setup();
        status(&mut transport, ACKNOWLEDGE | DRIVER);
        transport.driver_feature_select = word;
        transport.set_driver_features(bits);
        assert_eq!(status(&mut transport, ACKNOWLEDGE | DRIVER | FEATURES_OK), StatusChange::Refused);
        assert_eq!(transport.status(), ACKNOWLEDGE | DRIVER);
    }
}

#[test]
fn features_are_written_only_while_negotiating() {
    let (mut transport, ..) = setup();
    transport.set_driver_features(1);
    assert_eq!(transport.driver_features(), 0);
    negotiate(&mut transport);
    transport.driver_feature_select = 0;
    transport.set_driver_features(1);
    assert_eq!(transport.driver_features(), 0);
    transport.driver_feature_select = 2;
    transport.set_driver_features(1);
    assert_eq!((transport.driver_features(), transport.device_features()), (0, 1 | 1 << VIRTIO_RING_F_EVENT_IDX));
    transport.device_feature_select = u32::MAX;
    assert_eq!(transport.device_features(), 0);
}

#[test]
fn queues_are_frozen_when_enabled_and_when_the_driver_is_ready() {
    let (mut transport, _, driver) = setup();
    transport.set_queue(QueueField::Size(2));
    assert_eq!(transport.queue().unwrap().size, 16);
    negotiate(&mut transport);
    for size in [0, 3, 17, 32, u16::MAX] {
        transport.set_queue(QueueField::Size(size));
        assert_eq!(transport.queue().unwrap().size, 16);
    }
    set_up_queue(&mut transport, &driver);
    transport.set_queue(QueueField::Size(4));
    transport.set_queue(QueueField::Enable(0));
    transport.set_queue(QueueField::Used(Half::High, 1));
    let queue = transport.queue().unwrap();
    assert_eq!((queue.size, queue.enabled, queue.used), (16, true, driver.used_ring()));
    assert_eq!(status(&mut transport, READY), StatusChange::Activated);
    // CVE-2026-5747: the other queue was not enabled, and can't be touched any more either.
    transport.queue_select = 1;
    transport.set_queue(QueueField::Size(4));
    set_up_queue(&mut transport, &driver);
    let queue = transport.queue().unwrap();
    assert_eq!((queue.size, queue.enabled, queue.descriptors), (16, false, 0));
    transport.queue_select = 2;
    assert!(transport.queue().is_none());
    transport.set_queue(QueueField::Size(4));
}

#[test]
fn rings_outside_memory_or_unaligned_make_the_device_need_a_reset() {
    for field in [
        QueueField::Descriptors(Half::High, 1),
        QueueField::Available(Half::Low, (4 << 20) - 2),
        QueueField::Available(Half::Low, 0),
        QueueField::Used(Half::Low, 0x10001),
        QueueField::Descriptors(Half::Low, 8),
        QueueField::Used(Half::High, u32::MAX),
    ] {
        let (mut transport, device, driver) = setup();
        negotiate(&mut transport);
        transport.set_queue(QueueField::Descriptors(Half::Low, driver.descriptors() as u32));
        transport.set_queue(QueueField::Available(Half::Low, driver.available() as u32));
        transport.set_queue(QueueField::Used(Half::Low, driver.used_ring() as u32));
        transport.set_queue(field);
        transport.set_queue(QueueField::Enable(1));
        assert_eq!(status(&mut transport, READY), StatusChange::Failed, "{field:?}");
        assert_eq!(transport.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(device.lock().unwrap().activations, 0);
        // A reset, and only that, helps.
        assert_eq!(status(&mut transport, READY), StatusChange::Accepted);
        assert_eq!(status(&mut transport, 0), StatusChange::Reset);
        assert_eq!(transport.status(), 0);
    }
}

#[test]
fn a_device_that_fails_needs_a_reset() {
    let (mut transport, device, driver) = setup();
    device.lock().unwrap().fails = true;
    negotiate(&mut transport);
    set_up_queue(&mut transport, &driver);
    assert_eq!(status(&mut transport, READY), StatusChange::Failed);
    assert!(transport.needs_reset().load(SeqCst));
}
