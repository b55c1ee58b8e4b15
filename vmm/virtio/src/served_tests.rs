//! Whole devices: driven by a guest through the PCI function, served by the event loop.

use std::io::Read;
use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use husk_backend::entropy::Entropy;
use husk_backend::sink::Sink;

use super::*;
use crate::VirtioPciFunction;
use crate::device::GuestMemory;
use crate::interrupt::PciFunction;
use crate::testing::{Driver, FakeMachine, FakeVector, WRITE, blocks, memory, memory_in_files};

struct World {
    function: VirtioPciFunction,
    events: EventManager<Subscriber>,
    machine: Arc<FakeMachine>,
    queues: Vec<Driver>,
}

impl World {
    fn new(attached: Attached, queues: usize) -> Self {
        Self::with_memory(attached, queues, memory())
    }

    fn with_memory(attached: Attached, queues: usize, memory: Arc<GuestMemory>) -> Self {
        let machine = Arc::new(FakeMachine::default());
        let function = VirtioPciFunction::new(attached.device, machine.clone(), 0xd000_0000, memory.clone()).unwrap();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(attached.subscriber);
        let queues = (0..queues).map(|index| Driver::new(&memory, 0x10000 * (index as u64 + 1), 64)).collect();
        let mut world = Self { function, events, machine, queues };
        // MSI-X on, every vector open.
        world.function.config_write(0x98 + 2, &0x8000u16.to_le_bytes());
        for vector in 0..=world.queues.len() as u64 {
            world.function.bar_write(0x4000 + 16 * vector + 12, &[0; 4]);
        }
        world
    }

    fn write(&mut self, offset: u64, value: u64, len: usize) {
        self.function.bar_write(offset, &value.to_le_bytes()[..len]);
    }

    fn status(&mut self) -> u8 {
        let mut status = [0];
        self.function.bar_read(20, &mut status);
        status[0]
    }

    fn start(&mut self) {
        for (offset, value, len) in [(20, 1, 1), (20, 3, 1), (8, 1, 4), (12, 1, 4), (20, 11, 1)] {
            self.write(offset, value, len);
        }
        for index in 0..self.queues.len() {
            let (descriptors, available, used) =
                (self.queues[index].descriptors(), self.queues[index].available(), self.queues[index].used_ring());
            self.write(22, index as u64, 2);
            self.write(26, index as u64 + 1, 2);
            self.write(24, 64, 2);
            self.write(32, descriptors, 8);
            self.write(40, available, 8);
            self.write(48, used, 8);
            self.write(28, 1, 2);
        }
        self.write(20, 15, 1);
    }

    fn kick(&mut self, queue: u64) {
        self.write(0x3000 + 4 * queue, 0, 2);
    }

    fn run(&mut self) {
        while self.events.run_with_timeout(0).unwrap() > 0 {}
    }

    fn vector(&self, index: usize) -> Arc<FakeVector> {
        self.machine.vectors.lock().unwrap()[index].clone()
    }
}

fn rng() -> World {
    World::new(crate::rng::Rng::attach(Entropy).unwrap(), 1)
}

#[test]
fn entropy_comes_bounded_and_with_an_interrupt() {
    let mut world = rng();
    world.start();
    world.run();
    world.queues[0].add(&[(0x100000, 32, WRITE)]);
    world.queues[0].add(&[(0x200000, 100_000, WRITE)]);
    world.queues[0].add(&[(0x100000, 8, 0)]);
    world.kick(0);
    world.run();
    assert_eq!(world.queues[0].used().unwrap().1, 32);
    assert_eq!(world.queues[0].used().unwrap().1, 64 << 10);
    assert_eq!(world.queues[0].used().unwrap().1, 0);
    assert!(world.queues[0].read(0x100000, 32).iter().any(|byte| *byte != 0));
    assert_eq!(world.vector(1).fired(), 1);
}

#[test]
fn a_kick_before_the_loop_saw_the_start_is_not_lost() {
    let mut world = rng();
    world.start();
    world.queues[0].add(&[(0x100000, 32, WRITE)]);
    world.run();
    assert_eq!(world.queues[0].used().unwrap().1, 32);
}

