//! The shim's daemon: one a pod. It serves containerd until the pod is gone.

use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use containerd_shim::Flags;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::config::{Config, ConfigError};
use crate::id::{Id, IdError};
use crate::launch::LISTENER_FD;
use crate::pod::{Pod, Surroundings};
use crate::service::events::Publisher;
use crate::service::services;
use crate::{error, logging};

/// Longest wait for containerd to take the last answers, and then the last events.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why the daemon could not serve.
#[derive(Debug, Error)]
pub(crate) enum DaemonError {
    /// The id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
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
    /// No address for events.
    #[error("TTRPC_ADDRESS, containerd's address for events, is not set")]
    NoEvents,
    /// Its service.
    #[error("cannot serve containerd")]
    Serve(#[source] ttrpc::Error),
}

/// Runs the daemon on the socket that the `start` action left on descriptor 3. Must be called before the process has threads.
pub(crate) fn run(flags: &Flags) -> Result<(), DaemonError> {
    let id = Id::parse(&flags.id)?;
    let config = Config::load()?;
    let level = if flags.debug { "debug" } else { config.log_level.as_str() };
    logging::init(Path::new("."), &id, level);
    let served = serve(flags, id, config);
    if let Err(error) = &served {
        tracing::error!("the shim ends: {}", error::chain(error));
    }
    served
}

fn serve(flags: &Flags, id: Id, config: Config) -> Result<(), DaemonError> {
    let failed = |doing| move |source| DaemonError::Io { doing, source };
    own_mount_namespace().map_err(DaemonError::Namespace)?;
    // The bundle may be removed while the daemon still runs.
    std::env::set_current_dir("/").map_err(failed("change to /"))?;
    let events = std::env::var("TTRPC_ADDRESS").map_err(|_| DaemonError::NoEvents)?;
    // SAFETY: the start action put the listening socket there for this process; nothing has taken or closed it.
    let listener = unsafe { UnixListener::from_raw_fd(LISTENER_FD) };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed("start the runtime"))?;
    runtime.block_on(async {
        let (publisher, publishing) = Publisher::start(&events, &flags.namespace);
        let around =
            Surroundings { id, namespace: flags.namespace.clone(), socket: flags.socket.clone(), config, publisher };
        let pod = Pod::new(around);
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
        if let Err(error) = std::fs::remove_file(&flags.socket) {
            warn!("cannot remove the shim's socket {}: {error}", flags.socket);
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
