//! Containers made for real, with a busybox image: needs root, cgroup2 and /bin/busybox (Debian: busybox-static).
//!
//! Arguments: parts of the names of the tests to run; --prepare-root calls husk_cell::prepare_root first.

// Tests may panic; clippy knows only those under #[test].
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod isolation;
mod life;
mod process;

use std::{panic::catch_unwind, time::Instant};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == "cell") {
        husk_cell::child::main();
    }
    if !nix::unistd::Uid::effective().is_root() || !std::path::Path::new("/bin/busybox").exists() {
        println!("containers: skipped: needs root and /bin/busybox");
        return;
    }
    // As an init in an initramfs would.
    if arguments.iter().any(|a| a == "--prepare-root") {
        husk_cell::prepare_root().unwrap();
    }
    let filters: Vec<_> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let mut failed = 0;
    for (name, test) in life::TESTS.iter().chain(process::TESTS).chain(isolation::TESTS) {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let begun = Instant::now();
        let passed = catch_unwind(test).is_ok();
        println!("{} {name} ({:?})", if passed { "ok    " } else { "FAILED" }, begun.elapsed());
        failed += u32::from(!passed);
    }
    std::process::exit(i32::from(failed != 0));
}
