//! husk-fs.
fn main() {}
