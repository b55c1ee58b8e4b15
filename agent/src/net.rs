//! The guest's interfaces, addresses, routes and neighbours, set by rtnetlink(7). The guest owns the pod's addresses: all that CNI gave
//! to the pod's namespace on the host is set here.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::RawFd;

use futures::{StreamExt, TryStreamExt};
use husk_agent_api::agent::{Interface, StartPodRequest};
use nix::errno::Errno;
use rtnetlink::packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Parseable,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{Handle, LinkUnspec};
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
    #[error("A {what} is no message of rtnetlink's")]
    Message {
        what: &'static str,
        #[source]
        source: DecodeError,
    },
    #[error("A route goes over interface {0} of the host, which is not one of the pod's")]
    NoIndex(u32),
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
    /// Its number in the pod's namespace on the host, for those of the pod's.
    host_index: Option<u32>,
    name: String,
    mac: Vec<u8>,
}

/// Sets everything that the request names, the loopback first.
pub(crate) async fn configure(request: &StartPodRequest) -> Result<(), NetError> {
    let (connection, mut handle, _) = rtnetlink::new_connection().map_err(NetError::Socket)?;
    // It ends when the last handle is dropped.
    tokio::spawn(connection);
    let loopback = LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(loopback).execute().await.map_err(doing(|| "bring lo up".into()))?;
    let mut links = if request.interfaces.is_empty() { Vec::new() } else { list(&handle).await? };
    for interface in &request.interfaces {
        set_interface(&handle, &mut links, interface).await?;
    }
    for bytes in &request.routes {
        let mut route = RouteMessage::parse(bytes).map_err(|source| NetError::Message { what: "route", source })?;
        renumber(&mut route, &links)?;
        let message = RouteNetlinkMessage::NewRoute(route.clone());
        append(&mut handle, message).await.map_err(doing(|| format!("add the route {route:?}")))?;
    }
    for bytes in &request.rules {
        let rule = RuleMessage::parse(bytes).map_err(|source| NetError::Message { what: "routing rule", source })?;
        let mut request = handle.rule().add();
        *request.message_mut() = rule.clone();
        request.execute().await.map_err(doing(|| format!("add the routing rule {rule:?}")))?;
    }
    for neighbour in &request.neighbours {
        let index = index_of(&links, &neighbour.interface)?;
        let address = parse_address(&neighbour.address)?;
        let request = handle.neighbours().add(index, address).link_layer_address(&parse_mac(&neighbour.mac)?);
        request.replace().execute().await.map_err(doing(|| format!("add the neighbour {}", neighbour.address)))?;
    }
    Ok(())
}

/// Adds a route beside others to the same destination: a link-local network, say, is behind every interface. One that is there is fine.
async fn append(handle: &mut Handle, message: RouteNetlinkMessage) -> Result<(), rtnetlink::Error> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
    let mut replies = handle.request(request)?;
    while let Some(reply) = replies.next().await {
        match reply.payload {
            NetlinkPayload::Error(error) if error.raw_code() == -(Errno::EEXIST as i32) => {}
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(rtnetlink::Error::NetlinkError(error)),
            _ => {}
        }
    }
    Ok(())
}

/// Puts the guest's numbers of interfaces in the place of the host's.
fn renumber(route: &mut RouteMessage, links: &[Link]) -> Result<(), NetError> {
    let change = |index: &mut u32| {
        let link = links.iter().find(|link| link.host_index == Some(*index)).ok_or(NetError::NoIndex(*index))?;
        *index = link.index;
        Ok(())
    };
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => change(index)?,
            RouteAttribute::MultiPath(hops) => hops.iter_mut().try_for_each(|hop| change(&mut hop.interface_index))?,
            _ => {}
        }
    }
    Ok(())
}

/// Moves interfaces, by their addresses, to another network namespace.
pub(crate) async fn move_to(interfaces: &[Interface], namespace: RawFd) -> Result<(), NetError> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::Socket)?;
    tokio::spawn(connection);
    let links = list(&handle).await?;
    for interface in interfaces {
        let mac = device_mac(interface)?;
        let link = links.iter().find(|link| link.mac == mac && link.index != LOOPBACK);
        // One that is not there is told when it is configured.
        let Some(link) = link else { continue };
        let message = LinkUnspec::new_with_index(link.index).setns_by_fd(namespace).build();
        handle.link().set(message).execute().await.map_err(doing(|| format!("move {}", link.name)))?;
    }
    Ok(())
}

