//! Specs that nobody should write: what comes is an error or the guest's spec, in bounded time, and never a panic.

use std::fs;

use oci_spec::runtime::Spec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::guest::convert;
use super::load::{self, MAX_SIZE, Role};
use super::tests::{SANDBOX, member};
use super::{SpecError, size};
use crate::config::Config;

/// All that is done with a spec before anything is made.
fn judge(text: &[u8]) -> Result<(), SpecError> {
    let parsed = serde_json::from_slice::<Spec>(text);
    let spec = parsed.map_err(|source| SpecError::Parse { path: "config.json".into(), source })?;
    let role = load::role(&spec)?;
    load::pod(&spec)?;
    size::of(&spec, &role, &Config::default(), size::Host { cpus: 8, memory_mib: 8192 })?;
    for role in [Role::Member(SANDBOX.to_owned()), Role::Single] {
        convert(spec.clone(), "c0ffee", &role, None)?;
    }
    Ok(())
}

/// Values that fit nowhere, or only just.
fn odd() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<i64>().prop_map(|number| json!(number)),
        any::<u64>().prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
    ];
    let text = prop_oneof![
        ".{0,40}".prop_map(|text| json!(text)),
        prop_oneof![Just(".."), Just("/"), Just("/../../etc"), Just("a\0b"), Just("-1"), Just("rbind"), Just("")]
            .prop_map(|text| json!(text)),
    ];
    let leaf = prop_oneof![Just(Value::Null), any::<bool>().prop_map(|truth| json!(truth)), number, text];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            prop::collection::hash_map("[a-z]{1,6}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

/// JSON pointers of everything in a value.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    let below: Vec<(String, &Value)> = match value {
        Value::Object(map) => {
            map.iter().map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value)).collect()
        }
        Value::Array(list) => list.iter().enumerate().map(|(number, value)| (number.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, value) in below {
        let place = format!("{at}/{key}");
        places(value, &place, found);
        found.push(place);
    }
}

proptest! {
    #[test]
    fn a_spec_with_odd_values_is_judged(changes in prop::collection::vec((any::<prop::sample::Index>(), odd()), 1..4)) {
        let mut value = member();
        for (index, odd) in changes {
            let mut found = Vec::new();
            places(&value, "", &mut found);
            if let Some(place) = value.pointer_mut(&found[index.index(found.len())]) {
                *place = odd;
            }
        }
        let _ = judge(value.to_string().as_bytes());
    }

    #[test]
    fn broken_text_is_judged(cut in any::<prop::sample::Index>(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
        let mut text = member().to_string().into_bytes();
        for (place, byte) in flips {
            let place = place.index(text.len());
            text[place] = byte;
        }
        text.truncate(cut.index(text.len()) + 1);
        let _ = judge(&text);
    }
}

#[test]
fn deep_nesting_wrong_types_and_huge_numbers_are_parse_errors() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let nested = format!(r#"{{"ociVersion":"1.0.2","annotations":{deep}}}"#);
    let huge = r#"{"ociVersion":"1.0.2","process":{"user":{"uid":99999999999,"gid":0},"cwd":"/"}}"#.to_owned();
    let negative = r#"{"ociVersion":"1.0.2","process":{"user":{"uid":-1,"gid":0},"cwd":"/"}}"#.to_owned();
    let types = r#"{"ociVersion":"1.0.2","mounts":{"destination":"/x"}}"#.to_owned();
    for text in [String::new(), "{".to_owned(), "null".to_owned(), deep, nested, huge, negative, types] {
        assert!(matches!(judge(text.as_bytes()), Err(SpecError::Parse { .. })), "{:.80}", text);
    }
}

#[test]
fn a_bundle_is_read_only_so_far() {
    let bundle = tempfile::tempdir().unwrap();
    assert!(matches!(load::load(bundle.path()), Err(SpecError::Read { .. })));
    let mut value = member();
    value["annotations"]["long"] = json!("x".repeat(MAX_SIZE as usize));
    fs::write(bundle.path().join("config.json"), value.to_string()).unwrap();
    assert!(matches!(load::load(bundle.path()), Err(SpecError::TooLarge(_))));
}

#[test]
fn a_spec_without_its_parts_is_refused() {
    for part in ["root", "process", "linux"] {
        let mut value = member();
        value.as_object_mut().unwrap().remove(part);
        let role = Role::Member(SANDBOX.to_owned());
        let error = convert(serde_json::from_value(value).unwrap(), "c0ffee", &role, None).unwrap_err();
        assert!(error.to_string().contains(&format!("has no {part}")), "{error}");
    }
}

#[test]
fn relative_and_escaping_paths() {
    let refused = |change: fn(&mut Value)| {
        let mut value = member();
        change(&mut value);
        convert(serde_json::from_value(value).unwrap(), "c0ffee", &Role::Member(SANDBOX.to_owned()), None).unwrap_err()
    };
    let error = refused(|value| value["process"]["cwd"] = json!("home"));
    assert!(matches!(error, SpecError::WorkingDirectory(_)), "{error}");
    let error = refused(|value| value["mounts"][4]["source"] = json!("../etc"));
    assert!(matches!(error, SpecError::Mount { .. }), "{error}");
    // Where a mount goes is decided in the guest, step by step below the container's root (agent/cell/src/paths.rs).
}

#[test]
fn what_is_the_hosts_alone_is_refused() {
    for (place, asked) in [
        ("intelRdt", json!({"closID": "x"})),
        ("netDevices", json!({"eth1": {"name": "eth0"}})),
        ("memoryPolicy", json!({"mode": "MPOL_BIND", "nodes": "0"})),
    ] {
        let mut value = member();
        value["linux"][place] = asked;
        let error = convert(serde_json::from_value(value).unwrap(), "c0ffee", &Role::Member(SANDBOX.to_owned()), None)
            .unwrap_err();
        assert!(error.to_string().contains(place), "{error}");
    }
}

#[test]
fn sysctls_of_a_container_are_of_its_own_namespaces() {
    let of = |name: &str, own: bool| {
        let mut value = member();
        value["linux"]["sysctl"] = json!({ name: "1" });
        if own {
            value["linux"]["namespaces"] =
                json!([{"type": "ipc"}, {"type": "network"}, {"type": "uts"}, {"type": "pid"}]);
        }
        convert(serde_json::from_value(value).unwrap(), "c0ffee", &Role::Member(SANDBOX.to_owned()), None)
    };
    for name in [
        "net.ipv4.ip_forward",
        "net/ipv4/conf/a.b/rp_filter",
        "kernel.msgmax",
        "fs.mqueue.msg_max",
        "kernel.domainname",
    ] {
        assert!(of(name, true).is_ok(), "{name}");
        assert!(matches!(of(name, false), Err(SpecError::Sysctl(_))), "{name}");
    }
    for name in ["vm.swappiness", "kernel.core_pattern", "fs.file-max", "kernel.hostname", "", "/", "net"] {
        let asked = of(name, name != "net");
        assert!(matches!(asked, Err(SpecError::Sysctl(_))), "{name}");
    }
}
