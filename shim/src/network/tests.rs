//! A pod's namespace with one end of a veth pair, its other end in a second namespace that plays the host.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use futures::TryStreamExt;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_core::Parseable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::{LinkVeth, RouteMessageBuilder};

use super::*;

const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A new network namespace, held by a descriptor.
pub(super) fn namespace() -> OwnedFd {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap().into()
    })
    .join()
    .unwrap()
}

fn path(netns: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", netns.as_raw_fd()).into()
}

async fn index(handle: &Handle, name: &str) -> u32 {
    read::links(handle).await.unwrap().into_iter().find(|link| link.name == name).unwrap().index
}

/// What a CNI plugin does: veth pair, /32-like routes, a static neighbour.
async fn like_cni(pod: &OwnedFd, host: &OwnedFd) {
    let in_pod = connect(pod).await.unwrap();
    let handle = &in_pod.handle;
    handle.link().add(LinkVeth::new("eth0", "host0").build()).execute().await.unwrap();
    let (eth0, host0) = (index(handle, "eth0").await, index(handle, "host0").await);
    let moved = LinkUnspec::new_with_index(host0).setns_by_fd(host.as_raw_fd()).build();
    handle.link().set(moved).execute().await.unwrap();
    let up = LinkUnspec::new_with_index(eth0).address(POD_MAC.to_vec()).mtu(1450).up().build();
    handle.link().set(up).execute().await.unwrap();
    let address = Ipv4Addr::new(10, 9, 0, 2);
    handle.address().add(eth0, address.into(), 24).execute().await.unwrap();
    let v6 = "fd00::2".parse().unwrap();
    handle.address().add(eth0, v6, 64).execute().await.unwrap();
    let gateway = Ipv4Addr::new(169, 254, 1, 1);
    let on_link = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(gateway, 32)
        .output_interface(eth0)
        .scope(rtnetlink::packet_route::route::RouteScope::Link)
        .build();
    handle.route().add(on_link).execute().await.unwrap();
    let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(eth0).build();
    handle.route().add(default).execute().await.unwrap();
    handle.neighbours().add(eth0, gateway.into()).link_layer_address(&HOST_MAC).execute().await.unwrap();

    let on_host = connect(host).await.unwrap();
    let handle = &on_host.handle;
    let host0 = index(handle, "host0").await;
    let up = LinkUnspec::new_with_index(host0).address(HOST_MAC.to_vec()).up().build();
    handle.link().set(up).execute().await.unwrap();
    handle.address().add(host0, Ipv4Addr::new(10, 9, 0, 1).into(), 24).execute().await.unwrap();
    handle.neighbours().add(host0, address.into()).link_layer_address(&POD_MAC).execute().await.unwrap();
}

/// Waits for the tap's next frame that carries `wanted`; without the virtio-net header (10 bytes).
fn receive(tap: &mut File, wanted: &[u8]) -> Vec<u8> {
    let mut buffer = [0; 2048];
    for _ in 0..64 {
        let readable = poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(tap), PollFlags::POLLIN)], 5000_u16).unwrap();
        assert_eq!(readable, 1, "no frame came");
        let length = tap.read(&mut buffer).unwrap();
        let frame = &buffer[10..length];
        if frame.windows(wanted.len()).any(|window| window == wanted) {
            return frame.to_vec();
        }
    }
    panic!("other frames only");
}

