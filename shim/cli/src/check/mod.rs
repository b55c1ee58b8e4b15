//! `husk check`: a list of findings about this machine, each with what to do.

mod guest;
mod host;
mod kvm;
mod parts;

use std::fmt::Write;

use serde::Serialize;

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Pods can't run.
    Missing,
    /// Pods run, but this is worth knowing.
    Note,
}

/// One line of the report.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do; empty if nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    mend: String,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), mend: String::new() }
    }

    fn missing(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Missing, found: found.into(), mend: mend.into() }
    }

    fn note(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Note, found: found.into(), mend: mend.into() }
    }
}

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    usable: bool,
    checks: Vec<Finding>,
}

/// Looks at everything.
pub(crate) fn run() -> Report {
    let mut checks = vec![host::processor(), host::kernel(), host::rights()];
    checks.extend(kvm::check());
    checks.extend([
        host::tun(),
        host::traffic_control(),
        host::overlay(),
        host::cgroups(),
        host::landlock(),
        parts::containerd(),
        parts::programs(),
        parts::guest_image(),
        parts::runtime_configured(),
    ]);
    Report::new(checks)
}

/// Looks at KVM only.
pub(crate) fn run_kvm() -> Report {
    Report::new(kvm::check())
}

impl Report {
    fn new(checks: Vec<Finding>) -> Self {
        Self { usable: checks.iter().all(|finding| finding.status != Status::Missing), checks }
    }

    /// Whether pods can run.
    pub(crate) fn usable(&self) -> bool {
        self.usable
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let width = self.checks.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for Finding { name, status, found, mend } in &self.checks {
            let status = match status {
                Status::Ok => "ok",
                Status::Missing => "missing",
                Status::Note => "note",
            };
            // Writing to a String can't fail.
            let _ = writeln!(text, "{status:<8} {name:<width$}  {found}");
            if !mend.is_empty() {
                let _ = writeln!(text, "{:<8} {:<width$}  -> {mend}", "", "");
            }
        }
        let verdict = if self.usable { "This machine can run husk." } else { "This machine can't run husk yet." };
        let _ = writeln!(text, "\n{verdict}");
        text
    }

    /// For programs.
    pub(crate) fn json(&self) -> String {
        // Strings, booleans and lists of them can't fail to be JSON.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_people_and_programs_the_same() {
        let checks = vec![Finding::ok("a", "there"), Finding::missing("long name", "not there", "get it")];
        let report = Report::new(checks);
        assert!(!report.usable());
        assert_eq!(
            report.text(),
            "ok       a          there\nmissing  long name  not there\n                    -> get it\n\nThis machine can't run husk yet.\n"
        );
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["usable"], false);
        assert_eq!(json["checks"][1]["status"], "missing");
        assert_eq!(json["checks"][1]["mend"], "get it");
        assert!(json["checks"][0].get("mend").is_none());
    }

    #[test]
    fn looks_at_everything_without_a_panic() {
        let report = run();
        assert!(report.checks.len() > 10);
        for finding in &report.checks {
            assert!(finding.status == Status::Ok || !finding.mend.is_empty(), "{finding:?} says not what to do");
        }
    }
}
