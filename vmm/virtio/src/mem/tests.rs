//! The account against a model, hostile requests, and the whole device with a driver.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use event_manager::EventSet;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::blocks::Blocks;
use super::device::Mem;
use super::wire::{REQUEST_LEN, RESPONSE_LEN, Range, Request, Response, State};
use super::*;
use crate::device::GuestMemory;
use crate::interrupt::Interrupt;
use crate::queue::VirtQueue;
use crate::served::Model;
use crate::testing::{Counts, Driver, WRITE, blocks, memory_in_files};

const START: u64 = 1 << 32;
const LEN: u64 = 32 * BLOCK;

fn range(first: u64, blocks: u16) -> Range {
    Range { address: START + first * BLOCK, blocks }
}

fn kept(_: u64, _: u64) -> io::Result<()> {
    Ok(())
}

#[test]
fn no_more_than_asked_for_and_only_within_what_is_usable() {
    let mut all = Blocks::new(START..START + LEN);
    assert_eq!(all.plug(range(0, 1)), Response::Error);
    all.request(4 * BLOCK, 8 * BLOCK);
    assert_eq!(all.plug(range(0, 5)), Response::Nack);
    assert_eq!(all.plug(range(7, 2)), Response::Error);
    assert_eq!(all.plug(range(4, 3)), Response::Ack);
    assert_eq!(all.plug(range(4, 1)), Response::Error);
    assert_eq!(all.plug(range(0, 2)), Response::Nack);
    assert_eq!(all.state(range(3, 2)), Response::State(State::Mixed));
    assert_eq!(all.state(range(4, 3)), Response::State(State::Plugged));
    assert_eq!(all.unplug(range(3, 2), kept), Response::Error);
    assert_eq!(all.unplug(range(5, 1), |_, _| Err(io::Error::other("no"))), Response::Busy);
    assert_eq!((all.plugged(), all.state(range(5, 1))), (3 * BLOCK, Response::State(State::Plugged)));
    assert_eq!(all.unplug(range(5, 1), kept), Response::Ack);
    // Less is asked for than is plugged: nothing more comes, what is usable stays so.
    all.request(0, 0);
    assert_eq!((all.plug(range(0, 1)), all.usable(), all.plugged()), (Response::Nack, 8 * BLOCK, 2 * BLOCK));
    assert_eq!(all.unplug_all(kept), Response::Ack);
    assert_eq!((all.plugged(), all.state(range(0, 8))), (0, Response::State(State::Unplugged)));
    // No host can ask for more than there is.
    all.request(u64::MAX, u64::MAX);
    assert_eq!((all.usable(), all.config().requested_size), (LEN, LEN));
}

fn any_request() -> impl Strategy<Value = [u8; REQUEST_LEN]> {
    let near = (0u16..5, -2i64..36, 0u64..3, 0u16..40).prop_map(|(kind, block, odd, blocks)| {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        let address = START.wrapping_add_signed(block * BLOCK as i64) + u64::from(odd == 1) * 4096;
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        bytes
    });
    prop_oneof![8 => near, 1 => any::<[u8; REQUEST_LEN]>()]
}

proptest! {
    /// Whatever is asked: nothing outside is touched, no more than asked for is plugged, what is counted is what is plugged.
    #[test]
    fn hostile_requests_stay_within_bounds(steps in proptest::collection::vec((any_request(), 0u64..40, 0u64..40), 1..60)) {
        let mut all = Blocks::new(START..START + LEN);
        let (mut model, mut requested) = (vec![false; 32], 0);
        for (bytes, wants, usable) in steps {
            if wants < 8 {
                all.request(wants * BLOCK, usable * BLOCK);
                requested = all.config().requested_size / BLOCK;
            }
            let before = all.plugged() / BLOCK;
            let discarded = RefCell::new(Vec::new());
            let discard = |address, len| {
                discarded.borrow_mut().push((address, len));
                Ok(())
            };
            let request = Request::parse(&bytes);
            let response = match request {
                Request::Plug(range) => all.plug(range),
                Request::Unplug(range) => all.unplug(range, discard),
                Request::UnplugAll => all.unplug_all(discard),
                Request::State(range) => all.state(range),
                Request::Unknown => Response::Error,
            };
            for (address, len) in discarded.into_inner() {
                prop_assert!(address >= START && address + len <= START + all.usable());
            }
            if response == Response::Ack {
                match request {
                    Request::Plug(range) | Request::Unplug(range) => {
                        let first = ((range.address - START) / BLOCK) as usize;
                        let plugs = matches!(request, Request::Plug(_));
                        for block in &mut model[first..first + usize::from(range.blocks)] {
                            prop_assert!(*block != plugs);
                            *block = plugs;
                        }
                    }
                    _ => model.fill(false),
                }
            }
            let count = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(count, all.plugged() / BLOCK);
            prop_assert!(count <= requested || count <= before);
        }
    }

    #[test]
    fn any_bytes_are_a_request_and_any_response_fits(bytes in any::<[u8; REQUEST_LEN]>()) {
        let kind = u16::from_le_bytes([bytes[0], bytes[1]]);
        prop_assert_eq!(Request::parse(&bytes) == Request::Unknown, kind > 3);
    }
}

