//! Events for containerd, by its ttrpc Events service: in order, kept while containerd is away (it may restart), bounded in number.

use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::util::{convert_to_any, timestamp};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::{self, context};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

/// Most events that wait for containerd; beyond that who has one to tell waits too.
const QUEUE: usize = 1024;

/// Longest wait for containerd's answer.
const LIMIT: Duration = Duration::from_secs(5);

/// First and longest pause between attempts to reach a containerd that is away: nothing tells a client that a server is back.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The end into which events are put.
pub(crate) struct Publisher {
    queue: mpsc::Sender<Envelope>,
    namespace: String,
}

impl Publisher {
    /// Begins to forward events to the ttrpc socket at `address`. The task ends once the publisher is dropped and all is told.
    pub(crate) fn start(address: &str, namespace: &str) -> (Self, JoinHandle<()>) {
        let (queue, events) = mpsc::channel(QUEUE);
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        (Self { queue, namespace: namespace.to_owned() }, tokio::spawn(forward(address, events)))
    }

    /// Puts an event at the end of the queue.
    pub(crate) async fn publish(&self, event: impl Event) {
        let mut envelope = Envelope::new();
        envelope.set_topic(event.topic());
        envelope.set_namespace(self.namespace.clone());
        match (timestamp(), convert_to_any(Box::new(event))) {
            (Ok(timestamp), Ok(event)) => {
                envelope.set_timestamp(timestamp);
                envelope.set_event(event);
                if self.queue.send(envelope).await.is_err() {
                    warn!("an event is lost: the shim ends");
                }
            }
            (Err(error), _) | (_, Err(error)) => warn!("cannot make an event: {error}"),
        }
    }
}

/// Forwards one event after the other; each is tried until containerd has answered.
async fn forward(address: String, mut events: mpsc::Receiver<Envelope>) {
    let mut client = None;
    let mut pause = PAUSE.0;
    while let Some(envelope) = events.recv().await {
        let mut request = ForwardRequest::new();
        request.set_envelope(envelope);
        loop {
            match attempt(&address, &mut client, &request).await {
                Ok(()) => pause = PAUSE.0,
                Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                    warn!("containerd refuses the event {}: {}", request.envelope().topic(), status.message());
                }
                Err(error) => {
                    debug!("containerd is not there for the event {}: {error}", request.envelope().topic());
                    client = None;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                    continue;
                }
            }
            break;
        }
    }
}

async fn attempt(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => EventsClient::new(Client::connect(address).await?),
    };
    let connected = client.insert(connected);
    connected.forward(context::with_duration(LIMIT), request).await.map(drop)
}
