//! What of an interface's kernel parameters the guest takes over: whether it has IPv6, and listens to routers.

use std::collections::HashMap;
use std::fs;

/// Parameters of net.ipv6.conf.<interface>, and the kernel's defaults, with which the guest begins
/// (Documentation/networking/ip-sysctl.rst).
const IPV6: [(&str, &str); 3] = [("disable_ipv6", "0"), ("accept_ra", "1"), ("autoconf", "1")];

/// Those that differ from the default, in the network namespace of the calling thread. A host without IPv6 has it disabled.
pub(super) fn ipv6(interface: &str) -> HashMap<String, String> {
    let mut different = HashMap::new();
    for (name, default) in IPV6 {
        let read = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/{name}"));
        let value = match &read {
            Ok(text) => text.trim(),
            Err(_) if name == "disable_ipv6" => "1",
            Err(_) => default,
        };
        if value != default {
            different.insert(name.to_owned(), value.to_owned());
        }
    }
    different
}
