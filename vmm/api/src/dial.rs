//! Hand-over of vsock connections between VMM and shim: one message a connection on a SOCK_SEQPACKET pair, with the host end
//! of a stream socketpair as SCM_RIGHTS. A guest's connect to CID 2 port P becomes `GuestDialled { port: P }`; the shim refuses
//! by closing the descriptor. The shim reaches a guest's listener with `DialGuest`; the VMM refuses in the same way.
#![forbid(unsafe_code)]

/// Length of an encoded message in bytes.
pub const LEN: usize = 8;

/// One message; exactly one descriptor travels with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// VMM to shim: the guest connected to this port of the host.
    GuestDialled {
        /// The host's port.
        port: u32,
    },
    /// Shim to VMM: connect to this port of the guest.
    DialGuest {
        /// The guest's port.
        port: u32,
    },
}

impl Message {
    /// The bytes to send.
    pub fn encode(self) -> [u8; LEN] {
        let (kind, port) = match self {
            Self::GuestDialled { port } => (1u32, port),
            Self::DialGuest { port } => (2u32, port),
        };
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..].copy_from_slice(&port.to_le_bytes());
        bytes
    }

    /// What the bytes say; nothing if they are no message.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LEN] = bytes.try_into().ok()?;
        let port = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        match u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) {
            1 => Some(Self::GuestDialled { port }),
            2 => Some(Self::DialGuest { port }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_what_it_encodes_and_nothing_else() {
        for message in [Message::GuestDialled { port: 1024 }, Message::DialGuest { port: u32::MAX }] {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(&[3, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Message::decode(&[1, 0, 0, 0]), None);
    }
}