/// An Ethernet frame with an UDP datagram from the pod to the host.
fn datagram(text: &[u8]) -> Vec<u8> {
    let length = |header: usize| u16::try_from(header + text.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0];
    ip.extend(length(28));
    ip.extend([0, 1, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    let mut frame = [HOST_MAC, POD_MAC].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(7000_u16.to_be_bytes());
    frame.extend(7001_u16.to_be_bytes());
    frame.extend(length(8));
    frame.extend([0, 0]);
    frame.extend(text);
    frame
}

#[tokio::test]
#[ignore = "needs root, veth, tun, sch_ingress, cls_u32 and act_mirred"]
async fn joins_the_guest_to_the_pods_wire() {
    let (pod, host) = (namespace(), namespace());
    like_cni(&pod, &host).await;
    let mut prepared = prepare(&path(&pod)).await.unwrap();

    assert_eq!(prepared.interfaces.len(), 1);
    let interface = &prepared.interfaces[0];
    assert_eq!((interface.name.as_str(), interface.mac.as_str(), interface.mtu), ("eth0", "02:00:00:00:00:02", 1450));
    assert_eq!(interface.addresses[..2], ["10.9.0.2/24", "fd00::2/64"]);
    assert_eq!(interface.index, index(&connect(&pod).await.unwrap().handle, "eth0").await);
    let routes: Vec<_> = prepared.routes.iter().map(|bytes| RouteMessage::parse(bytes).unwrap()).collect();
    let seen = |route: &RouteMessage| {
        let gateway = route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)));
        (route.header.address_family, route.header.destination_prefix_length, u8::from(route.header.scope), gateway)
    };
    let seen: Vec<_> = routes.iter().map(seen).collect();
    let (v4, v6) = (AddressFamily::Inet, AddressFamily::Inet6);
    assert_eq!(seen[..2], [(v4, 24, 253, false), (v4, 32, 253, false)]);
    // fd00::/64, and fe80::/64 if the link-local address was there already.
    assert!(seen[2..seen.len() - 1].iter().all(|route| *route == (v6, 64, 0, false)), "{seen:?}");
    assert_eq!(seen.last(), Some(&(v4, 0, 0, true)));
    assert!(prepared.rules.is_empty());
    assert_eq!(prepared.neighbours.len(), 1);
    assert_eq!(prepared.neighbours[0].mac, "02:00:00:00:00:01");
    let Tap { fd, mac, mtu, .. } = prepared.taps.remove(0);
    assert_eq!((mac, mtu), (POD_MAC, 1450));

    // Host to guest.
    let socket = netns::within(&host, "open a socket", || {
        UdpSocket::bind("10.9.0.1:7001").map_err(|cause| NetworkError::Netlink { cause })
    })
    .await
    .unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send_to(b"to the guest", "10.9.0.2:7000").unwrap();
    let mut tap = File::from(fd);
    let frame = receive(&mut tap, b"to the guest");
    assert_eq!(frame[..12], [POD_MAC, HOST_MAC].concat());

    // Guest to host.
    let mut packet = vec![0; 10];
    packet.extend(datagram(b"from the guest"));
    tap.write_all(&packet).unwrap();
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.to_string().as_str()), (&b"from the guest"[..], "10.9.0.2:7000"));

    // Again, as after a crash of the shim: the tap is there, the redirection too.
    teardown(&path(&pod)).await.unwrap();
    let in_pod = connect(&pod).await.unwrap();
    let links = read::links(&in_pod.handle).await.unwrap();
    assert!(!links.iter().any(Link::is_tap));
    let eth0 = index(&in_pod.handle, "eth0").await;
    let qdiscs: Vec<_> =
        in_pod.handle.qdisc().get().index(i32::try_from(eth0).unwrap()).execute().try_collect().await.unwrap();
    assert!(
        !qdiscs.iter().any(|q| q.header.index == i32::try_from(eth0).unwrap() && format!("{q:?}").contains("ingress"))
    );
    teardown(&path(&pod)).await.unwrap();
    drop(tap);
    prepare(&path(&pod)).await.unwrap();
}

#[tokio::test]
#[ignore = "needs root"]
async fn an_empty_namespace_has_no_interfaces() {
    let pod = namespace();
    let prepared = prepare(&path(&pod)).await.unwrap();
    assert!(prepared.taps.is_empty() && prepared.interfaces.is_empty() && prepared.routes.is_empty());
}

#[tokio::test]
async fn says_which_namespace_is_no_namespace() {
    let missing = prepare(Path::new("/no/such/netns")).await.unwrap_err();
    assert!(missing.to_string().contains("/no/such/netns"), "{missing}");
    teardown(Path::new("/no/such/netns")).await.unwrap();
    let wrong = prepare(Path::new("/dev/null")).await.unwrap_err();
    assert_eq!(wrong.to_string(), "/dev/null is not a network namespace");
    let hosts = prepare(Path::new("/proc/self/ns/net")).await.unwrap_err();
    assert!(hosts.to_string().contains("/proc/self/ns/net is the host's own"), "{hosts}");
    teardown(Path::new("/proc/self/ns/net")).await.unwrap();
    teardown(Path::new("/dev/null")).await.unwrap();
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_namespace_is_one_pods_and_its_size_is_bounded() {
    let pod = namespace();
    let connected = connect(&pod).await.unwrap();
    let handle = &connected.handle;
    for number in 0..=MAX_INTERFACES / 2 {
        let (one, two) = (format!("fifteen-bytes{number:02}"), format!("other{number}"));
        handle.link().add(LinkVeth::new(&one, &two).build()).execute().await.unwrap();
        for name in [one, two] {
            let index = index(handle, &name).await;
            handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.unwrap();
        }
    }
    let error = prepare(&path(&pod)).await.unwrap_err();
    assert!(error.to_string().contains("10 network interfaces; 9"), "{error}");
    assert!(!read::links(handle).await.unwrap().iter().any(Link::is_tap));
    // One that is down is not the pod's.
    let last = index(handle, "other0").await;
    handle.link().del(last).execute().await.unwrap();
    let other = index(handle, "other1").await;
    handle.link().set(LinkUnspec::new_with_index(other).down().build()).execute().await.unwrap();
    let prepared = prepare(&path(&pod)).await.unwrap();
    assert_eq!(prepared.interfaces.len(), 7);
    assert!(prepared.interfaces.iter().any(|interface| interface.name == "fifteen-bytes01"));

    let second = prepare(&path(&pod)).await.unwrap_err();
    assert!(matches!(second, NetworkError::Taken { .. }), "{second}");
    drop(prepared);
    teardown(&path(&pod)).await.unwrap();
    for number in 0..=MAX_ADDRESSES {
        let address = std::net::Ipv4Addr::from(0x0a00_0000 + u32::try_from(number).unwrap());
        handle.address().add(other + 1, address.into(), 32).execute().await.unwrap();
    }
    let error = prepare(&path(&pod)).await.unwrap_err();
    assert!(error.to_string().contains("addresses; 256 are possible"), "{error}");
}
