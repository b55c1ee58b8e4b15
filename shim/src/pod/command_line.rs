//! The guest kernel's command line (Documentation/admin-guide/kernel-parameters.txt). Only the operator's words are added, never a pod's.

use husk_agent_api::{NONCE_KEY, TEMPLATE_KEY};

use crate::config::Config;
use crate::random;

/// All of it but the words that differ from boot to boot.
pub(crate) fn fixed(config: &Config) -> String {
    let console = if config.serial { "earlyprintk=ttyS0 console=ttyS0 console=hvc0" } else { "console=hvc0 quiet" };
    // No bounce buffers (swiotlb), no search for PCI buses beyond the only one nor for chip sets with early mends, and no RCU grace period of whole ticks where a process enters a
    // cgroup: each would cost milliseconds of every start.
    let quick = "swiotlb=noforce pci=lastbus=0,noearly rcupdate.rcu_expedited=1";
    // The kernel's drivers of virtual interfaces are for pods that want some: none by themselves.
    let bare = "dummy.numdummies=0";
    // Of memory that is plugged in, three parts can be unplugged again for one that the kernel may use for itself (vmm/docs/memory-map.md).
    let memory = "memory_hotplug.online_policy=auto-movable";
    let fixed = "panic=-1 reboot=t init=/init tsc=reliable no_timer_check random.trust_cpu=on";
    let line = format!("{console} {fixed} {bare} {memory} {quick} {}", config.kernel_parameters.trim());
    line.trim_end().to_owned()
}

/// For a pod's own boot.
pub(crate) fn boot(config: &Config, nonce: &[u8; 16]) -> String {
    format!("{NONCE_KEY}={} {}", random::hex(nonce), fixed(config))
}

/// For a machine that becomes a template.
pub(crate) fn template(config: &Config, nonce: &[u8; 16]) -> String {
    format!("{TEMPLATE_KEY} {}", boot(config, nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_with_the_operators_words() {
        let config = Config { kernel_parameters: " mitigations=off ".to_owned(), ..Config::default() };
        let line = boot(&config, &[0xab; 16]);
        assert!(line.starts_with(&format!("husk.nonce={} console=hvc0 quiet panic=-1 ", "ab".repeat(16))), "{line}");
        assert!(line.ends_with(" mitigations=off"), "{line}");
        assert!(!boot(&Config::default(), &[0; 16]).ends_with(' '));
    }
}
