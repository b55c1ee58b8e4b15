//! A driver that finds and starts the entropy device as Linux does, and one that pokes at random.

use husk_backend::entropy::Entropy;
use proptest::prelude::*;

use super::*;
use crate::rng::Rng;
use crate::testing::{Driver, FakeMachine, memory};

const BAR: u64 = 0xd000_0000;

fn setup() -> (VirtioPciFunction, Arc<FakeMachine>, Driver) {
    let memory = memory();
    let machine = Arc::new(FakeMachine::default());
    let attached = Rng::attach(Entropy).unwrap();
    let function = VirtioPciFunction::new(attached.device, machine.clone(), BAR, memory.clone()).unwrap();
    (function, machine, Driver::new(&memory, 0x10000, 64))
}

fn config<const N: usize>(function: &mut VirtioPciFunction, offset: u16) -> [u8; N] {
    let mut data = [0; N];
    function.config_read(offset, &mut data);
    data
}

fn read(function: &mut VirtioPciFunction, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    function.bar_read(offset, &mut data[..len]);
    u64::from_le_bytes(data)
}

fn write(function: &mut VirtioPciFunction, offset: u64, value: u64, len: usize) {
    function.bar_write(offset, &value.to_le_bytes()[..len]);
}

/// Capabilities: (id, offset).
fn capabilities(function: &mut VirtioPciFunction) -> Vec<(u8, u16)> {
    let mut list = Vec::new();
    let mut at = config::<1>(function, 0x34)[0];
    while at != 0 {
        assert!(list.len() < 10);
        let [id, next] = config(function, at.into());
        list.push((id, at.into()));
        at = next;
    }
    list
}

fn start(function: &mut VirtioPciFunction, driver: &Driver) {
    for status in [1, 3] {
        write(function, 20, status, 1);
    }
    write(function, 8, 1, 4);
    write(function, 12, 1, 4);
    write(function, 20, 11, 1);
    assert_eq!(read(function, 20, 1), 11);
    write(function, 16, 0, 2);
    write(function, 22, 0, 2);
    write(function, 26, 1, 2);
    assert_eq!(read(function, 26, 2), 1);
    write(function, 32, driver.descriptors(), 8);
    write(function, 40, driver.available(), 8);
    write(function, 48, driver.used_ring(), 4);
    write(function, 52, 0, 4);
    write(function, 28, 1, 2);
    write(function, 20, 15, 1);
}

#[test]
fn the_function_is_found() {
    let (mut function, machine, _) = setup();
    assert_eq!(config::<4>(&mut function, 0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(config::<2>(&mut function, 6)[0] & 0x10, 0x10);
    let list = capabilities(&mut function);
    assert_eq!(list.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [9, 9, 9, 9, 9, 0x11]);
    // cfg_type, and where: each lies within the BAR.
    let mut types = Vec::new();
    for (_, at) in &list[..5] {
        let capability: [u8; 16] = config(&mut function, *at);
        types.push(capability[3]);
        let offset = u32::from_le_bytes(capability[8..12].try_into().unwrap());
        let len = u32::from_le_bytes(capability[12..].try_into().unwrap());
        assert!(u64::from(offset) + u64::from(len) <= function.bar_len());
        assert_eq!(capability[4], 0);
    }
    assert_eq!(types, [1, 3, 4, 2, 5]);
    // Two vectors: one queue and the configuration.
    assert_eq!(config::<4>(&mut function, list[5].1)[2..], [1, 0]);
    assert_eq!(machine.notifications.lock().unwrap()[0].0, BAR + 0x3000);
}

#[test]
fn the_bar_tells_its_length() {
    let (mut function, ..) = setup();
    assert_eq!(u64::from_le_bytes(config(&mut function, 0x10)), BAR | 4);
    function.config_write(0x10, &[0xff; 4]);
    function.config_write(0x14, &[0xff; 4]);
    assert_eq!(u64::from_le_bytes(config(&mut function, 0x10)), !(function.bar_len() - 1) | 4);
    for offset in (0x18..0x28).step_by(4) {
        function.config_write(offset, &[0xff; 4]);
        assert_eq!(config::<4>(&mut function, offset), [0; 4]);
    }
}

#[test]
fn a_driver_starts_the_device_and_is_interrupted() {
    let (mut function, machine, driver) = setup();
    let msix = capabilities(&mut function)[5].1;
    function.config_write(msix + 2, &0x8000u16.to_le_bytes());
    for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x31), (12, 0)] {
        write(&mut function, layout::MSIX_TABLE + 16 + offset, value, 4);
    }
    start(&mut function, &driver);
    assert_eq!(read(&mut function, 20, 1), 15);
    let vectors = machine.vectors.lock().unwrap().clone();
    assert_eq!(*vectors[1].route.lock().unwrap(), Some((0xfee0_0000, 0x31)));
    function.shared.raise(1, ISR_QUEUE);
    assert_eq!(vectors[1].fired(), 1);
    assert_eq!(read(&mut function, layout::ISR, 1), 0);
    // Frozen.
    write(&mut function, 26, 0, 2);
    assert_eq!(read(&mut function, 26, 2), 1);
    write(&mut function, 24, 4, 2);
    assert_eq!(read(&mut function, 24, 2), 64);
    write(&mut function, 20, 0, 1);
    assert_eq!((read(&mut function, 20, 1), read(&mut function, 26, 2)), (0, NO_VECTOR.into()));
}

