//! KVM: the device, its version, its capabilities, and whether it really runs a guest.

use std::io::ErrorKind;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use super::Finding;
use super::guest::{self, Outcome};

/// The only version of KVM's API that there is (Linux, Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION).
const API_VERSION: i32 = 12;

/// What husk-vmm uses.
const CAPABILITIES: [(Cap, &str); 9] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::ExtCpuid, "CPUID"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::Pit2, "PIT"),
];

const DEVICE: &str = "KVM device";
const GUEST: &str = "KVM runs a guest";

/// One or more findings, the last one that matters first to fail.
pub(super) fn check() -> Vec<Finding> {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(finding) => return vec![*finding],
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let found = format!("version {version} of the API, {API_VERSION} is needed");
        return vec![Finding::missing(DEVICE, found, "Use another kernel.")];
    }
    let lacking: Vec<&str> =
        CAPABILITIES.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    if !lacking.is_empty() {
        let found = format!("lacks {}", lacking.join(", "));
        return vec![Finding::missing(DEVICE, found, "Use a newer kernel, or one with the whole of KVM.")];
    }
    vec![Finding::ok(DEVICE, format!("/dev/kvm, API {version}")), runs_a_guest(kvm)]
}

/// Opens /dev/kvm, or says why not.
fn open() -> Result<Kvm, Box<Finding>> {
    let error = match Kvm::new() {
        Ok(kvm) => return Ok(kvm),
        Err(error) => std::io::Error::from(error),
    };
    Err(Box::new(match error.kind() {
        ErrorKind::NotFound => Finding::missing(DEVICE, "there is no /dev/kvm", how_to_get_it()),
        ErrorKind::PermissionDenied => {
            Finding::missing(DEVICE, "/dev/kvm may not be opened", "Run this as root, as containerd's shims run.")
        }
        _ => Finding::missing(DEVICE, format!("/dev/kvm can't be opened: {error}"), how_to_get_it()),
    }))
}

/// What to do about a missing device.
fn how_to_get_it() -> String {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has =
        |flag: &str| flags.lines().any(|line| line.starts_with("flags") && line.split(' ').any(|word| word == flag));
    let module = if has("svm") {
        "kvm_amd"
    } else if has("vmx") {
        "kvm_intel"
    } else {
        return "The processor shows no virtualisation (vmx, svm): turn it on in the firmware, or, in a virtual machine, have its host \
                allow nested virtualisation; else use another machine."
            .to_owned();
    };
    if Path::new("/sys/module").join(module).exists() {
        "The module is loaded, but the device is not here: in a container, hand /dev/kvm in.".to_owned()
    } else {
        format!("Load the module: modprobe {module}")
    }
}

fn runs_a_guest(kvm: Kvm) -> Finding {
    const MEND: &str = "This KVM can't run ordinary guests (it may be a software KVM such as PVM, for guests made for it). Use a machine \
                        with hardware virtualisation, bare or nested. husk's tests bring a host of their own: tests/testhost.";
    match guest::run(kvm) {
        Ok(Outcome::Good) => Finding::ok(GUEST, "system calls, popcnt and cmpxchg16b work as on hardware"),
        Ok(Outcome::Bad(how)) => Finding::missing(GUEST, how, MEND),
        Err(error) => {
            Finding::missing(GUEST, format!("cannot make a virtual machine: {}", super::guest::chain(&error)), MEND)
        }
    }
}
