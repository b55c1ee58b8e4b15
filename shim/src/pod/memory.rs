//! The memory of the pod's machine. It boots small and grows when the guest says that it needs more, up to its ceiling; containerd's updates of
//! containers' limits move the ceiling. Whatever the guest says, the ceiling holds.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;
use tracing::{info, warn};

use super::machine::Machine;
use crate::error::{Error, chain};
use crate::peer::PeerError;
use crate::spec::size::{Host, Size};

const MIB: u64 = 1 << 20;

/// Memory is plugged in multiples of so many MiB (husk-vmm's own unit).
const UNIT_MIB: u64 = 2;

/// Least step by which a machine grows, in MiB; a larger machine doubles.
const STEP_MIB: u64 = 256;

/// The memory of a machine.
pub(crate) struct Memory {
    state: Mutex<State>,
    /// The guest has asked for more, and nobody has begun to see to it.
    asked: AtomicBool,
}

/// In MiB, but for the limits.
#[derive(Debug)]
struct State {
    size: Size,
    ceiling: u64,
    plugged: u64,
    /// The guest did not plug what it was given; it is not asked again before the ceiling moves.
    is_stuck: bool,
    /// The containers' memory limits in bytes.
    limits: HashMap<String, u64>,
}

impl Memory {
    /// Of a machine that has just booted.
    pub(crate) fn new(size: Size) -> Self {
        let state = State { size, ceiling: size.ceiling_mib, plugged: 0, is_stuck: false, limits: HashMap::new() };
        Self { state: Mutex::new(state), asked: AtomicBool::new(false) }
    }
}

impl State {
    /// What the machine has now.
    fn total(&self) -> u64 {
        self.size.memory_mib + self.plugged
    }

    /// Up to where it can grow by whole units.
    fn most(&self) -> u64 {
        let plugged = self.ceiling.saturating_sub(self.size.memory_mib).min(self.size.hotplug_mib);
        self.size.memory_mib + plugged / UNIT_MIB * UNIT_MIB
    }

    /// By how much it can still grow.
    fn growth(&self) -> u64 {
        if self.is_stuck { 0 } else { self.most().saturating_sub(self.total()) }
    }

    /// The size to grow to when the guest asks.
    fn next(&self) -> Option<u64> {
        let total = self.total();
        let next = (total * 2).max(total + STEP_MIB).min(self.most());
        (self.growth() > 0).then_some(next)
    }

    /// The size to grow to before a container starts. Huge pages are made of what memory there is when they are asked for. And a program that sizes
    /// itself by its limit (the Java and .NET virtual machines do) leaves the limit aside where the machine has less memory than that.
    fn at_start(&self, limit: i64, has_huge_pages: bool) -> Option<u64> {
        let limit = u64::try_from(limit).unwrap_or(0).div_ceil(MIB);
        let wanted = match (has_huge_pages, limit) {
            (true, _) => self.most(),
            (false, 0) => return None,
            (false, limit) => (limit + self.size.overhead_mib).next_multiple_of(UNIT_MIB).min(self.most()),
        };
        (self.growth() > 0 && wanted > self.total()).then_some(wanted)
    }

    /// The ceiling if container `id` has this limit (0 or less: none). A ceiling made of the limits moves with them; another one only has to
    /// have room for the largest.
    fn ceiling_with(&self, id: &str, limit: i64) -> u64 {
        let Some(limit) = u64::try_from(limit).ok().filter(|&limit| limit > 0) else { return self.ceiling };
        match self.limits.get(id) {
            Some(before) if self.size.follows_limits => {
                (self.ceiling + limit.div_ceil(MIB)).saturating_sub(before.div_ceil(MIB))
            }
            _ => self.ceiling.max(limit.div_ceil(MIB) + self.size.overhead_mib),
        }
    }

    fn note(&mut self, id: &str, limit: i64) {
        match u64::try_from(limit) {
            Ok(limit) if limit > 0 => drop(self.limits.insert(id.to_owned(), limit)),
            _ => drop(self.limits.remove(id)),
        }
    }
}

impl Machine {
    /// The guest asks for memory. It may ask as often as it likes: at most one request is worked on and one waits.
    pub(super) fn memory_wanted(self: &Arc<Self>) {
        if self.memory.asked.swap(true, Ordering::AcqRel) {
            return;
        }
        let machine = Arc::clone(self);
        tokio::spawn(async move {
            let mut state = machine.memory.state.lock().await;
            // Before the guest is told of what it got: from then on it may ask again.
            machine.memory.asked.store(false, Ordering::Release);
            if let Some(next) = state.next() {
                machine.resize_memory(&mut state, next).await;
                machine.tell_growth(&state).await;
            }
        });
    }

    /// Notes a new container's memory limit, and grows for what it must find when it starts.
    pub(super) async fn make_room(&self, id: &str, limit: i64, has_huge_pages: bool) {
        let mut state = self.memory.state.lock().await;
        state.note(id, limit);
        if let Some(wanted) = state.at_start(limit, has_huge_pages) {
            self.resize_memory(&mut state, wanted).await;
            self.tell_growth(&state).await;
        }
    }

    /// Forgets a container's memory limit.
    pub(super) async fn forget_limit(&self, id: &str) {
        self.memory.state.lock().await.limits.remove(id);
    }

