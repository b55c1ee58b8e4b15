//! containerd, and husk's own files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Finding;

/// Programs of an installation, beside this one.
const PROGRAMS: [&str; 3] = ["containerd-shim-husk-v2", "husk-vmm", "husk-fs"];

/// The shim as containerd calls it; by this name it is found in containerd's PATH.
const SHIM: &str = "containerd-shim-husk-v2";

/// husk's name in containerd's configuration.
const RUNTIME_TYPE: &str = "io.containerd.husk.v2";

/// Most bytes that are read of a configuration file.
const MOST: u64 = 1 << 20;

pub(super) fn containerd() -> Finding {
    let name = "containerd";
    let mend = "Install containerd 1.6 or newer, and start it.";
    let output = Command::new("containerd").arg("--version").stdin(Stdio::null()).output();
    let text = match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Ok(output) => return Finding::missing(name, format!("containerd --version ends with {}", output.status), mend),
        Err(error) => return Finding::missing(name, format!("not found in PATH: {error}"), mend),
    };
    match version(&text) {
        Some(version) if version >= (1, 6) => {
            let state = if Path::new("/run/containerd/containerd.sock").exists() { "running" } else { "not running" };
            Finding::ok(name, format!("{}.{}, {state}", version.0, version.1))
        }
        _ => Finding::missing(name, text, mend),
    }
}

/// The first two numbers in containerd's line about itself ("containerd SOURCE VERSION COMMIT").
fn version(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().skip(1).find_map(|word| {
        let mut numbers = word.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    })
}

pub(super) fn programs() -> Finding {
    let name = "husk's programs";
    let Some(directory) = own_directory() else {
        return Finding::note(name, "this program's own directory is unknown", "Mount /proc.");
    };
    let lacking = lacking(&directory, &PROGRAMS);
    if lacking.is_empty() {
        Finding::ok(name, format!("in {}", directory.display()))
    } else {
        let found = format!("{} has no {}", directory.display(), lacking.join(", "));
        Finding::missing(name, found, "Install husk (deploy/install), and call husk from there.")
    }
}

pub(super) fn guest_image() -> Finding {
    let name = "guest image";
    let share = own_directory().and_then(|bin| Some(bin.parent()?.join("share/husk"))).unwrap_or_default();
    let lacking = lacking(&share, &["vmlinux", "initramfs"]);
    if lacking.is_empty() {
        Finding::ok(name, format!("in {}", share.display()))
    } else {
        let found = format!("{} has no {}", share.display(), lacking.join(", "));
        Finding::missing(
            name,
            found,
            "Install husk (deploy/install), or name them in /etc/husk/config.toml (kernel, initramfs).",
        )
    }
}

pub(super) fn runtime_configured() -> Finding {
    let name = "containerd's runtime";
    let files = ["/etc/containerd/config.toml".into()].into_iter().chain(toml_files("/etc/containerd/conf.d"));
    if let Some(file) = files.into_iter().find(|file| mentions(file)) {
        return Finding::ok(name, format!("{} names {RUNTIME_TYPE}", file.display()));
    }
    let in_path =
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|d| d.join(SHIM).is_file()));
    let found = format!("containerd's configuration does not name {RUNTIME_TYPE}");
    let mend = if in_path {
        "Kubernetes needs it (deploy/install writes it); `ctr run --runtime io.containerd.husk.v2` works without."
    } else {
        "Run deploy/install, which writes it and puts the shim into containerd's PATH."
    };
    Finding::note(name, found, mend)
}

/// The configuration files of a directory, in order of name.
fn toml_files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    files.sort();
    files
}

fn mentions(file: &Path) -> bool {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(file).is_ok_and(|file| file.take(MOST).read_to_string(&mut text).is_ok())
        && text.contains(RUNTIME_TYPE)
}

/// Where this program is, links resolved.
fn own_directory() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}

fn lacking<'a>(directory: &Path, names: &[&'a str]) -> Vec<&'a str> {
    names.iter().copied().filter(|name| !directory.join(name).is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(
            version("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1"),
            Some((1, 6))
        );
        assert_eq!(version("containerd github.com/containerd/containerd/v2 v2.4.2 abc"), Some((2, 4)));
        assert_eq!(version("something else"), None);
    }
}
