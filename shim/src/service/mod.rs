//! What the shim serves and calls by ttrpc: containerd's Task and Sandbox services and its Events service. No logic here.

pub(crate) mod events;
mod sandbox;
mod task;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use containerd_shim_protos::protobuf;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::Service;
use tracing::debug;

use crate::error::{Error, chain};
use crate::pod::Pod;

/// All that is served on the shim's socket.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let mut services = task::services(pod);
    services.extend(sandbox::services(pod));
    services
}

/// Does a request's work in a task of its own, to its end even if the request's deadline passes.
async fn whole<T: Send + 'static>(work: impl Future<Output = Result<T, Error>> + Send + 'static) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await.map_err(Error::from).and_then(|done| done);
    done.map_err(|error| {
        debug!("refused: {}", chain(&error));
        error.into()
    })
}

/// An answer that could not be made.
fn internal(what: &str, error: &protobuf::Error) -> ttrpc::Error {
    ttrpc::error::get_rpc_status(ttrpc::Code::INTERNAL, format!("{what}: {error}"))
}
