//! What the shim serves and calls by ttrpc: containerd's Task service and its Events service. No logic here.

pub(crate) mod events;
pub(crate) mod task;
