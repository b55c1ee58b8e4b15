//! husk-vmm.
fn main() {}
