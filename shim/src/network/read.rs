//! What CNI left in the pod's namespace, read by rtnetlink(7), as messages for the agent.

use futures::TryStreamExt;
use husk_agent_api::agent::{Interface, Neighbour};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::{NetworkError, TAP_PREFIX};

/// The table that the kernel alone fills (linux/rtnetlink.h, RT_TABLE_LOCAL).
const LOCAL_TABLE: u8 = 255;

/// One interface of the namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    /// Ethernet frames with a hardware address.
    ethernet: bool,
    up: bool,
    /// Belongs to a bridge or bond.
    enslaved: bool,
    /// Neighbours are not asked for.
    noarp: bool,
    /// A tap or tun.
    tun: bool,
}

impl Link {
    fn new(message: &LinkMessage) -> Self {
        let header = &message.header;
        let mut link = Self {
            index: header.index,
            up: header.flags.contains(LinkFlags::Up),
            noarp: header.flags.contains(LinkFlags::Noarp),
            ethernet: header.link_layer_type == LinkLayerType::Ether && !header.flags.contains(LinkFlags::Loopback),
            ..Self::default()
        };
        let mut has_mac = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.enslaved = *index != 0,
                LinkAttribute::LinkInfo(infos) => link.tun = infos.contains(&LinkInfo::Kind(InfoKind::Tun)),
                LinkAttribute::Address(address) => {
                    if let Ok(mac) = <[u8; 6]>::try_from(address.as_slice()) {
                        link.mac = mac;
                        has_mac = true;
                    }
                }
                _ => {}
            }
        }
        link.ethernet &= has_mac;
        link
    }

    /// One of husk's own taps: "husk" and a number.
    pub(super) fn is_tap(&self) -> bool {
        let number = self.name.strip_prefix(TAP_PREFIX);
        self.tun && number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    }

    /// An interface that the guest is to own.
    pub(super) fn is_pods(&self) -> bool {
        self.ethernet && self.up && !self.enslaved && !self.is_tap()
    }

    /// The MTU, if a virtio-net device can have it (68 bytes is IPv4's least: RFC 791).
    pub(super) fn mtu(&self) -> Result<u16, NetworkError> {
        match u16::try_from(self.mtu) {
            Ok(mtu) if mtu >= 68 => Ok(mtu),
            _ => Err(NetworkError::Mtu { name: self.name.clone(), mtu: self.mtu }),
        }
    }
}

/// Every interface of the namespace.
pub(super) async fn links(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let messages: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(failed("list the pod's network interfaces"))?;
    Ok(messages.iter().map(Link::new).collect())
}

/// The interfaces with their addresses, in the order of `links`.
pub(super) async fn interfaces(handle: &Handle, links: &[Link]) -> Result<Vec<Interface>, NetworkError> {
    let messages: Vec<AddressMessage> =
        handle.address().get().execute().try_collect().await.map_err(failed("list the pod's addresses"))?;
    Ok(links
        .iter()
        .map(|link| Interface {
            mac: mac_text(&link.mac),
            name: link.name.clone(),
            addresses: messages.iter().filter(|m| m.header.index == link.index).filter_map(address).collect(),
            mtu: link.mtu,
            index: link.index,
            noarp: link.noarp,
            ..Interface::default()
        })
        .collect())
}

/// The address as CIDR; nothing for what an IPv6 kernel makes of router advertisements: the guest hears those itself.
fn address(message: &AddressMessage) -> Option<String> {
    let flags = message.header.flags;
    let set = flags.contains(AddressHeaderFlags::Permanent) && !flags.contains(AddressHeaderFlags::Secondary);
    if message.header.family == AddressFamily::Inet6 && !set {
        return None;
    }
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            _ => {}
        }
    }
    match (local, peer) {
        // The length is that of the peer's network, to which there is a route.
        (Some(local), Some(peer)) if local != peer => {
            Some(format!("{local}/{}", if local.is_ipv4() { 32 } else { 128 }))
        }
        _ => Some(format!("{}/{}", local.or(peer)?, message.header.prefix_len)),
    }
}

