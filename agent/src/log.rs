//! The agent's log: one line each to standard error, which is the console. Console output costs VM exits, so it is quiet by default.

use tracing::level_filters::LevelFilter;

/// Kernel command line key: one of off, error, warn, info, debug, trace.
const LEVEL_KEY: &str = "husk.log";

/// Starts logging at the level that the kernel command line asks for.
pub(crate) fn start(command_line: &str) {
    tracing_subscriber::fmt()
        .with_max_level(level(command_line))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}

fn level(command_line: &str) -> LevelFilter {
    crate::boot::parameter(command_line, LEVEL_KEY).and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::WARN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warns_unless_told_otherwise() {
        assert_eq!(level("quiet husk.log=debug"), LevelFilter::DEBUG);
        assert_eq!(level("quiet"), LevelFilter::WARN);
        assert_eq!(level("husk.log=loud"), LevelFilter::WARN);
    }
}
