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

/// What this machine lacks for a test: its panic skips it.
struct Lacks(&'static str);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == "cell") {
        husk_cell::child::main();
    }
    if !nix::unistd::Uid::effective().is_root() || !std::path::Path::new("/bin/busybox").exists() {
        println!("containers: skipped: needs root and /bin/busybox");
        println!("test result: ok. 0 passed; 0 failed; 1 ignored;");
        return;
    }
    // As an init in an initramfs would.
    if arguments.iter().any(|a| a == "--prepare-root") {
        husk_cell::prepare_root().unwrap();
    }
    let filters: Vec<_> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, test) in life::TESTS.iter().chain(process::TESTS).chain(isolation::TESTS) {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let begun = Instant::now();
        let word = match catch_unwind(test).map_err(|cause| cause.downcast::<Lacks>()) {
            Ok(()) => {
                passed += 1;
                "ok".to_owned()
            }
            Err(Ok(lacks)) => {
                skipped += 1;
                format!("ignored, needs {}", lacks.0)
            }
            Err(Err(_)) => {
                failed += 1;
                "FAILED".to_owned()
            }
        };
        println!("test {name} ... {word} ({:?})", begun.elapsed());
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {result}. {passed} passed; {failed} failed; {skipped} ignored;");
    std::process::exit(i32::from(failed != 0));
}
