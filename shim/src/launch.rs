//! The `start` action: finds or starts the shim daemon of the container's pod and tells containerd its address, in whichever way that
//! containerd understands (1.6 to 2.x). The daemon is a fork of the action: what it has read and mapped, the daemon need not again.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, LogLevel, nearest_log_level};
use containerd_shim::{Flags, StartOpts};
use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::protobuf::{self, Enum, Message};
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork, setpgid};
use thiserror::Error;

use crate::config::{Config, ConfigError};
use crate::id::{Id, IdError};
use crate::spec::SpecError;
use crate::spec::load::{self, Role};

/// Largest message on stdin in bytes, as containerd's own shims have it.
const MAX_INPUT: u64 = 10 << 20;

/// Why the daemon could not be started or found.
#[derive(Debug, Error)]
pub(crate) enum LaunchError {
    /// containerd's message.
    #[error("cannot read containerd's start parameters")]
    Input(#[source] io::Error),
    /// A message for another shim.
    #[error("containerd's start parameters are for {0}, not for {1}")]
    Foreign(String, String),
    /// No address for events.
    #[error("containerd gave no address for events (TTRPC_ADDRESS)")]
    NoEvents,
    /// The id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pod's shim is gone.
    #[error("the shim of the container's pod {0} is gone")]
    NoPod(String),
    /// A shim with the same id is running.
    #[error("a shim listens on {0} already")]
    Taken(PathBuf),
    /// The socket.
    #[error("cannot {doing} {path}", path = path.display())]
    Socket {
        /// What failed.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The daemon.
    #[error("cannot start the shim's daemon")]
    Daemon(#[source] io::Error),
    /// The answer.
    #[error("cannot answer containerd")]
    Answer(#[source] io::Error),
}

/// How containerd called, which decides how it wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// 2.3 and later: a message on stdin, a message on stdout.
    Bootstrap,
    /// Before: flags and environment; the bare address on stdout. (2.0 to 2.2 would take JSON too, 1.6 would not.)
    Bare,
}

/// What a daemon begins with.
pub(crate) struct Daemon {
    /// The pod's id.
    pub(crate) id: Id,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// containerd's address for events.
    pub(crate) events: String,
    /// Whether containerd wants everything logged.
    pub(crate) debug: bool,
    /// The shim's configuration.
    pub(crate) config: Config,
    /// Where it is served.
    pub(crate) socket: String,
    /// The same, listening.
    pub(crate) listener: UnixListener,
}

/// Runs the action: the current directory is the bundle. Returns twice where it starts a daemon: what that begins with in the daemon's
/// process, nothing in this one. Must be called before the process has threads.
pub(crate) fn start(flags: &Flags) -> Result<Option<Daemon>, LaunchError> {
    // What is wrong with the configuration is told here, where containerd shows it.
    let config = Config::load()?;
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT).read_to_end(&mut input).map_err(LaunchError::Input)?;
    }
    let (options, protocol) = parameters(flags, &input)?;
    let id = Id::parse(&options.id)?;
    let bundle = Path::new(".");
    let address = match role(bundle) {
        Ok(Role::Member(sandbox)) => running_daemon(&options, &Id::parse(&sandbox)?)?,
        // A spec that can't be used is refused by a daemon, at the creation: only there containerd takes the kind of an error.
        Ok(Role::Sandbox | Role::Single) | Err(_) => {
            let (address, daemon) = start_daemon(&options, id, config)?;
            if daemon.is_some() {
                return Ok(daemon);
            }
            address
        }
    };
    // containerd 1.6 reads the address from here after its own restart.
    fs::write(bundle.join("address"), &address).map_err(LaunchError::Answer)?;
    let answer = answer(&address, protocol).map_err(|error| LaunchError::Answer(error.into()))?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&answer).and_then(|()| stdout.flush()).map_err(LaunchError::Answer)?;
    Ok(None)
}

/// What the bundle's container is to its pod. A bundle without a spec is that of a sandbox under the Sandbox API, which tells later what it is.
fn role(bundle: &Path) -> Result<Role, SpecError> {
    match load::load(bundle) {
        Err(SpecError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(Role::Sandbox),
        spec => load::role(&spec?),
    }
}

/// What containerd wants started, by whichever protocol.
fn parameters(flags: &Flags, input: &[u8]) -> Result<(StartOpts, Protocol), LaunchError> {
    let mut options = match bootstrap_parameters(flags, input)? {
        Some(parameters) => (StartOpts::from(parameters), Protocol::Bootstrap),
        None => {
            let of_environment = |name: &str| std::env::var(name).unwrap_or_default();
            let mut options = StartOpts {
                id: flags.id.clone(),
                namespace: flags.namespace.clone(),
                address: flags.address.clone(),
                publish_binary: flags.publish_binary.clone(),
                ttrpc_address: of_environment("TTRPC_ADDRESS"),
                log_level: nearest_log_level(LogLevel::LOG_LEVEL_INFO.value()),
                ..StartOpts::default()
            };
            if options.address.is_empty() {
                options.address = of_environment("GRPC_ADDRESS");
            }
            (options, Protocol::Bare)
        }
    };
    options.0.debug |= flags.debug;
    if options.0.ttrpc_address.is_empty() {
        return Err(LaunchError::NoEvents);
    }
    Ok(options)
}

/// The message of containerd 2.3; nothing if stdin holds none, or (as before 2.3) the runtime's options.
fn bootstrap_parameters(flags: &Flags, input: &[u8]) -> Result<Option<BootstrapParams>, LaunchError> {
    let Some(parameters) = (!input.is_empty()).then(|| BootstrapParams::parse_from_bytes(input).ok()).flatten() else {
        return Ok(None);
    };
    if parameters.instance_id == flags.id && parameters.namespace == flags.namespace {
        return Ok(Some(parameters));
    }
    // Options are an Any, whose two fields have the numbers of the id and the namespace; nothing else is set then.
    let bare = BootstrapParams {
        instance_id: parameters.instance_id.clone(),
        namespace: parameters.namespace.clone(),
        ..Default::default()
    };
    if parameters == bare {
        return Ok(None);
    }
    Err(LaunchError::Foreign(
        format!("{}/{}", parameters.namespace, parameters.instance_id),
        format!("{}/{}", flags.namespace, flags.id),
    ))
}

/// What goes to stdout.
fn answer(address: &str, protocol: Protocol) -> Result<Vec<u8>, protobuf::Error> {
    match protocol {
        Protocol::Bare => Ok(address.as_bytes().to_vec()),
        Protocol::Bootstrap => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        }
        .write_to_bytes(),
    }
}

