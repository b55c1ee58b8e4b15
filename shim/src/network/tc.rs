//! Traffic control: what comes in on one interface goes out on another (tc-mirred(8)), by an ingress qdisc and one filter.

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};

/// The place of a filter on what comes in: the same for the qdiscs `ingress` and `clsact` (linux/pkt_sched.h, TC_H_MIN_INGRESS).
const INGRESS: u32 = 0xffff_fff2;

/// All of husk's filters have this priority; it tells them from others.
const PRIORITY: u16 = 0x6875;

/// Every protocol (linux/if_ether.h, ETH_P_ALL), in network byte order.
const ALL: u16 = 0x0003_u16.to_be();

/// Sends everything that comes in on the interface `from` out on the interface `to`.
pub(super) async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    match handle.qdisc().add(signed(from)).ingress().execute().await {
        // Somebody else's ingress or clsact is there: the filter may join it.
        Err(error) if errno(&error) == Some(libc::EEXIST) => {}
        other => other?,
    }
    let filter = handle.traffic_filter(signed(from)).add().parent(INGRESS).priority(PRIORITY).protocol(ALL);
    filter.redirect(to)?.execute().await
}

/// Removes husk's filter of the interface, and its ingress qdisc if no other filter is left. Absent is success.
pub(super) async fn remove(handle: &mut Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut filter = TcMessage::with_index(signed(index));
    filter.header.parent = INGRESS.into();
    filter.header.info = u32::from(TcHandle { major: PRIORITY, minor: ALL });
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(filter));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    match acknowledged(handle, request).await {
        // No filter, no qdisc, or no interface.
        Err(error) if is_absent(&error) => return Ok(()),
        other => other?,
    }
    let others: Vec<TcMessage> = handle.traffic_filter(signed(index)).get().ingress().execute().try_collect().await?;
    let kinds: Vec<TcMessage> = handle.qdisc().get().index(signed(index)).execute().try_collect().await?;
    let ours = kinds.iter().any(|qdisc| {
        qdisc.header.index == signed(index)
            && qdisc.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(kind) if kind == "ingress"))
    });
    if ours && others.is_empty() {
        let mut removal = handle.qdisc().del(signed(index));
        removal.message_mut().header.parent = TcHandle::INGRESS;
        match removal.execute().await {
            Err(error) if is_absent(&error) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Sends a request and waits for its acknowledgement.
async fn acknowledged(
    handle: &mut Handle,
    request: NetlinkMessage<RouteNetlinkMessage>,
) -> Result<(), rtnetlink::Error> {
    use futures::StreamExt;
    use rtnetlink::packet_core::NetlinkPayload;

    let mut replies = handle.request(request)?;
    while let Some(reply) = replies.next().await {
        match reply.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => {
                return Err(rtnetlink::Error::NetlinkError(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// An interface's number, as tc's messages have it.
fn signed(index: u32) -> i32 {
    i32::from_ne_bytes(index.to_ne_bytes())
}

/// The kernel's error number.
pub(super) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

/// What the kernel says about qdiscs, filters and links that are not there.
pub(super) fn is_absent(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV))
}
