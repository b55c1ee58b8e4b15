//! The guest's interfaces, addresses, routes and neighbours, set by rtnetlink(7). The guest owns the pod's addresses: all that CNI gave
//! to the pod's namespace on the host is set here.

use std::fs;
use std::io;
use std::net::IpAddr;

use futures::TryStreamExt;
use husk_agent_api::agent::{Interface, Neighbour, Route};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use thiserror::Error;

/// Index of `lo` in every network namespace (LOOPBACK_IFINDEX of the kernel).
const LOOPBACK: u32 = 1;

/// Why the network is not as asked for.
#[derive(Debug, Error)]
pub(crate) enum NetError {
    #[error("Could not open a netlink socket")]
    Socket(#[source] io::Error),
    #[error("{text:?} is not {what}")]
    Parse { text: String, what: &'static str },
    #[error("No interface has the address {mac}; there are {there}")]
    NoInterface { mac: String, there: String },
    #[error("No interface is called {0:?}")]
    NoName(String),
    #[error("Could not {what}")]
    Netlink {
        what: String,
        #[source]
        source: rtnetlink::Error,
    },
}

/// An interface as the kernel has it.
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// Sets everything, the loopback first.
pub(crate) async fn configure(
    interfaces: &[Interface],
    routes: &[Route],
    neighbours: &[Neighbour],
) -> Result<(), NetError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::Socket)?;
    // It ends when the last handle is dropped.
    tokio::spawn(connection);
    let loopback = LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(loopback).execute().await.map_err(doing(|| "bring lo up".into()))?;
    let mut links = if interfaces.is_empty() { Vec::new() } else { list(&handle).await? };
    for interface in interfaces {
        set_interface(&handle, &mut links, interface).await?;
    }
    // A gateway is reachable only once the route to its own network is there.
    let (gateways, on_link): (Vec<_>, Vec<_>) = routes.iter().partition(|route| !route.gateway.is_empty());
    for route in on_link.into_iter().chain(gateways) {
        let message = route_message(route, index_of(&links, &route.interface)?)?;
        handle.route().add(message).replace().execute().await.map_err(doing(|| format!("add the route {route}")))?;
    }
    for neighbour in neighbours {
        let index = index_of(&links, &neighbour.interface)?;
        let address = parse_address(&neighbour.address)?;
        let request = handle.neighbours().add(index, address).link_layer_address(&parse_mac(&neighbour.mac)?);
        request.replace().execute().await.map_err(doing(|| format!("add the neighbour {}", neighbour.address)))?;
    }
    Ok(())
}

async fn list(handle: &Handle) -> Result<Vec<Link>, NetError> {
    let messages = handle.link().get().execute().try_collect::<Vec<_>>().await;
    let messages = messages.map_err(doing(|| "list the interfaces".into()))?;
    Ok(messages
        .into_iter()
        .map(|message| {
            let mut link = Link { index: message.header.index, name: String::new(), mac: Vec::new() };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => link.name = name,
                    LinkAttribute::Address(mac) => link.mac = mac,
                    _ => {}
                }
            }
            link
        })
        .collect())
}

async fn set_interface(handle: &Handle, links: &mut [Link], interface: &Interface) -> Result<(), NetError> {
    let mac = parse_mac(&interface.mac)?;
    let position = links.iter().position(|link| link.mac == mac && link.index != LOOPBACK).ok_or_else(|| {
        let there = links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ");
        NetError::NoInterface { mac: interface.mac.clone(), there }
    })?;
    let index = links[position].index;
    // Another interface may have the name; it gets its own later.
    if let Some(other) = links.iter_mut().find(|link| link.name == interface.name && link.index != index) {
        other.name = format!("husk{}", other.index);
        let message = LinkUnspec::new_with_index(other.index).name(&other.name).build();
        handle.link().set(message).execute().await.map_err(doing(|| format!("rename {}", interface.name)))?;
    }
    skip_duplicate_detection(&links[position].name);
    let mut message = LinkUnspec::new_with_index(index);
    if links[position].name != interface.name {
        message = message.name(&interface.name);
        links[position].name = interface.name.clone();
    }
    if interface.mtu != 0 {
        message = message.mtu(interface.mtu);
    }
    // The kernel applies name and MTU before the flags (do_setlink in net/core/rtnetlink.c).
    let request = handle.link().set(message.up().build());
    request.execute().await.map_err(doing(|| format!("bring {} up", interface.name)))?;
    for text in &interface.addresses {
        let (address, prefix) = parse_cidr(text)?;
        let mut request = handle.address().add(index, address, prefix);
        if address.is_ipv6() {
            // Usable at once: CNI has made sure that the address is the pod's alone.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.replace().execute().await.map_err(doing(|| format!("add {text} to {}", interface.name)))?;
    }
    Ok(())
}

/// The link-local address too shall be usable at once: ip-sysctl.rst, accept_dad. Without IPv6 there is no such file.
fn skip_duplicate_detection(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_dad");
    match fs::write(&path, "0") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!("Could not write {path}: {error}"),
        _ => {}
    }
}

