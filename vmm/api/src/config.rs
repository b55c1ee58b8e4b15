//! The VM's configuration: JSON on a descriptor that the shim hands over (`husk-vmm --config-fd N`). Every other resource is a
//! descriptor too, inherited at start and named here by its number; the VMM opens nothing by path afterwards.

use serde::{Deserialize, Serialize};

/// Number of an inherited descriptor.
pub type Fd = i32;

/// One VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The pod's id, on every line of the log.
    pub id: String,
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 64.
    pub memory_mib: u64,
    /// Memory in MiB that can be plugged in while the machine runs (virtio-mem), a multiple of 128; none of it is at the start.
    #[serde(default)]
    pub hotplug_mib: u64,
    /// What it begins from.
    pub start: Start,
    /// Where it is saved to when the shim says so; then no device may have a back end but console and vsock.
    #[serde(default)]
    pub save: Option<Snapshot>,
    /// /dev/kvm, open for reading and writing.
    pub kvm: Fd,
    /// Connected stream socket on which the control API is served.
    pub control: Fd,
    /// Connected seqpacket socket on which vsock connections are handed over, see [`crate::dial`].
    pub dial: Fd,
    /// Connected seqpacket socket on which disks' files are handed over, see [`crate::disk`]; none in VMs that get no disks.
    #[serde(default)]
    pub disks: Option<Fd>,
    /// Where the guest's console goes (write end of a pipe; full means dropped).
    pub console: Fd,
    /// An early serial console (ttyS0) beside hvc0, to find out why a guest does not start.
    #[serde(default)]
    pub serial: bool,
    /// Network interfaces.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// The shared file system; none in VMs that need no files.
    #[serde(default)]
    pub fs: Option<FsConfig>,
    /// The walls around the VMM's process; none only in tests that run without root.
    #[serde(default)]
    pub jail: Option<JailConfig>,
}

/// What a VM begins from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Start {
    /// A kernel.
    Boot {
        /// The uncompressed ELF kernel (PVH), open for reading.
        kernel: Fd,
        /// The initramfs, open for reading.
        initramfs: Fd,
        /// Kernel command line.
        cmdline: String,
    },
    /// A VM of the same shape that was saved by the same husk-vmm.
    Restore {
        /// What is not memory, open for reading.
        state: Fd,
        /// Guest memory, sparse, open for reading.
        memory: Fd,
        /// The guest kernel's code, which is mapped then and not copied. A machine that is to be saved again must have none.
        #[serde(default)]
        code: Option<Code>,
    },
}

/// Memory that many VMs share, because their guests never write it nor have devices do so.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Code {
    /// What the memory file of the snapshot has there, open for reading; as long as the code, a multiple of 2 MiB.
    pub file: Fd,
    /// Guest-physical start, a multiple of 2 MiB.
    pub address: u64,
}

/// The two files that a snapshot is written into, see husk-snapshot: empty, open for writing.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// What is not memory.
    pub state: Fd,
    /// Guest memory, sparse.
    pub memory: Fd,
}

/// One virtio-net device on a tap.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), attached; none in a VM that is to be saved.
    pub tap: Option<Fd>,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// Maximum transmission unit in bytes.
    pub mtu: u16,
}

/// The vhost-user-fs device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Connected stream socket to husk-fs (vhost-user); none in a VM that is to be saved.
    pub socket: Option<Fd>,
    /// virtio-fs tag, at most 36 bytes.
    pub tag: String,
    /// Number of request queues; husk-fs must serve as many.
    pub request_queues: u16,
}

/// The walls of a helper process: own user, no capabilities, empty root, own namespaces, seccomp, rlimits.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User id to run as; not 0.
    pub uid: u32,
    /// Group id to run as; not 0.
    pub gid: u32,
    /// The pod's network namespace, if the process is to live in it.
    #[serde(default)]
    pub netns: Option<Fd>,
}
