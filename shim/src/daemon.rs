//! The shim's daemon: one a pod. It serves containerd until the pod is gone.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::config::Templates;
use crate::launch::Daemon;
use crate::pod::{Pod, Surroundings};
use crate::service::events::Publisher;
use crate::service::services;
use crate::template::background::Birthplace;
use crate::{error, logging};

/// Longest wait for containerd to take the last answers, and then the last events.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why the daemon could not serve.
#[derive(Debug, Error)]
pub(crate) enum DaemonError {
    /// Its mount namespace.
    #[error("cannot make the shim's own mount namespace")]
    Namespace(#[source] nix::Error),
    /// Its runtime.
    #[error("cannot {doing}")]
    Io {
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its service.
    #[error("cannot serve containerd")]
    Serve(#[source] ttrpc::Error),
}

/// Runs the daemon in the process that the `start` action left. Must be called before the process has threads.
pub(crate) fn run(daemon: Daemon) -> Result<(), DaemonError> {
    let level = if daemon.debug { "debug" } else { daemon.config.log_level.as_str() };
    logging::init(Path::new("."), &daemon.id, level);
    let served = serve(daemon);
    if let Err(error) = &served {
        tracing::error!("the shim ends: {}", error::chain(error));
    }
    served
}

fn serve(daemon: Daemon) -> Result<(), DaemonError> {
    let failed = |doing| move |source| DaemonError::Io { doing, source };
    let may_build = daemon.config.templates == Templates::Auto;
    let birthplace = if may_build { Birthplace::note().map(Some) } else { Ok(None) };
    let birthplace = birthplace.map_err(failed("note where the shim was born"))?.map(Arc::new);
    own_mount_namespace().map_err(DaemonError::Namespace)?;
    // The bundle may be removed while the daemon still runs.
    std::env::set_current_dir("/").map_err(failed("change to /"))?;
    let Daemon { id, namespace, events, config, socket, listener, .. } = daemon;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed("start the runtime"))?;
    runtime.block_on(async {
        let (publisher, publishing) = Publisher::start(&events, &namespace);
        let pod = Pod::new(Surroundings { id, namespace, socket: socket.clone(), config, publisher, birthplace });
        let listener = Listener::try_from(listener).map_err(failed("listen on the shim's socket"))?;
        let mut server = Server::new().add_listener(listener).register_service(services(&pod));
        server.start().await.map_err(DaemonError::Serve)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed("watch for SIGTERM"))?;
        info!("shim serves process={}", std::process::id());
        tokio::select! {
            () = pod.finished() => {}
            _ = terminate.recv() => {
                info!("SIGTERM: the pod is ended");
                pod.shutdown(true).await;
            }
        }
        if tokio::time::timeout(FAREWELL, server.shutdown()).await.is_err() {
            warn!("containerd has not taken the last answers");
        }
        // With the server's services gone this is the last owner; without it the queue ends after its last event.
        drop(server);
        drop(pod);
        if tokio::time::timeout(FAREWELL, publishing).await.is_err() {
            warn!("containerd has not taken the last events");
        }
        if let Err(error) = std::fs::remove_file(&socket) {
            warn!("cannot remove the shim's socket {socket}: {error}");
        }
        info!("shim ends");
        Ok(())
    })
}

/// Every mount that is made for the pod disappears with its processes; mounts that the host makes later come in.
fn own_mount_namespace() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
}