async fn list(handle: &Handle) -> Result<Vec<Link>, NetError> {
    let messages = handle.link().get().execute().try_collect::<Vec<_>>().await;
    let messages = messages.map_err(doing(|| "list the interfaces".into()))?;
    Ok(messages
        .into_iter()
        .map(|message| {
            let mut link = Link { index: message.header.index, host_index: None, name: String::new(), mac: Vec::new() };
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
    let (mac, device) = (parse_mac(&interface.mac)?, device_mac(interface)?);
    let position = links.iter().position(|link| link.mac == device && link.index != LOOPBACK).ok_or_else(|| {
        let there = links.iter().map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ");
        let mac = if interface.device_mac.is_empty() { &interface.mac } else { &interface.device_mac };
        NetError::NoInterface { mac: mac.clone(), there }
    })?;
    let index = links[position].index;
    // Another interface may have the name; it gets its own later.
    if let Some(other) = links.iter_mut().find(|link| link.name == interface.name && link.index != index) {
        other.name = format!("husk{}", other.index);
        let message = LinkUnspec::new_with_index(other.index).name(&other.name).build();
        handle.link().set(message).execute().await.map_err(doing(|| format!("rename {}", interface.name)))?;
    }
    links[position].host_index = Some(interface.index);
    set_ipv6(&links[position].name, interface);
    let mut message = LinkUnspec::new_with_index(index);
    if device != mac {
        message = message.address(mac.to_vec());
        links[position].mac = mac.to_vec();
    }
    if links[position].name != interface.name {
        message = message.name(&interface.name);
        links[position].name = interface.name.clone();
    }
    if interface.mtu != 0 {
        message = message.mtu(interface.mtu);
    }
    if interface.noarp {
        message = message.arp(false);
    }
    // The kernel applies address, name and MTU before the flags (do_setlink in net/core/rtnetlink.c).
    let request = handle.link().set(message.up().build());
    request.execute().await.map_err(doing(|| format!("bring {} up", interface.name)))?;
    for text in &interface.addresses {
        let (address, prefix) = parse_cidr(text)?;
        let mut request = handle.address().add(index, address, prefix);
        // Routes are the pod's own, also where a plugin has taken the kernel's away (ptp).
        let mut flags = AddressFlags::Noprefixroute;
        if address.is_ipv6() {
            // Usable at once: CNI has made sure that the address is the pod's alone.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            flags |= AddressFlags::Nodad;
        }
        request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        request.replace().execute().await.map_err(doing(|| format!("add {text} to {}", interface.name)))?;
    }
    Ok(())
}

/// Parameters of the interface before it comes up (Documentation/networking/ip-sysctl.rst). Without IPv6 there are no such files.
fn set_ipv6(name: &str, interface: &Interface) {
    let set = |key: &str, value: &str| {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/{key}");
        match fs::write(&path, value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => tracing::warn!("Could not write {path}: {error}"),
            _ => {}
        }
    };
    // A link-local address that the kernel makes shall be usable at once too.
    set("accept_dad", "0");
    let is_link_local = |text: &String| {
        parse_cidr(text).is_ok_and(|(address, _)| match address {
            IpAddr::V6(address) => address.is_unicast_link_local(),
            IpAddr::V4(_) => false,
        })
    };
    if interface.addresses.iter().any(is_link_local) {
        // None but those given: IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
        set("addr_gen_mode", "1");
    }
    for (key, value) in &interface.ipv6 {
        set(key, value);
    }
}

/// The address by which the interface's device is found: in a restored template it is the template's.
fn device_mac(interface: &Interface) -> Result<[u8; 6], NetError> {
    parse_mac(if interface.device_mac.is_empty() { &interface.mac } else { &interface.device_mac })
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
    fn routes_go_over_the_guests_interfaces() {
        let links = [Link { index: 2, host_index: Some(7), name: "eth0".into(), mac: Vec::new() }];
        let mut route = RouteMessage::default();
        route.attributes = vec![RouteAttribute::Oif(7)];
        renumber(&mut route, &links).unwrap();
        assert_eq!(route.attributes, [RouteAttribute::Oif(2)]);
        assert!(matches!(renumber(&mut route, &links), Err(NetError::NoIndex(2))));
        assert!(RouteMessage::parse(&[0; 3]).is_err() && RuleMessage::parse(&[0; 3]).is_err());
    }
}
