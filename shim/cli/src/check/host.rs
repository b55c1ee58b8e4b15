//! The processor and the kernel, but KVM.

use std::fs;
use std::path::Path;

use nix::sys::utsname::uname;

use super::Finding;

/// Oldest kernel: mount_setattr(2), with which volumes are made read-only with all that is mounted in them.
const OLDEST: (u32, u32) = (5, 12);

/// Capabilities of root that the shim uses (linux/capability.h): their numbers and names.
const CAPABILITIES: [(u32, &str); 5] =
    [(21, "SYS_ADMIN"), (12, "NET_ADMIN"), (7, "SETUID"), (6, "SETGID"), (8, "SETPCAP")];

pub(super) fn processor() -> Finding {
    let name = "processor";
    match std::env::consts::ARCH {
        "x86_64" => Finding::ok(name, "x86_64"),
        other => Finding::missing(name, other, "husk runs on x86_64 only."),
    }
}

pub(super) fn kernel() -> Finding {
    let name = "kernel version";
    let release = uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    match version(&release) {
        Some(version) if version >= OLDEST => Finding::ok(name, release),
        _ => Finding::missing(name, release, format!("Linux {}.{} or newer is needed.", OLDEST.0, OLDEST.1)),
    }
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub(super) fn rights() -> Finding {
    let name = "rights";
    if !nix::unistd::geteuid().is_root() {
        return Finding::missing(name, "not root", "Run this as root, as containerd's shims run.");
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let held = effective.unwrap_or(0);
    let lacking: Vec<&str> =
        CAPABILITIES.iter().filter(|(number, _)| held & 1 << number == 0).map(|(_, name)| *name).collect();
    if lacking.is_empty() {
        return Finding::ok(name, "root with the capabilities that the shim uses");
    }
    let found = format!("root without the capabilities {}", lacking.join(", "));
    Finding::missing(name, found, "In a container: run it privileged. The shim itself must run on the host.")
}

pub(super) fn tun() -> Finding {
    let name = "tun";
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok(name, "/dev/net/tun"),
        Err(error) => Finding::missing(name, format!("/dev/net/tun can't be opened: {error}"), "modprobe tun"),
    }
}

pub(super) fn traffic_control() -> Finding {
    let name = "traffic control";
    let wanted = ["sch_ingress", "cls_u32", "act_mirred"];
    let lacking: Vec<&str> = wanted.into_iter().filter(|module| !has_module(module)).collect();
    if lacking.is_empty() {
        return Finding::ok(name, wanted.join(", "));
    }
    // A kernel without modules need not list what is built in.
    let found = format!("not seen: {}", lacking.join(", "));
    Finding::note(
        name,
        found,
        format!(
            "Pods with a network need them: modprobe -a {}. A kernel with all built in may not list them.",
            lacking.join(" ")
        ),
    )
}

pub(super) fn overlay() -> Finding {
    let name = "overlayfs";
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) || has_module("overlay") {
        return Finding::ok(name, "there");
    }
    Finding::missing(name, "the kernel does not have it", "modprobe overlay")
}

/// Whether a module is loaded, built in, or there to be loaded.
fn has_module(name: &str) -> bool {
    if Path::new("/sys/module").join(name).exists() {
        return true;
    }
    let Ok(names) = uname() else { return false };
    let directory = Path::new("/lib/modules").join(names.release());
    ["modules.builtin", "modules.dep"].iter().any(|list| {
        let list = fs::read_to_string(directory.join(list)).unwrap_or_default();
        list.lines().any(|line| lists(line, name))
    })
}

/// Whether a line of modules.dep or modules.builtin is about this module.
fn lists(line: &str, name: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().is_some_and(|stem| file.contains(".ko") && stem.replace('-', "_") == name)
}

pub(super) fn cgroups() -> Finding {
    let name = "cgroups";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let has = |kind: &str| mounts.lines().any(|line| line.split(' ').nth(2) == Some(kind));
    match (has("cgroup"), has("cgroup2")) {
        (false, true) => Finding::ok(name, "v2"),
        (true, true) => Finding::ok(name, "v1 and v2 (hybrid)"),
        (true, false) => Finding::ok(name, "v1"),
        (false, false) => Finding::missing(name, "none is mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"),
    }
}

pub(super) fn landlock() -> Finding {
    let name = "Landlock";
    let active = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if active.split(',').any(|module| module.trim() == "landlock") {
        return Finding::ok(name, "there");
    }
    let mend = "Pods run without it, with one wall less around the VMM. To have it: add landlock to the kernel's lsm= parameter.";
    Finding::note(name, "not active, or /sys/kernel/security is not mounted", mend)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(version("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(version("5.12-rc1"), Some((5, 12)));
        assert!(version("").is_none() && version("x.y").is_none());
    }

    #[test]
    fn reads_lists_of_modules() {
        assert!(lists("kernel/net/sched/act_mirred.ko.xz: kernel/x.ko", "act_mirred"));
        assert!(lists("kernel/net/sched/sch-ingress.ko", "sch_ingress"));
        assert!(!lists("kernel/net/sched/act_mirred2.ko:", "act_mirred"));
        assert!(!lists("", "act_mirred"));
    }
}