#[test]
fn more_requests_than_a_budget_are_all_served() {
    let mut world = rng();
    world.start();
    world.run();
    for _ in 0..60 {
        world.queues[0].add(&[(0x100000, 32, WRITE)]);
    }
    world.kick(0);
    world.run();
    assert_eq!(std::iter::from_fn(|| world.queues[0].used()).count(), 60);
}

#[test]
fn a_broken_ring_needs_a_reset_and_a_reset_helps() {
    let mut world = rng();
    // The configuration's vector tells of it.
    world.start();
    world.write(16, 0, 2);
    world.run();
    world.queues[0].set_available(1000);
    world.kick(0);
    world.run();
    assert_eq!(world.status(), 15 | 0x40);
    assert_eq!(world.vector(0).fired(), 1);
    world.write(20, 0, 1);
    assert_eq!(world.status(), 0);
    let memory = world.queues[0].memory.clone();
    world.queues[0] = Driver::new(&memory, 0x20000, 64);
    world.start();
    world.queues[0].add(&[(0x100000, 32, WRITE)]);
    world.run();
    assert_eq!(world.queues[0].used().unwrap().1, 32);
    assert_eq!(world.status(), 15);
}

#[test]
fn after_a_reset_nothing_touches_memory() {
    let mut world = rng();
    world.start();
    world.run();
    world.queues[0].add(&[(0x100000, 32, WRITE)]);
    world.write(20, 0, 1);
    world.kick(0);
    world.run();
    assert!(world.queues[0].used().is_none());
}

#[test]
fn a_device_without_all_its_queues_does_not_start() {
    let (_read, write) = std::io::pipe().unwrap();
    let mut world = World::new(crate::console::Console::attach(Sink::new(write.into()).unwrap()).unwrap(), 1);
    world.start();
    assert_eq!(world.status(), 15 | 0x40);
}

#[test]
fn what_the_console_prints_arrives() {
    let (mut read, write) = std::io::pipe().unwrap();
    let mut world = World::new(crate::console::Console::attach(Sink::new(write.into()).unwrap()).unwrap(), 2);
    world.start();
    world.queues[1].write(0x100000, b"hello world\n");
    world.queues[1].add(&[(0x100000, 6, 0), (0x100006, 6, 0)]);
    world.kick(1);
    world.run();
    assert_eq!(world.queues[1].used().unwrap().1, 0);
    assert_eq!(world.vector(2).fired(), 1);
    let mut got = [0; 12];
    read.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello world\n");
}

#[test]
fn pages_reported_free_go_back_before_the_report_is_answered() {
    let memory = memory_in_files(&[(0, 4 << 20), (16 << 20, 4 << 20)]);
    let mut world = World::with_memory(crate::balloon::Balloon::attach().unwrap(), 3, memory.clone());
    world.start();
    // Once, so that the rings' own pages are there.
    world.queues[2].add(&[(0, 4096, WRITE)]);
    world.kick(2);
    world.run();
    assert!(world.queues[2].used().is_some());
    let driver = &mut world.queues[2];
    driver.write(0x100000, &[1; 3 << 20]);
    driver.write(16 << 20, &[1; 4 << 20]);
    let before = blocks(&memory);
    driver.add(&[(0x200000, 1 << 20, WRITE), (17 << 20, 2 << 20, WRITE)]);
    // The end of a region, and one that a driver may only read from: that is no report.
    driver.add(&[(19 << 20, 1 << 20, WRITE)]);
    driver.add(&[(0x100000, 4096, 0)]);
    world.kick(2);
    world.run();
    assert_eq!(blocks(&memory), [before[0] - (1 << 20), before[1] - (3 << 20)]);
    assert_eq!(std::iter::from_fn(|| world.queues[2].used()).count(), 3);
    assert_eq!(world.queues[2].read(0x100000, 1), [1]);
    // Beyond guest memory: the driver broke its queue.
    world.queues[2].add(&[(19 << 20, 2 << 20, WRITE)]);
    world.kick(2);
    world.run();
    assert_eq!(world.status(), 15 | 0x40);
}
