//! What CNI left in the pod's namespace, read by rtnetlink(7), as messages for the agent.

use std::net::IpAddr;

use futures::TryStreamExt;
use husk_agent_api::agent::{Interface, Neighbour, Route};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags,
    RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{NetworkError, TAP_PREFIX};

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
}

impl Link {
    fn new(message: &LinkMessage) -> Self {
        let header = &message.header;
        let mut link = Self {
            index: header.index,
            up: header.flags.contains(LinkFlags::Up),
            ethernet: header.link_layer_type == LinkLayerType::Ether && !header.flags.contains(LinkFlags::Loopback),
            ..Self::default()
        };
        let mut has_mac = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.enslaved = *index != 0,
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
        self.name
            .strip_prefix(TAP_PREFIX)
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
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
            ..Interface::default()
        })
        .collect())
}

/// The address as CIDR; nothing for what the guest makes by itself (link-local IPv6, temporary ones).
fn address(message: &AddressMessage) -> Option<String> {
    if message.header.flags.contains(AddressHeaderFlags::Secondary) && message.header.family == AddressFamily::Inet6 {
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
    match local.or(peer)? {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => None,
        ip => Some(format!("{ip}/{}", message.header.prefix_len)),
    }
}

/// The main table's routes over `links`, those without a gateway first.
pub(super) async fn routes(handle: &Handle, links: &[Link]) -> Result<Vec<Route>, NetworkError> {
    let mut routes = Vec::new();
    for all in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let messages: Vec<RouteMessage> =
            handle.route().get(all).execute().try_collect().await.map_err(failed("list the pod's routes"))?;
        routes.extend(messages.iter().filter_map(|message| route(message, links)));
    }
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(routes)
}

/// The agent's form of a route; nothing for other tables, types and interfaces, and for what the guest's kernel makes by itself
/// for an address or learns from router advertisements.
fn route(message: &RouteMessage, links: &[Link]) -> Option<Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra) {
        return None;
    }
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        ipv6: header.address_family == AddressFamily::Inet6,
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Route::default()
    };
    let mut table = u32::from(header.table);
    let mut index = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(source) => route.source = route_address(source)?,
            RouteAttribute::Destination(to) => {
                route.destination = format!("{}/{}", route_address(to)?, header.destination_prefix_length);
            }
            RouteAttribute::MultiPath(hops) => {
                // The agent's route has one next hop; the first of the pod's own is a working one.
                let hop = hops.iter().find(|hop| links.iter().any(|link| link.index == hop.interface_index))?;
                index = Some(hop.interface_index);
                route.onlink |= hop.flags.contains(RouteNextHopFlags::Onlink);
                route.gateway = hop_gateway(hop);
            }
            other => {
                if let Some(gateway) = gateway(other) {
                    route.gateway = gateway;
                }
            }
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    route.interface = links.iter().find(|link| Some(link.index) == index)?.name.clone();
    Some(route)
}

/// The gateway of one next hop of several; empty: on link.
fn hop_gateway(hop: &RouteNextHop) -> String {
    hop.attributes.iter().find_map(gateway).unwrap_or_default()
}

fn gateway(attribute: &RouteAttribute) -> Option<String> {
    match attribute {
        RouteAttribute::Gateway(address) => route_address(address),
        RouteAttribute::Via(RouteVia::Inet(ip)) => Some(ip.to_string()),
        RouteAttribute::Via(RouteVia::Inet6(ip)) => Some(ip.to_string()),
        _ => None,
    }
}

fn route_address(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
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
