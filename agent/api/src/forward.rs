//! A forwarded TCP connection: the shim dials the agent's [`PORT`] and says where the client wanted to go; the agent connects there
//! within the guest and answers with one byte. From then on the connection carries the client's bytes, each way until its own end.
#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};

/// The guest's vsock port on which the agent takes forwarded connections, from the host alone.
pub const PORT: u32 = 1025;

/// Most forwarded connections of a pod at a time.
pub const MAX: usize = 256;

/// Length of an encoded destination in bytes.
pub const LEN: usize = 18;

/// The agent's answer when it is connected; any other byte says that nobody listens there.
pub const CONNECTED: u8 = 1;

/// The agent's answer when nobody listens there.
pub const REFUSED: u8 = 0;

/// The bytes for a destination: the IPv6 address (for IPv4 the mapped one of RFC 4291, section 2.5.5.2) and the port, in network byte order.
pub fn encode(to: SocketAddr) -> [u8; LEN] {
    let address = match to.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut bytes = [0; LEN];
    bytes[..16].copy_from_slice(&address.octets());
    bytes[16..].copy_from_slice(&to.port().to_be_bytes());
    bytes
}

/// The destination that the bytes name.
pub fn decode(bytes: &[u8; LEN]) -> SocketAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[..16]);
    SocketAddr::new(IpAddr::from(octets).to_canonical(), u16::from_be_bytes([bytes[16], bytes[17]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_what_it_encodes() {
        for text in ["127.0.0.1:80", "[::1]:65535", "10.0.0.7:1", "[fd00::2]:443"] {
            let to: SocketAddr = text.parse().unwrap();
            assert_eq!(decode(&encode(to)), to);
        }
    }
}