    /// Moves the ceiling as container `id`'s new limit wants it, with `set` in between, which sets the limit in the guest. Where that fails
    /// everything stays as it was.
    pub(super) async fn with_limit(
        self: &Arc<Self>,
        id: &str,
        limit: i64,
        host: Host,
        set: impl Future<Output = Result<(), PeerError>>,
    ) -> Result<(), Error> {
        let mut state = self.memory.state.lock().await;
        let (before, after) = (state.ceiling, state.ceiling_with(id, limit));
        let most = host.memory_mib.min(state.size.memory_mib + state.size.hotplug_mib);
        if after > before && after > most {
            return Err(Error::BeyondHost { limit, wanted_mib: after, has_mib: most });
        }
        if after > before {
            (state.ceiling, state.is_stuck) = (after, false);
            self.tell_growth(&state).await;
        }
        if let Err(error) = set.await {
            if after > before {
                state.ceiling = before;
                self.tell_growth(&state).await;
            }
            return Err(error.into());
        }
        state.note(id, limit);
        state.ceiling = after;
        if after != before {
            info!("the pod's memory can grow to {after} MiB (before: {before} MiB)");
        }
        if state.total() > state.most() {
            let machine = Arc::clone(self);
            // The guest may take its time to make room.
            tokio::spawn(async move { machine.shrink().await });
        }
        Ok(())
    }

    /// Takes memory beyond the ceiling back, as far as the guest can do without it.
    async fn shrink(&self) {
        let mut state = self.memory.state.lock().await;
        let most = state.most();
        if state.total() > most {
            self.resize_memory(&mut state, most).await;
            self.tell_growth(&state).await;
        }
    }

    /// Has the guest plug or unplug memory until the machine has `wanted` MiB.
    async fn resize_memory(&self, state: &mut State, wanted: u64) {
        let before = state.total();
        let held = self.held.read().await;
        let Some(vmm) = held.vmm.as_ref().filter(|_| self.cause().is_none()) else { return };
        let resized = vmm.resize_memory(wanted - state.size.memory_mib).await;
        if self.cause().is_some() {
            return;
        }
        match resized {
            Ok(plugged) => state.plugged = plugged,
            Err(error) => warn!("{}", chain(&error)),
        }
        let now = state.total();
        state.is_stuck = wanted > before && now <= before;
        if now == wanted {
            info!("memory resized from_mib={before} to_mib={now}");
        } else {
            warn!("the guest has {now} MiB of memory where it was to have {wanted} MiB (before: {before} MiB)");
        }
    }

    /// Tells the agent by how much the machine can still grow.
    async fn tell_growth(&self, state: &State) {
        match self.agent.memory_changed(state.growth(), state.plugged).await {
            Err(error) if self.cause().is_none() => warn!("{}", chain(&error)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(memory_mib: u64, ceiling_mib: u64, follows_limits: bool) -> State {
        let size = Size { vcpus: 1, memory_mib, hotplug_mib: 4096, ceiling_mib, follows_limits, overhead_mib: 64 };
        Memory::new(size).state.into_inner()
    }

    #[test]
    fn grows_in_steps_to_its_ceiling_and_no_further() {
        let mut state = state(256, 2049, false);
        let mut sizes = Vec::new();
        while let Some(next) = state.next() {
            sizes.push(next);
            state.plugged = next - 256;
            assert!(sizes.len() < 10);
        }
        assert_eq!((sizes, state.growth()), (vec![512, 1024, 2048], 0));
        state.ceiling = 100_000;
        assert_eq!(state.most(), 256 + 4096);
        state.is_stuck = true;
        assert_eq!((state.next(), state.growth()), (None, 0));
    }

    #[test]
    fn a_container_finds_what_its_limit_names() {
        let mut state = state(256, 2048, false);
        assert_eq!(
            (state.at_start(0, false), state.at_start(-1, false), state.at_start(128 << 20, false)),
            (None, None, None)
        );
        assert_eq!((state.at_start(511 << 20, false), state.at_start(i64::MAX, false)), (Some(576), Some(2048)));
        assert_eq!(state.at_start(0, true), Some(2048));
        state.plugged = 320;
        assert_eq!(state.at_start(511 << 20, false), None);
        state.is_stuck = true;
        assert_eq!(state.at_start(0, true), None);
    }

    #[test]
    fn a_small_machine_does_not_grow() {
        let mut state = state(192, 192, true);
        assert_eq!(state.next(), None);
        state.ceiling = 300;
        assert_eq!(state.next(), Some(300));
        state.ceiling = 10;
        assert_eq!((state.next(), state.most()), (None, 192));
    }

    #[test]
    fn the_ceiling_moves_with_the_limits_it_is_made_of() {
        let mut state = state(256, 364, true);
        state.note("a", 200 << 20);
        state.note("b", 100 << 20);
        assert_eq!(state.ceiling_with("a", 600 << 20), 764);
        assert_eq!(state.ceiling_with("a", 50 << 20), 214);
        assert_eq!(state.ceiling_with("a", -1), 364);
        // One without a limit before.
        assert_eq!(state.ceiling_with("c", 100 << 20), 364);
        assert_eq!(state.ceiling_with("c", 400 << 20), 464);
        state.note("b", -1);
        assert_eq!(state.ceiling_with("b", 100 << 20), 364);
        assert!(state.ceiling_with("a", i64::MAX) > 1 << 40);
    }

    #[test]
    fn another_ceiling_moves_only_where_it_must() {
        let mut state = state(256, 2048, false);
        state.note("a", 64 << 20);
        assert_eq!(state.ceiling_with("a", 32 << 20), 2048);
        assert_eq!(state.ceiling_with("a", 2000 << 20), 2064);
        assert_eq!(state.ceiling_with("a", 3000 << 20), 3064);
    }
}
