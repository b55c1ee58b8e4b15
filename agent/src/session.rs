//! The session of an exec: its process leads one of its own (setsid(2)), and what it starts stays in it unless it leaves on purpose.

use std::fs;

use husk_cell::CgroupError;
use husk_cell::cgroup::Cgroup;
use nix::libc::SIGKILL;
use nix::unistd::Pid;

/// How often the processes are listed anew, since one that is not killed yet may have forked.
const ROUNDS: usize = 16;

/// Kills every process of a container's cgroup whose session is `session`.
pub(crate) fn kill(cgroup: &Cgroup, session: u32) -> Result<(), CgroupError> {
    for _ in 0..ROUNDS {
        let mut found = false;
        for pid in cgroup.processes()? {
            let is_member =
                fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_alive_in(&stat, session));
            // One that has ended since is as good as killed.
            found |= is_member && crate::reaper::send(Pid::from_raw(pid as i32), SIGKILL).is_ok();
        }
        if !found {
            break;
        }
    }
    Ok(())
}

/// Whether a line of /proc/PID/stat (proc_pid_stat(5)) is of a process of the session that can still run.
fn is_alive_in(stat: &str, session: u32) -> bool {
    // The name, in parentheses, may hold anything.
    let Some((_, fields)) = stat.rsplit_once(')') else { return false };
    let mut fields = fields.split_ascii_whitespace();
    let (state, of) = (fields.next(), fields.nth(2));
    !matches!(state, Some("Z" | "X") | None) && of.and_then(|of| of.parse().ok()) == Some(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_session() {
        let stat = "12 (a) b) S 1 12 7 0 -1 4194560 1 0";
        assert!(is_alive_in(stat, 7));
        assert!(!is_alive_in(stat, 12));
        assert!(!is_alive_in("12 (a) Z 1 12 7 0", 7));
        for broken in ["", "12 (a", "12 (a) S", "12 (a) S 1 2 x"] {
            assert!(!is_alive_in(broken, 7), "{broken}");
        }
    }
}
