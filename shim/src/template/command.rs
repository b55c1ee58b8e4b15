//! What an operator does with templates: `husk template ...` starts the shim's program with `template` and a request as JSON, since all
//! that is needed is in there.

use std::fmt::Write;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::background::{self, Background};
use super::build::{self, BuildError};
use super::files::StoreError;
use super::key::{InputError, Inputs};
use super::store::{Listed, Store};
use crate::config::{Config, ConfigError, MAX_VCPUS, MIN_MEMORY_MIB};
use crate::error::chain;
use crate::logging;
use crate::spec::size::{Host, Size};

/// The shim's first argument.
pub(crate) const ACTION: &str = "template";

/// Longest wait for other builds, each of which takes 120 s at most.
const LOCK_LIMIT: Duration = Duration::from_secs(240);

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Tell which there are.
    List {
        /// As JSON.
        json: bool,
    },
    /// Make one.
    Build {
        /// Number of vCPUs; none: the configuration's.
        vcpus: Option<u8>,
        /// Memory in MiB; none: the configuration's.
        memory_mib: Option<u64>,
        /// Set where a shim starts it.
        background: Option<Background>,
    },
    /// Remove those of these names.
    Remove {
        /// Their names.
        names: Vec<String>,
        /// All, whatever the names.
        all: bool,
    },
}

/// Why it was not done.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    /// No request.
    #[error("the action template needs one request as JSON: use `husk template`")]
    Request(#[source] serde_json::Error),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What shapes templates.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The build.
    #[error("no template was built")]
    Build(#[source] Box<BuildError>),
    /// A size.
    #[error(
        "a template has 1 to {MAX_VCPUS} vCPUs and at least {MIN_MEMORY_MIB} MiB of memory, not {vcpus} and {memory_mib} MiB"
    )]
    Size {
        /// vCPUs.
        vcpus: u8,
        /// MiB.
        memory_mib: u64,
    },
    /// No pod uses templates.
    #[error("pods don't use templates with `serial = true` in the configuration")]
    Serial,
    /// A name.
    #[error("there is no template {0}: `husk template list` shows those that there are")]
    NoSuch(String),
    /// The process itself.
    #[error("cannot {doing}")]
    Process {
        /// What failed.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Does what the request, JSON, asks for; the answer is for stdout.
pub(crate) fn run(request: &str) -> Result<String, CommandError> {
    let request = serde_json::from_str(request).map_err(CommandError::Request)?;
    let store = Store::of_host();
    match request {
        Request::List { json } => list(&store, json),
        Request::Build { vcpus, memory_mib, background } => build(&store, vcpus, memory_mib, background.as_ref()),
        Request::Remove { names, all } => remove(&store, names, all),
    }
}

fn build(
    store: &Store,
    vcpus: Option<u8>,
    memory_mib: Option<u64>,
    background: Option<&Background>,
) -> Result<String, CommandError> {
    let process = |doing| move |source| CommandError::Process { doing, source };
    let (settled, level) = match background {
        Some(background) => {
            (Some(background::settle(background).map_err(process("leave the pod that started this build"))?), None)
        }
        None => (None, Some("warn")),
    };
    let config = Config::load()?;
    logging::init_stderr(ACTION, level.unwrap_or(&config.log_level));
    if config.serial {
        return Err(CommandError::Serial);
    }
    let host = Host::here();
    let vcpus = vcpus.unwrap_or(config.vcpus.min(u8::try_from(host.cpus).unwrap_or(u8::MAX)));
    let memory_mib = memory_mib.unwrap_or(config.memory_mib.min(config.boot_memory_mib));
    let size = Size::fixed(vcpus, memory_mib, host.hotplug_mib());
    if !(1..=MAX_VCPUS).contains(&size.vcpus) || size.memory_mib < MIN_MEMORY_MIB {
        return Err(CommandError::Size { vcpus: size.vcpus, memory_mib: size.memory_mib });
    }
    let lock = match settled {
        Some(lock) => lock,
        None => store.lock(LOCK_LIMIT)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let built = runtime.map_err(process("start the runtime"))?.block_on(build::build(&config, store, size, &lock));
    match built {
        Ok(Some(built)) => Ok(format!(
            "{} built in {:.1} s, {} MiB of memory\n",
            built.name,
            built.took.as_secs_f64(),
            built.bytes.div_ceil(1 << 20)
        )),
        Ok(None) => Ok("there already\n".to_owned()),
        Err(error) => {
            // What is wrong with the directory is seen again at once, and at no cost.
            if background.is_some()
                && !matches!(error, BuildError::Store(_))
                && let Ok(inputs) = config.programs().map(|programs| Inputs::gather(&config, &programs, size))
                && let Ok(inputs) = inputs
            {
                store.notes.note_failure(&inputs.name(), &chain(&error));
            }
            Err(CommandError::Build(Box::new(error)))
        }
    }
}

fn remove(store: &Store, names: Vec<String>, all: bool) -> Result<String, CommandError> {
    let names = if all { store.list().into_iter().map(|listed| listed.name).collect() } else { names };
    let mut said = String::new();
    for name in names {
        if !store.remove_named(&name)? {
            return Err(CommandError::NoSuch(name));
        }
        said.push_str(&format!("{name} removed\n"));
    }
    Ok(said)
}

/// A template for people and programs.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    vcpus: Option<u8>,
    memory_mib: Option<u64>,
    /// What it takes of the disk.
    disk_bytes: u64,
    /// Seconds since the epoch.
    created_s: Option<u64>,
    /// Seconds since the epoch, to the hour.
    used_s: u64,
    /// Whether pods start from it.
    usable: bool,
    /// Why not.
    reason: String,
}

fn list(store: &Store, json: bool) -> Result<String, CommandError> {
    let config = Config::load()?;
    let programs = config.programs()?;
    let rows = store.list().into_iter().map(|listed| {
        let reason = match &listed.manifest {
            Ok(manifest) => {
                let current = Inputs::gather(&config, &programs, manifest.inputs.size())?;
                match manifest.inputs.differences(&current) {
                    same if same.is_empty() => String::new(),
                    others => format!("made with another {}", others.join(", ")),
                }
            }
            Err(error) => chain(error),
        };
        Ok(Row::new(&listed, reason))
    });
    let rows = rows.collect::<Result<Vec<_>, InputError>>()?;
    if json {
        // Strings and numbers can't fail to be JSON.
        return Ok(serde_json::to_string_pretty(&rows).unwrap_or_default() + "\n");
    }
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(4);
    let mut text =
        format!("{:width$}  {:>5}  {:>10}  {:>8}  {:>9}  STATE\n", "NAME", "VCPUS", "MEMORY MiB", "DISK MiB", "AGE");
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    for row in &rows {
        let age = row.created_s.map_or_else(|| "-".to_owned(), |created| age(created, SystemTime::now()));
        let state = if row.usable { "usable".to_owned() } else { format!("not used: {}", row.reason) };
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:width$}  {:>5}  {:>10}  {:>8}  {age:>9}  {state}",
            row.name,
            number(row.vcpus.map(u64::from)),
            number(row.memory_mib),
            row.disk_bytes.div_ceil(1 << 20),
        );
    }
    Ok(text)
}

