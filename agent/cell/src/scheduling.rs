//! A process's place with the kernel's schedulers: its CPU policy (sched_setattr(2)) and its I/O priority (ioprio_set(2)).

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler,
};

use crate::{
    fault::{Doing, Fault, Step},
    sys,
};

/// Levels of an I/O priority class (linux/ioprio.h, IOPRIO_NR_LEVELS).
const IO_LEVELS: i64 = 8;

/// Sets what the spec asks for on the calling process. Needs CAP_SYS_NICE for most of it.
pub(crate) fn apply(process: &Process) -> Step<()> {
    if let Some(priority) = process.io_priority() {
        sys::set_io_priority(io_priority(priority)?).doing(|| "set the I/O priority")?;
    }
    if let Some(scheduler) = process.scheduler() {
        sys::set_scheduler(&attributes(scheduler)).doing(|| format!("set the scheduler {}", scheduler.policy()))?;
    }
    Ok(())
}

/// linux/ioprio.h: IOPRIO_PRIO_VALUE.
fn io_priority(priority: &LinuxIOPriority) -> Step<libc::c_int> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match libc::c_int::try_from(priority.priority()) {
        Ok(level) if (0..IO_LEVELS).contains(&priority.priority()) => Ok(class << 13 | level),
        _ => Err(Fault::new(format!("I/O priority {} is not one of 0 to 7", priority.priority()))),
    }
}

fn attributes(scheduler: &Scheduler) -> libc::sched_attr {
    // linux/sched.h
    const SCHED_ISO: u32 = 4;
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER as u32,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO as u32,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR as u32,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH as u32,
        LinuxSchedulerPolicy::SchedIso => SCHED_ISO,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE as u32,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE as u32,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => libc::SCHED_FLAG_RESET_ON_FORK,
        LinuxSchedulerFlag::SchedFlagReclaim => libc::SCHED_FLAG_RECLAIM,
        LinuxSchedulerFlag::SchedFlagDLOverrun => libc::SCHED_FLAG_DL_OVERRUN,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => libc::SCHED_FLAG_KEEP_POLICY,
        LinuxSchedulerFlag::SchedFlagKeepParams => libc::SCHED_FLAG_KEEP_PARAMS,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => libc::SCHED_FLAG_UTIL_CLAMP_MIN,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => libc::SCHED_FLAG_UTIL_CLAMP_MAX,
    };
    libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: policy,
        sched_flags: scheduler.flags().iter().flatten().fold(0, |all, one| all | flag(one) as u64),
        sched_nice: scheduler.nice().unwrap_or(0),
        // A negative one is the kernel's to refuse.
        sched_priority: scheduler.priority().unwrap_or(0) as u32,
        sched_runtime: scheduler.runtime().unwrap_or(0),
        sched_deadline: scheduler.deadline().unwrap_or(0),
        sched_period: scheduler.period().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_priorities() {
        let of = |json: &str| io_priority(&serde_json::from_str(json).unwrap());
        assert_eq!(of(r#"{"class":"IOPRIO_CLASS_RT","priority":7}"#).unwrap(), 0x2007);
        assert_eq!(of(r#"{"class":"IOPRIO_CLASS_IDLE"}"#).unwrap(), 0x6000);
        for level in ["8", "-1", "9223372036854775807"] {
            assert!(of(&format!(r#"{{"class":"IOPRIO_CLASS_BE","priority":{level}}}"#)).is_err(), "{level}");
        }
    }

    #[test]
    fn policies() {
        let scheduler: Scheduler =
            serde_json::from_str(r#"{"policy":"SCHED_RR","priority":5,"flags":["SCHED_RESET_ON_FORK"]}"#).unwrap();
        let found = attributes(&scheduler);
        assert_eq!((found.sched_policy, found.sched_priority, found.sched_flags), (2, 5, 1));
    }
}
