//! husk-fs: the FUSE server of a pod's share directory, spoken over virtio-fs as a vhost-user back end.
//!
//! The guest checks permissions (default_permissions) and keeps file locks; the pod is one guest, so that both hold for all of the pod's
//! containers. Locks are not seen by the host or by other pods. Read-only is enforced by the host's mounts.

#![deny(unsafe_code)]

pub mod backend;
pub mod buffers;
pub mod cache;
pub mod config;
pub mod handles;
pub mod inode;
pub mod mounts;
pub mod names;
mod ops;
mod reach;
pub mod server;
pub mod sys;
pub mod tree;
pub mod wire;
pub mod worker;