fn route_message(route: &Route, index: u32) -> Result<RouteMessage, NetError> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new().output_interface(index);
    builder.get_mut().header.address_family = if route.ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let unfit = |text: &str, what| NetError::Parse { text: text.to_owned(), what };
    if !route.destination.is_empty() {
        let (address, prefix) = parse_cidr(&route.destination)?;
        builder.get_mut().header.address_family =
            if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        builder = builder
            .destination_prefix(address, prefix)
            .map_err(|_| unfit(&route.destination, "a destination of the route's family"))?;
    }
    if !route.gateway.is_empty() {
        let gateway = parse_address(&route.gateway)?;
        builder = builder.gateway(gateway).map_err(|_| unfit(&route.gateway, "a gateway of the route's family"))?;
    }
    if !route.source.is_empty() {
        let source = parse_address(&route.source)?;
        builder = builder.pref_source(source).map_err(|_| unfit(&route.source, "a source of the route's family"))?;
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    if route.onlink {
        builder = builder.onlink();
    }
    let scope = u8::try_from(route.scope).map_err(|_| unfit(&route.scope.to_string(), "a scope"))?;
    Ok(builder.scope(RouteScope::from(scope)).build())
}

fn index_of(links: &[Link], name: &str) -> Result<u32, NetError> {
    if name == "lo" {
        return Ok(LOOPBACK);
    }
    links.iter().find(|link| link.name == name).map(|link| link.index).ok_or_else(|| NetError::NoName(name.to_owned()))
}

fn parse_mac(text: &str) -> Result<[u8; 6], NetError> {
    let unfit = || NetError::Parse { text: text.to_owned(), what: "a MAC address" };
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(unfit)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| unfit())?;
    }
    if parts.next().is_some() { Err(unfit()) } else { Ok(mac) }
}

fn parse_address(text: &str) -> Result<IpAddr, NetError> {
    text.parse().map_err(|_| NetError::Parse { text: text.to_owned(), what: "an IP address" })
}

fn parse_cidr(text: &str) -> Result<(IpAddr, u8), NetError> {
    let unfit = || NetError::Parse { text: text.to_owned(), what: "an IP address with a prefix length" };
    let (address, prefix) = text.split_once('/').ok_or_else(unfit)?;
    let address: IpAddr = address.parse().map_err(|_| unfit())?;
    let prefix: u8 = prefix.parse().map_err(|_| unfit())?;
    if prefix > if address.is_ipv6() { 128 } else { 32 } { Err(unfit()) } else { Ok((address, prefix)) }
}

fn doing(what: impl FnOnce() -> String) -> impl FnOnce(rtnetlink::Error) -> NetError {
    move |source| NetError::Netlink { what: what(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::route::RouteAttribute;

    #[test]
    fn parses_macs() {
        assert_eq!(parse_mac("02:00:0a:ff:00:01").unwrap(), [2, 0, 10, 255, 0, 1]);
        for text in
            ["", "02:00:0a:ff:00", "02:00:0a:ff:00:01:02", "2:0:a:f:0:1", "+2:00:0a:ff:00:01", "zz:00:0a:ff:00:01"]
        {
            assert!(parse_mac(text).is_err(), "{text}");
        }
    }

    #[test]
    fn parses_prefixes() {
        assert_eq!(parse_cidr("10.0.0.2/24").unwrap(), ("10.0.0.2".parse().unwrap(), 24));
        assert_eq!(parse_cidr("fd00::2/128").unwrap(), ("fd00::2".parse().unwrap(), 128));
        for text in ["10.0.0.2", "10.0.0.2/33", "fd00::/129", "x/8", "10.0.0.0/-1"] {
            assert!(parse_cidr(text).is_err(), "{text}");
        }
    }

    #[test]
    fn builds_default_routes_of_both_families() {
        let route = Route { gateway: "10.0.0.1".into(), onlink: true, metric: 5, ..Default::default() };
        let message = route_message(&route, 2).unwrap();
        assert_eq!(message.header.address_family, AddressFamily::Inet);
        assert_eq!(message.header.destination_prefix_length, 0);
        assert!(message.attributes.contains(&RouteAttribute::Priority(5)));
        let route = Route { gateway: "fd00::1".into(), ipv6: true, ..Default::default() };
        assert_eq!(route_message(&route, 2).unwrap().header.address_family, AddressFamily::Inet6);
        let mixed = Route { gateway: "10.0.0.1".into(), destination: "fd00::/64".into(), ..Default::default() };
        assert!(route_message(&mixed, 2).is_err());
    }
}