#[test]
fn a_failed_start_shows_and_interrupts() {
    let (mut function, _, driver) = setup();
    start(&mut function, &Driver::new(&driver.memory, 0x7fff_0000, 64));
    assert_eq!(read(&mut function, 20, 1), 15 | 0x40);
    assert_eq!(read(&mut function, 21, 1), 1);
    // MSI-X is off: the ISR status tells, once.
    assert_eq!(read(&mut function, layout::ISR, 1), 2);
    assert_eq!(read(&mut function, layout::ISR, 1), 0);
}

#[test]
fn unknown_vectors_are_none() {
    let (mut function, ..) = setup();
    for vector in [2, 0xfffe] {
        write(&mut function, 16, vector, 2);
        write(&mut function, 26, vector, 2);
        assert_eq!((read(&mut function, 16, 2), read(&mut function, 26, 2)), (0xffff, 0xffff));
    }
}

#[test]
fn a_notification_reaches_the_queue_by_bar_and_by_configuration_space() {
    let (mut function, ..) = setup();
    let event = function.transport.queue().unwrap().event.clone();
    write(&mut function, layout::NOTIFY, 0, 2);
    assert_eq!(event.read().unwrap(), 1);
    write(&mut function, layout::NOTIFY + 4, 0, 2);
    assert!(event.read().is_err());
    let window = capabilities(&mut function)[4].1;
    function.config_write(window + 8, &(layout::NOTIFY as u32).to_le_bytes());
    function.config_write(window + 12, &2u32.to_le_bytes());
    function.config_write(window + 16, &[0; 2]);
    assert_eq!(event.read().unwrap(), 1);
    function.config_write(window + 8, &18u32.to_le_bytes());
    assert_eq!(config::<4>(&mut function, window + 16), [1, 0, 0, 0]);
}

#[test]
fn a_saved_function_goes_on_in_another_machine() {
    let (mut function, _, driver) = setup();
    let msix = capabilities(&mut function)[5].1;
    function.config_write(4, &[6, 0]);
    function.config_write(msix + 2, &0x8000u16.to_le_bytes());
    for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x31), (12, 0)] {
        write(&mut function, layout::MSIX_TABLE + 16 + offset, value, 4);
    }
    start(&mut function, &driver);
    let state = function.saved().unwrap();

    let machine = Arc::new(FakeMachine::default());
    let attached = Rng::attach(Entropy).unwrap();
    let mut other = VirtioPciFunction::new(attached.device, machine.clone(), BAR, driver.memory.clone()).unwrap();
    other.replay(&state).unwrap();
    assert_eq!(other.saved().unwrap(), state);
    assert_eq!(config::<2>(&mut other, 4), [6, 0]);
    assert_eq!(read(&mut other, 20, 1), 15);
    let vectors = machine.vectors.lock().unwrap().clone();
    assert_eq!(*vectors[1].route.lock().unwrap(), Some((0xfee0_0000, 0x31)));
    // Looked at once, and raised once.
    assert_eq!(other.transport.queue().unwrap().event.read().unwrap(), 1);
    assert_eq!(vectors[1].fired(), 1);
}

#[test]
fn a_state_that_no_driver_could_make_is_refused() {
    let (mut function, _, driver) = setup();
    start(&mut function, &driver);
    let good = serde_json::to_value(function.saved().unwrap()).unwrap();
    let refused = |path: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        let state: FunctionState = serde_json::from_value(bad).unwrap();
        assert!(setup().0.replay(&state).is_err(), "{path}");
    };
    refused("/transport/device_type", 5.into());
    refused("/transport/queues", serde_json::json!([]));
    refused("/transport/features", 0.into());
    refused("/transport/features", u64::MAX.into());
    refused("/transport/status", 12.into());
    refused("/transport/status", 0xff.into());
    refused("/transport/queues/0/descriptors", 0x7fff_0000.into());
    refused("/transport/queues/0/used", u64::MAX.into());
    refused("/vectors", serde_json::json!([]));
    refused("/queue_vectors", serde_json::json!([1, 2, 3]));
    // Not refused, and harmless: what is not writable stays as it is.
    let mut odd = good.clone();
    odd["config"] = vec![0xff; 5000].into();
    setup().0.replay(&serde_json::from_value(odd).unwrap()).unwrap();
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics(
        accesses in proptest::collection::vec((any::<bool>(), any::<bool>(), 0u64..0x9000, 0usize..4, any::<u64>()), 0..400)
    ) {
        let (mut function, ..) = setup();
        for (bar, is_write, offset, len, value) in accesses {
            let len = 1 << len;
            // Half of the accesses go to the common configuration, where the state is.
            let offset = if value & 1 == 0 { offset % 64 } else { offset };
            let mut data = value.to_le_bytes();
            match (bar, is_write) {
                (true, true) => function.bar_write(offset, &data[..len]),
                (true, false) => function.bar_read(offset, &mut data[..len]),
                (false, true) => function.config_write(offset as u16, &data[..len]),
                (false, false) => function.config_read(offset as u16, &mut data[..len]),
            }
        }
    }
}
