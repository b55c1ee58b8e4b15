//! husk.
fn main() {}