/// The routes over `links` and those that refuse, of every table but `local`, those without a gateway first.
pub(super) async fn routes(handle: &Handle, links: &[Link]) -> Result<Vec<RouteMessage>, NetworkError> {
    let mut routes = Vec::new();
    for all in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let messages: Vec<RouteMessage> =
            handle.route().get(all).execute().try_collect().await.map_err(failed("list the pod's routes"))?;
        routes.extend(messages.into_iter().filter_map(|message| route(message, links)));
    }
    routes.sort_by_key(|route| route.attributes.iter().any(has_gateway));
    Ok(routes)
}

/// The route as it is to be in the guest; nothing for what the guest's kernel makes by itself (its local table) or learns from router
/// advertisements, and for interfaces that are not the guest's.
fn route(mut message: RouteMessage, links: &[Link]) -> Option<RouteMessage> {
    let header = &mut message.header;
    let refuses =
        matches!(header.kind, RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw);
    let learnt = header.protocol == RouteProtocol::Ra || header.flags.contains(RouteFlags::Cloned);
    let made = refuses && header.protocol == RouteProtocol::Kernel;
    if !(refuses || header.kind == RouteType::Unicast) || learnt || made || header.table == LOCAL_TABLE {
        return None;
    }
    // All else is the kernel's state of the moment, which it takes from nobody.
    header.flags &= RouteFlags::Onlink;
    let guests = |index: u32| links.iter().any(|link| link.index == index);
    let mut has_interface = false;
    for attribute in &mut message.attributes {
        match attribute {
            RouteAttribute::Oif(index) if !refuses => {
                has_interface = true;
                if !guests(*index) {
                    return None;
                }
            }
            RouteAttribute::MultiPath(hops) => {
                hops.retain(|hop| guests(hop.interface_index));
                for hop in hops.iter_mut() {
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
                has_interface = !hops.is_empty();
            }
            _ => {}
        }
    }
    // An IPv6 kernel says that a refusing route goes over `lo`.
    message.attributes.retain(|attribute| {
        let lo = refuses && matches!(attribute, RouteAttribute::Oif(_));
        !lo && !matches!(attribute, RouteAttribute::CacheInfo(_))
    });
    (refuses || has_interface).then_some(message)
}

fn has_gateway(attribute: &RouteAttribute) -> bool {
    match attribute {
        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => true,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.attributes.iter().any(has_gateway)),
        _ => false,
    }
}

/// The routing rules, without the kernel's own.
pub(super) async fn rules(handle: &Handle) -> Result<Vec<RuleMessage>, NetworkError> {
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let messages: Vec<RuleMessage> =
            handle.rule().get(version).execute().try_collect().await.map_err(failed("list the pod's routing rules"))?;
        rules.extend(messages.into_iter().filter(|rule| !rule.attributes.iter().any(is_kernels)));
    }
    Ok(rules)
}

fn is_kernels(attribute: &RuleAttribute) -> bool {
    matches!(attribute, RuleAttribute::Protocol(RouteProtocol::Kernel))
}

/// The static neighbours on `links`.
pub(super) async fn neighbours(handle: &Handle, links: &[Link]) -> Result<Vec<Neighbour>, NetworkError> {
    let mut neighbours = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let messages: Vec<NeighbourMessage> = handle
            .neighbours()
            .get()
            .set_address_family(family)
            .execute()
            .try_collect()
            .await
            .map_err(failed("list the pod's neighbours"))?;
        neighbours.extend(messages.iter().filter_map(|message| neighbour(message, links)));
    }
    Ok(neighbours)
}

/// The agent's form of a neighbour; nothing if it was learnt and not set.
fn neighbour(message: &NeighbourMessage, links: &[Link]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let link = links.iter().find(|link| link.index == message.header.ifindex)?;
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => {}
        }
    }
    Some(Neighbour { interface: link.name.clone(), address: address?, mac: mac_text(&mac?), ..Neighbour::default() })
}

fn mac_text(mac: &[u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn failed(what: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError + '_ {
    move |cause| NetworkError::Request { what: what.to_owned(), cause }
}
