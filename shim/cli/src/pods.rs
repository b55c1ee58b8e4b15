//! `husk list`: the pods of this machine, from the state files that their shims keep in /run/husk/<id>/state.json.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Where pods' directories are.
pub(crate) const ROOT: &str = "/run/husk";

/// Most bytes that are read of a file.
const MOST: u64 = 64 << 10;

/// What is used of a state file.
#[derive(Debug, Default, Deserialize)]
struct State {
    #[serde(default)]
    namespace: String,
    shim: Option<Identity>,
    vmm: Option<Identity>,
    fs: Option<Identity>,
}

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Identity {
    pid: u32,
    start_time: u64,
}

/// One pod.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub(crate) struct Pod {
    id: String,
    /// containerd's namespace.
    namespace: String,
    shim: Option<u32>,
    vmm: Option<u32>,
    fs: Option<u32>,
    /// Memory of all three in KiB (proportional set size).
    memory_kib: u64,
}

/// The pods below `root`, in order of id; those without a readable state are on their way in or out, and left out.
pub(crate) fn list(root: &Path) -> io::Result<Vec<Pod>> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut pods = Vec::new();
    for entry in entries {
        let entry = entry?;
        let state = match read(&entry.path().join("state.json")) {
            // For anybody but root.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(error),
            Err(_) => continue,
            Ok(text) => text,
        };
        let Ok(state) = serde_json::from_str::<State>(&state) else { continue };
        let Ok(id) = entry.file_name().into_string() else { continue };
        let [shim, vmm, fs] = [state.shim, state.vmm, state.fs].map(running);
        let memory_kib = [shim, vmm, fs].into_iter().flatten().map(memory_kib).sum();
        pods.push(Pod { id, namespace: state.namespace, shim, vmm, fs, memory_kib });
    }
    pods.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(pods)
}

/// For people.
pub(crate) fn table(pods: &[Pod]) -> String {
    let id = pods.iter().map(|pod| pod.id.len()).max().unwrap_or(0).max(2);
    let namespace = pods.iter().map(|pod| pod.namespace.len()).max().unwrap_or(0).max(9);
    let mut text = format!(
        "{:id$}  {:namespace$}  {:>8}  {:>8}  {:>8}  {:>10}\n",
        "ID", "NAMESPACE", "SHIM", "VMM", "FS", "MEMORY MiB"
    );
    let number = |pid: Option<u32>| pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    for pod in pods {
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:id$}  {:namespace$}  {:>8}  {:>8}  {:>8}  {:>10}",
            pod.id,
            pod.namespace,
            number(pod.shim),
            number(pod.vmm),
            number(pod.fs),
            pod.memory_kib.div_ceil(1024)
        );
    }
    text
}

/// For programs.
pub(crate) fn json(pods: &[Pod]) -> String {
    // Strings, numbers and lists of them can't fail to be JSON.
    let mut text = serde_json::to_string_pretty(pods).unwrap_or_default();
    text.push('\n');
    text
}

/// The process's number, if it still is that process.
fn running(identity: Option<Identity>) -> Option<u32> {
    let Identity { pid, start_time: started } = identity?;
    (start_time(&read(Path::new(&format!("/proc/{pid}/stat"))).ok()?)? == started).then_some(pid)
}

/// A process's start in clock ticks since boot (proc_pid_stat(5), field 22). The name before it may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A process's proportional set size (proc_pid_smaps(5)); 0 if it is gone.
fn memory_kib(pid: u32) -> u64 {
    let rollup = read(Path::new(&format!("/proc/{pid}/smaps_rollup"))).unwrap_or_default();
    rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MOST).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_what_the_shims_keep() {
        let root = std::env::temp_dir().join(format!("husk-list-{}", std::process::id()));
        assert!(list(&root).unwrap().is_empty());
        let own = std::process::id();
        let started = start_time(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        for (id, state) in [
            (
                "b",
                format!(
                    r#"{{"namespace":"k8s.io","shim":{{"pid":{own},"start_time":{started}}},"vmm":{{"pid":{own},"start_time":1}},"fs":null,"later":1}}"#
                ),
            ),
            ("a", r#"{"shim":null,"vmm":null,"fs":null}"#.to_owned()),
            ("broken", "{".to_owned()),
        ] {
            fs::create_dir_all(root.join(id)).unwrap();
            fs::write(root.join(id).join("state.json"), state).unwrap();
        }
        fs::create_dir_all(root.join("starting")).unwrap();
        let pods = list(&root).unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(pods.iter().map(|pod| pod.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((pods[1].shim, pods[1].vmm, pods[1].fs), (Some(own), None, None));
        assert!(pods[1].memory_kib > 0);
        let table = table(&pods);
        assert_eq!(table.lines().count(), 3);
        assert!(table.contains("k8s.io") && json(&pods).contains("\"vmm\": null"));
    }
}
