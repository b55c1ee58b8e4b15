//! A container's limits as the guest sets them: without the numbers of the host's CPUs, memory nodes and devices.

use oci_spec::runtime::{LinuxBlockIo, LinuxResources};

use super::SpecError;
use super::block;
use super::size::Size;
use crate::error::Error;

/// The kernel's default CPU period, µs.
const DEFAULT_PERIOD: u64 = 100_000;

/// The limits that mean something in the guest. CPU and memory node sets are the host's: the pod's own cgroup has them there.
pub(crate) fn guest_resources(mut resources: LinuxResources) -> Result<LinuxResources, SpecError> {
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None).set_mems(None).set_realtime_period(None).set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(io) = resources.block_io() {
        refuse_devices(io)?;
    }
    block::drop_rules(&mut resources);
    resources.set_network(None).set_rdma(None);
    Ok(resources)
}

/// Whether a running machine's CPUs can follow new limits: one that they cannot, though the host's could, is refused.
pub(crate) fn fit(resources: &LinuxResources, size: Size, host_cpus: u64) -> Result<(), Error> {
    let cpu = resources.cpu().as_ref();
    let quota = u64::try_from(cpu.and_then(|cpu| cpu.quota()).unwrap_or(0)).unwrap_or(0);
    let period = cpu.and_then(|cpu| cpu.period()).filter(|&period| period > 0).unwrap_or(DEFAULT_PERIOD);
    let (cpus, vcpus) = (quota.div_ceil(period), u64::from(size.vcpus));
    if cpus > vcpus && host_cpus > vcpus {
        let (wanted, has) = (format!("{cpus} CPUs"), format!("{vcpus}"));
        return Err(Error::Beyond { wanted, has });
    }
    Ok(())
}

/// The memory limit in bytes; 0: it is not named, less: there is none.
pub(crate) fn memory_limit(resources: Option<&LinuxResources>) -> i64 {
    resources.and_then(|resources| resources.memory().as_ref()).and_then(|memory| memory.limit()).unwrap_or(0)
}

/// A limit on a device of the host's, which the container reaches only as files; its share of all devices ("weight") is the guest's.
fn refuse_devices(io: &LinuxBlockIo) -> Result<(), SpecError> {
    let throttled = [
        io.throttle_read_bps_device(),
        io.throttle_write_bps_device(),
        io.throttle_read_iops_device(),
        io.throttle_write_iops_device(),
    ];
    let throttled = throttled.into_iter().flatten().flatten().map(|device| (device.major(), device.minor()));
    let weighed = io.weight_device().iter().flatten().map(|device| (device.major(), device.minor()));
    match throttled.chain(weighed).next() {
        Some((major, minor)) => Err(SpecError::BlockIo { major, minor }),
        None => Ok(()),
    }
}
