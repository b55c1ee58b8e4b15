//! docs/refusals.md has every refusal of a spec, word for word: whoever adds one is told.

use super::SpecError;

const TABLE: &str = include_str!("../../docs/refusals.md");

/// A refusal of each kind. The match below does not compile when one is missing here.
fn all() -> Vec<SpecError> {
    let io = || std::io::Error::other("X");
    let json = || serde_json::from_str::<u8>("").unwrap_err();
    let all = vec![
        SpecError::Read { path: "P".into(), source: io() },
        SpecError::Parse { path: "P".into(), source: json() },
        SpecError::TooLarge("P".into()),
        SpecError::SandboxOptions { found: "X".to_owned(), wanted: "X" },
        SpecError::Missing("X"),
        SpecError::HostNamespace("X"),
        SpecError::UserNamespace,
        SpecError::UnmappedRoot,
        SpecError::OtherUserNamespace,
        SpecError::ForeignNamespace("X", "P".into()),
        SpecError::Hooks("X"),
        SpecError::TooManyMounts(1),
        SpecError::Device { path: "P".into(), major: 1, minor: 1 },
        SpecError::BlockIo { major: 1, minor: 1 },
        SpecError::TooManyBlockDevices(1),
        SpecError::SeccompListener,
        SpecError::WorkingDirectory("P".into()),
        SpecError::HostOnly("X"),
        SpecError::Sysctl("X".to_owned()),
        SpecError::UnknownAnnotation("X".to_owned()),
        SpecError::AnnotationValue { key: "X".to_owned(), value: "X".to_owned(), wanted: "X" },
        SpecError::MemoryLimit { limit_bytes: 1, min_mib: 1 },
    ];
    for error in &all {
        match error {
            SpecError::Read { .. }
            | SpecError::Parse { .. }
            | SpecError::TooLarge(_)
            | SpecError::SandboxOptions { .. }
            | SpecError::Missing(_)
            | SpecError::HostNamespace(_)
            | SpecError::UserNamespace
            | SpecError::UnmappedRoot
            | SpecError::OtherUserNamespace
            | SpecError::ForeignNamespace(..)
            | SpecError::Hooks(_)
            | SpecError::TooManyMounts(_)
            | SpecError::Device { .. }
            | SpecError::BlockIo { .. }
            | SpecError::TooManyBlockDevices(_)
            | SpecError::SeccompListener
            | SpecError::WorkingDirectory(_)
            | SpecError::HostOnly(_)
            | SpecError::Sysctl(_)
            | SpecError::UnknownAnnotation(_)
            | SpecError::AnnotationValue { .. }
            | SpecError::MemoryLimit { .. } => {}
            // Our own or containerd's failure, not the author's; and below, each by its words.
            SpecError::Encode(_)
            | SpecError::SandboxConfig(_)
            | SpecError::PodFile { .. }
            | SpecError::Mount { .. } => {}
        }
    }
    all
}

/// Numbers and single capital letters, which stand for what a message says of the case, become #.
fn form(text: &str) -> String {
    let mut out = String::new();
    let mut word = String::new();
    for character in text.chars().chain(std::iter::once(' ')) {
        if character.is_alphanumeric() {
            word.push(character);
            continue;
        }
        let is_example = word.bytes().all(|byte| byte.is_ascii_digit())
            || (word.len() == 1 && word.bytes().all(|byte| byte.is_ascii_uppercase()));
        out.push_str(if word.is_empty() || !is_example { &word } else { "#" });
        word.clear();
        if !matches!(character, '"' | '`') {
            out.push(character);
        }
    }
    out.trim_end().to_owned()
}

fn expect_row(message: &str) {
    let is_there = form(TABLE).contains(&form(message));
    assert!(is_there, "shim/docs/refusals.md has no row with: {message}");
}

#[test]
fn every_refusal_of_a_spec_is_in_the_table() {
    for error in all() {
        expect_row(&error.to_string());
    }
}

#[test]
fn every_refusal_of_a_mount_is_in_the_table() {
    let source = include_str!("mounts.rs");
    let reasons: Vec<_> = source
        .split("refuse(")
        .skip(1)
        .filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
        .collect();
    assert!(reasons.len() > 5, "{reasons:?}");
    for why in reasons {
        expect_row(&format!("the mount on P {why}"));
    }
}