struct World {
    device: Mem,
    queue: VirtQueue,
    driver: Driver,
    memory: Arc<GuestMemory>,
    counts: Arc<Counts>,
    told: Arc<Mutex<Vec<u64>>>,
    resizer: Resizer,
}

impl World {
    fn new() -> Self {
        let memory = memory_in_files(&[(0, 1 << 20), (START, LEN as usize)]);
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = told.clone();
        let (mut device, resizer) =
            Mem::new(START..START + LEN, move |bytes| tell.lock().unwrap().push(bytes)).unwrap();
        let driver = Driver::new(&memory, 0x10000, 16);
        let counts = Arc::new(Counts::default());
        let interrupt: Arc<dyn Interrupt> = counts.clone();
        assert!(device.start(0, &interrupt).is_err());
        device.start(device.features(), &interrupt).unwrap();
        let queue = VirtQueue::new(0, driver.queue(true), memory.clone(), counts.clone());
        Self { device, queue, driver, memory, counts, told, resizer }
    }

    fn resize(&mut self, blocks: u64) {
        self.resizer.ask(blocks * BLOCK, blocks * BLOCK);
        self.device.host_event(EventSet::IN);
    }

    /// Type and state of the response.
    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> (u16, u16) {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&(START + first * BLOCK).to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.driver.write(0x1000, &bytes);
        self.driver.write(0x2000, &[0xff; RESPONSE_LEN]);
        self.driver.add(&[(0x1000, REQUEST_LEN as u32, 0), (0x2000, RESPONSE_LEN as u32, WRITE)]);
        self.serve();
        assert_eq!(self.driver.used().unwrap().1, RESPONSE_LEN as u32);
        let bytes = self.driver.read(0x2000, RESPONSE_LEN);
        assert_eq!(bytes[2..8], [0; 6]);
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[8], bytes[9]]))
    }

    fn serve(&mut self) {
        assert!(!self.device.serve(std::slice::from_mut(&mut self.queue)).unwrap());
    }

    fn config(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.device.config()[at..at + 8].try_into().unwrap())
    }
}

#[test]
fn a_driver_plugs_what_it_is_asked_for_and_gives_it_back() {
    let mut world = World::new();
    assert!(world.device.is_quiet());
    assert_eq!([0, 8, 16, 24, 32, 40, 48].map(|at| world.config(at)), [BLOCK, 0, START, LEN, 0, 0, 0]);
    assert_eq!(world.ask(0, 0, 1), (3, 0));
    world.resize(8);
    assert_eq!(world.counts.config.load(Ordering::SeqCst), 1);
    assert!(!world.device.is_quiet());
    assert_eq!(world.ask(0, 0, 8), (0, 0));
    assert_eq!([32, 40, 48].map(|at| world.config(at)), [8 * BLOCK; 3]);
    assert_eq!((world.ask(3, 0, 8), world.ask(3, 7, 1), world.ask(3, 7, 2)), ((0, 0), (0, 0), (3, 0)));
    world.memory.write_slice(&[1; 4 << 20], GuestAddress(START)).unwrap();
    world.resize(7);
    assert_eq!(world.ask(1, 1, 1), (0, 0));
    assert_eq!((world.ask(3, 0, 2), world.ask(3, 1, 1)), ((0, 2), (0, 1)));
    // What was unplugged is the host's again, what was not is as it was.
    assert_eq!(blocks(&world.memory)[1], 2 << 20);
    assert_eq!(world.ask(2, 0, 0), (0, 0));
    assert_eq!(blocks(&world.memory)[1], 0);
    assert_eq!(*world.told.lock().unwrap(), [8 * BLOCK, 7 * BLOCK, 0]);
    assert_eq!(world.config(40), 0);
    // Another driver finds what the first one left.
    world.device.stop();
    world.resize(3);
    assert_eq!(world.counts.config.load(Ordering::SeqCst), 2);
}

#[test]
fn requests_without_a_question_or_room_for_the_answer_do_no_harm() {
    let mut world = World::new();
    world.resize(8);
    world.driver.add(&[(0x1000, 10, 0), (0x2000, RESPONSE_LEN as u32, WRITE)]);
    world.driver.add(&[(0x1000, REQUEST_LEN as u32, 0)]);
    world.serve();
    assert_eq!(world.driver.used().unwrap().1, RESPONSE_LEN as u32);
    assert_eq!(world.driver.read(0x2000, 1), [3]);
    assert_eq!(world.driver.used().unwrap().1, 0);
    for kind in 4..10 {
        assert_eq!(world.ask(kind, 0, 1), (3, 0));
    }
}
