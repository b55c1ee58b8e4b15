//! containerd-shim-husk-v2.
fn main() {}
