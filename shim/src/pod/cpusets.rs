//! The host's CPUs and memory nodes that a pod's containers may use, as the kubelet's static policies name them. The guest's CPUs are
//! threads of the VMM, so that the pod's own cgroup is confined: to all sets together, once every container has one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::LinuxResources;

use crate::cgroup::{CgroupError, PodCgroup};

/// A container's CPUs and memory nodes, in the form of cpuset.cpus (cgroup-v2.rst, "Cpuset"); empty: any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuSet {
    /// CPUs.
    pub(crate) cpus: String,
    /// Memory nodes.
    pub(crate) mems: String,
}

impl CpuSet {
    /// What the limits say; nothing where they are silent.
    pub(crate) fn of(resources: Option<&LinuxResources>) -> Option<Self> {
        let cpu = resources?.cpu().as_ref()?;
        let set = Self { cpus: cpu.cpus().clone().unwrap_or_default(), mems: cpu.mems().clone().unwrap_or_default() };
        (set != Self::default()).then_some(set)
    }
}

/// The sets of all of a pod's containers.
#[derive(Debug, Default)]
pub(crate) struct CpuSets(Mutex<State>);

#[derive(Clone, Debug, Default)]
struct State {
    of: BTreeMap<String, CpuSet>,
    /// What the cgroup has.
    set: CpuSet,
}

impl CpuSets {
    /// Notes the set of container `id` and confines the cgroup anew, if that changes anything.
    pub(crate) fn put(&self, id: &str, set: CpuSet, cgroup: Option<&PodCgroup>) -> Result<(), CgroupError> {
        self.change(cgroup, |of| {
            of.insert(id.to_owned(), set);
        })
    }

    /// Forgets container `id`. The last one's set stays, for the next attempt of it.
    pub(crate) fn remove(&self, id: &str, cgroup: Option<&PodCgroup>) -> Result<(), CgroupError> {
        self.change(cgroup, |of| {
            of.remove(id);
        })
    }

    fn change(
        &self,
        cgroup: Option<&PodCgroup>,
        change: impl FnOnce(&mut BTreeMap<String, CpuSet>),
    ) -> Result<(), CgroupError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = state.clone();
        change(&mut next.of);
        if !next.of.is_empty() {
            next.set = union(&next.of);
        }
        if next.set != state.set
            && let Some(cgroup) = cgroup
        {
            cgroup.confine(&next.set.cpus, &next.set.mems)?;
        }
        *state = next;
        Ok(())
    }
}

fn union(of: &BTreeMap<String, CpuSet>) -> CpuSet {
    let join = |list: fn(&CpuSet) -> &str| {
        let lists: BTreeSet<&str> = of.values().map(list).collect();
        // One container that may use any makes it any.
        if lists.contains("") { String::new() } else { lists.into_iter().collect::<Vec<_>>().join(",") }
    };
    CpuSet { cpus: join(|set| &set.cpus), mems: join(|set| &set.mems) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_joined_when_all_containers_have_one() {
        let sets = CpuSets::default();
        let now = |sets: &CpuSets| sets.0.lock().unwrap().set.clone();
        let set = |cpus: &str| CpuSet { cpus: cpus.into(), mems: "0".into() };
        sets.put("a", set("2-3"), None).unwrap();
        assert_eq!(now(&sets), set("2-3"));
        sets.put("b", set("0-1,4"), None).unwrap();
        sets.put("c", set("2-3"), None).unwrap();
        assert_eq!(now(&sets), set("0-1,4,2-3"));
        sets.put("d", CpuSet::default(), None).unwrap();
        assert_eq!(now(&sets), CpuSet::default());
        for id in ["d", "b", "c"] {
            sets.remove(id, None).unwrap();
        }
        assert_eq!(now(&sets), set("2-3"));
        sets.remove("a", None).unwrap();
        assert_eq!(now(&sets), set("2-3"));
    }
}