impl Row {
    fn new(listed: &Listed, reason: String) -> Self {
        let manifest = listed.manifest.as_ref().ok();
        Self {
            name: listed.name.clone(),
            vcpus: manifest.map(|manifest| manifest.inputs.vcpus),
            memory_mib: manifest.map(|manifest| manifest.inputs.memory_mib),
            disk_bytes: listed.bytes,
            created_s: manifest.map(|manifest| manifest.created_s),
            used_s: listed.used.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            usable: reason.is_empty(),
            reason,
        }
    }
}

/// In the largest unit that fits.
fn age(created_s: u64, now: SystemTime) -> String {
    let age = now.duration_since(UNIX_EPOCH + Duration::from_secs(created_s)).unwrap_or_default().as_secs();
    match age {
        0..60 => format!("{age} s"),
        60..3600 => format!("{} min", age / 60),
        3600..86400 => format!("{} h", age / 3600),
        _ => format!("{} days", age / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_closed_and_typed() {
        assert!(matches!(serde_json::from_str(r#"{"list":{"json":true}}"#), Ok(Request::List { json: true })));
        let build = serde_json::from_str(r#"{"build":{"vcpus":2,"memory_mib":null,"background":null}}"#);
        assert!(matches!(build, Ok(Request::Build { vcpus: Some(2), memory_mib: None, background: None })));
        assert!(matches!(run("{}"), Err(CommandError::Request(_))));
        assert!(matches!(run(r#"{"remove":{"names":[],"all":true,"x":1}}"#), Err(CommandError::Request(_))));
    }

    #[test]
    fn ages_are_short() {
        let at = |seconds: u64| age(1000, UNIX_EPOCH + Duration::from_secs(1000 + seconds));
        assert_eq!([at(5), at(65), at(7300), at(200_000)], ["5 s", "1 min", "2 h", "2 days"]);
        assert_eq!(age(1000, UNIX_EPOCH), "0 s");
    }
}
