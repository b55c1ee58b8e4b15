//! husk-vmm's tables. ioctl(2) is allowed by request number only (linux/kvm.h, linux/if_tun.h).

use super::{Allowed, any, only};

const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_SET_CLOCK: u64 = 0x4030_ae7b;
// linux/fs.h
const BLKSSZGET: u64 = 0x1268;
const BLKPBSZGET: u64 = 0x127b;
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;

/// A vCPU's thread. A guest's access to a device's registers is served here, too: it may route an interrupt and wake the devices' thread.
pub(super) const VCPU: &[Allowed] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[
            KVM_RUN,             // run the guest
            KVM_GET_REGS,        // where it stood, for the log and for a snapshot
            KVM_GET_SREGS,       // the same
            KVM_GET_MP_STATE,    // a snapshot
            KVM_GET_XCRS,        // a snapshot
            KVM_GET_XSAVE,       // a snapshot
            KVM_GET_DEBUGREGS,   // a snapshot
            KVM_GET_LAPIC,       // a snapshot
            KVM_GET_VCPU_EVENTS, // a snapshot
            KVM_GET_MSRS,        // a snapshot
            KVM_GET_TSC_KHZ,     // a snapshot
            KVM_KVMCLOCK_CTRL,   // tell it of a pause
            KVM_SET_GSI_ROUTING, // MSI-X vectors that the guest writes
            KVM_IRQFD,           // the same
            KVM_IOEVENTFD,       // a queue's doorbell, when the guest moves it
        ],
        "the vCPU and the registers of devices",
    ),
    any(libc::SYS_epoll_ctl, "a device that the guest resets or activates joins or leaves the event loop"),
    any(libc::SYS_eventfd2, "the same: its queues' events"),
    any(libc::SYS_fcntl, "duplicates of events"),
    any(libc::SYS_sendmsg, "vhost-user: a queue's set-up at activation"),
    any(libc::SYS_recvmsg, "vhost-user's replies"),
    any(libc::SYS_sendto, "vhost-user without descriptors"),
    any(libc::SYS_recvfrom, "vhost-user without descriptors"),
    any(libc::SYS_poll, "the time limit of vhost-user's replies"),
    any(libc::SYS_ppoll, "the same"),
    any(libc::SYS_timerfd_settime, "arms the watchdog of vhost-user's replies"),
];

/// An event loop.
pub(super) const EVENTS: &[Allowed] = &[
    any(libc::SYS_epoll_create1, "event loop"),
    any(libc::SYS_epoll_ctl, "event loop"),
    any(libc::SYS_epoll_wait, "event loop"),
    any(libc::SYS_epoll_pwait, "event loop"),
    any(libc::SYS_epoll_pwait2, "event loop"),
    any(libc::SYS_eventfd2, "wake-ups"),
    any(libc::SYS_poll, "waits with a time limit"),
    any(libc::SYS_ppoll, "waits with a time limit"),
    any(libc::SYS_fcntl, "non-blocking mode, duplicates"),
    any(libc::SYS_sendmsg, "sockets"),
    any(libc::SYS_recvmsg, "sockets"),
    any(libc::SYS_sendto, "sockets"),
    any(libc::SYS_recvfrom, "sockets"),
    any(libc::SYS_shutdown, "half-closed connections"),
    any(libc::SYS_timerfd_create, "timers"),
    any(libc::SYS_timerfd_settime, "timers"),
];

/// The devices' thread.
pub(super) const DEVICES: &[Allowed] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[
            KVM_SET_GSI_ROUTING, // vectors
            KVM_IRQFD,           // vectors
            KVM_IOEVENTFD,       // doorbells
            TUNSETOFFLOAD,       // the guest's choice of offloads
            TUNSETVNETHDRSZ,     // the size of the header before a frame
            libc::FIONREAD,      // how much a stream holds
            libc::FIONBIO,       // non-blocking mode
        ],
        "interrupts, taps, streams",
    ),
    only(libc::SYS_socketpair, 0, &[libc::AF_UNIX as u64], "a vsock connection's two ends"),
    any(libc::SYS_getsockopt, "a stream's error and type"),
    any(libc::SYS_readv, "tap and streams into the guest's memory"),
    any(libc::SYS_preadv, "files into the guest's memory"),
    any(libc::SYS_pwritev, "the guest's memory into files"),
    any(libc::SYS_fallocate, "give memory back that the guest does not need"),
];

/// The control API's thread.
pub(super) const CONTROL: &[Allowed] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[
            KVM_GET_CLOCK,              // the guest's clock over a pause
            KVM_SET_CLOCK,              // the same
            KVM_GET_IRQCHIP,            // a snapshot
            KVM_SET_USER_MEMORY_REGION, // memory that is plugged in
            KVM_IOEVENTFD,              // a disk is taken away: its doorbells
            KVM_IRQFD,                  // the same: its vectors
            BLKSSZGET,                  // a disk's block sizes
            BLKPBSZGET,                 // the same
            BLKDISCARD,                 // what disks' threads do
            BLKZEROOUT,                 // the same
            libc::FIONBIO,              // non-blocking mode
        ],
        "pause, resume and save, memory, disks, the socket",
    ),
    any(libc::SYS_getsockopt, "the socket's peer and error"),
    any(libc::SYS_getsockname, "the runtime"),
    any(libc::SYS_getpeername, "the runtime"),
    only(libc::SYS_socketpair, 0, &[libc::AF_UNIX as u64], "the runtime's wake-up"),
    any(libc::SYS_getrusage, "figures of the process"),
    any(libc::SYS_lseek, "a snapshot: where guest memory holds something; a disk's length"),
    any(libc::SYS_ftruncate, "a snapshot's file"),
    any(libc::SYS_pwrite64, "a snapshot's file"),
    any(libc::SYS_statx, "a disk's type"),
    any(libc::SYS_fstat, "the same"),
];

/// A disk's thread.
pub(super) const DISK: &[Allowed] = &[
    only(
        libc::SYS_ioctl,
        1,
        &[
            BLKDISCARD, // discard on a block device
            BLKZEROOUT, // write zeroes on a block device
            KVM_IRQFD,  // the last owner of a vector lets go of it
        ],
        "block devices, vectors",
    ),
    any(libc::SYS_poll, "waits for the driver's notifications"),
    any(libc::SYS_ppoll, "the same"),
];

/// What disks' threads do with the host's files.
pub(super) const STORAGE: &[Allowed] = &[
    any(libc::SYS_preadv, "files into the guest's memory"),
    any(libc::SYS_pwritev, "the guest's memory into files"),
    any(libc::SYS_fdatasync, "flush, and a snapshot's files"),
    any(libc::SYS_fallocate, "discard and write zeroes on files"),
];