/// The socket's file of an address.
fn socket_path(address: &str) -> PathBuf {
    address.strip_prefix("unix://").unwrap_or(address).into()
}

/// The address of a pod's running daemon.
fn running_daemon(options: &StartOpts, sandbox: &Id) -> Result<String, LaunchError> {
    let address = options.socket_address(sandbox);
    match UnixStream::connect(socket_path(&address)) {
        Ok(_) => Ok(address),
        Err(_) => Err(LaunchError::NoPod(sandbox.to_string())),
    }
}

/// Starts the daemon, and returns its address, twice: with what it begins with in its own process, without in the one that containerd waits
/// for. Its socket listens before it even runs, so nobody has to wait for it.
fn start_daemon(options: &StartOpts, id: Id, config: Config) -> Result<(String, Option<Daemon>), LaunchError> {
    let address = options.socket_address(&id);
    let path = socket_path(&address);
    let listener = listen(&path)?;
    // SAFETY: the process has this one thread, so that no lock can be held by another that the child has not.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { .. }) => Ok((address, None)),
        Ok(ForkResult::Child) => {
            detach().map_err(LaunchError::Daemon)?;
            let daemon = Daemon {
                id,
                namespace: options.namespace.clone(),
                events: options.ttrpc_address.clone(),
                debug: options.debug,
                config,
                socket: path.display().to_string(),
                listener,
            };
            Ok((address, Some(daemon)))
        }
        Err(error) => {
            let _ = fs::remove_file(&path);
            Err(LaunchError::Daemon(error.into()))
        }
    }
}

/// Leaves what the process has of containerd's: its group, and the streams whose end containerd waits for.
fn detach() -> io::Result<()> {
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    let null = fs::File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

/// Listens on `path`; a dead shim's socket there is replaced.
fn listen(path: &Path) -> Result<UnixListener, LaunchError> {
    let failed = |doing| {
        let path = path.to_owned();
        move |source| LaunchError::Socket { doing, path, source }
    };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed("make the directory of"))?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(LaunchError::Taken(path.to_owned()));
            }
            fs::remove_file(path).map_err(failed("replace"))?;
            UnixListener::bind(path).map_err(failed("listen on"))
        }
        other => other.map_err(failed("listen on")),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "pod".to_owned(), namespace: "k8s.io".to_owned(), ..Flags::default() }
    }

    #[test]
    fn options_on_stdin_are_no_bootstrap_message() {
        assert!(bootstrap_parameters(&flags(), &[]).unwrap().is_none());
        let options = Any { type_url: "containerd.runc.v1.Options".to_owned(), value: b"x".to_vec(), ..Any::default() };
        assert!(bootstrap_parameters(&flags(), &options.write_to_bytes().unwrap()).unwrap().is_none());
    }

    #[test]
    fn a_bootstrap_message_must_be_for_this_shim() {
        let mut message = BootstrapParams {
            instance_id: "pod".to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_ttrpc_address: "/run/x".to_owned(),
            ..Default::default()
        };
        let (options, protocol) = parameters(&flags(), &message.write_to_bytes().unwrap()).unwrap();
        assert_eq!((options.ttrpc_address.as_str(), protocol), ("/run/x", Protocol::Bootstrap));
        message.instance_id = "other".to_owned();
        let bytes = message.write_to_bytes().unwrap();
        assert!(matches!(parameters(&flags(), &bytes), Err(LaunchError::Foreign(..))));
    }

    #[test]
    fn answers_in_the_callers_protocol() {
        assert_eq!(answer("unix:///s", Protocol::Bare).unwrap(), b"unix:///s");
        let result = BootstrapResult::parse_from_bytes(&answer("unix:///s", Protocol::Bootstrap).unwrap()).unwrap();
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///s", "ttrpc"));
    }

    #[test]
    fn a_dead_shims_socket_is_replaced_and_a_live_ones_is_not() {
        let path = std::env::temp_dir().join(format!("husk-launch-{}.sock", std::process::id()));
        let first = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(LaunchError::Taken(_))));
        drop(first);
        let second = listen(&path).unwrap();
        drop(second);
        fs::remove_file(path).unwrap();
    }
}
