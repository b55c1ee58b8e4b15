//! The shim's configuration: `/etc/husk/config.toml`, then `/etc/husk/config.d/*.toml` in order of name, later keys winning.
//! No file is needed; unknown keys are refused. `HUSK_CONFIG` names another file (its `config.d` lies beside it).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

/// Where the configuration is, unless `HUSK_CONFIG` says otherwise.
const DEFAULT_PATH: &str = "/etc/husk/config.toml";

/// Least guest memory in MiB (husk-vmm's own limit).
pub(crate) const MIN_MEMORY_MIB: u64 = 64;

/// Least memory in MiB with which a pod that can grow starts: with less its kernel would leave hardly anything.
const MIN_BOOT_MIB: u64 = 128;

/// Most vCPUs of a guest (husk-vmm's own limit).
pub(crate) const MAX_VCPUS: u8 = 64;

/// What is done with templates.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Templates {
    /// They are used, and made in the background for shapes that have none.
    Auto,
    /// Those that there are, by `husk template build`, are used.
    Existing,
    /// They are not used.
    Off,
}

/// Every key, with its default.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// vCPUs of a pod that says nothing about its CPUs. Default 1.
    pub(crate) vcpus: u8,
    /// Most vCPUs that a pod gets, whatever it says; the host's number of CPUs is a limit too. Default 64.
    pub(crate) max_vcpus: u8,
    /// Memory in MiB that a pod which says nothing about its memory can grow to. Default 2048.
    pub(crate) memory_mib: u64,
    /// Guest memory in MiB that a pod starts with; it grows when its containers need more. Default 256.
    pub(crate) boot_memory_mib: u64,
    /// Memory in MiB that a pod with a memory limit gets beyond it, for the guest's kernel and agent. Default 64.
    pub(crate) memory_overhead_mib: u64,
    /// The guest kernel. Default `../share/husk/vmlinux`, seen from the shim's own directory.
    pub(crate) kernel: Option<PathBuf>,
    /// The guest's initramfs. Default `../share/husk/initramfs`, seen from the shim's own directory.
    pub(crate) initramfs: Option<PathBuf>,
    /// The VMM. Default `husk-vmm` beside the shim.
    pub(crate) vmm: Option<PathBuf>,
    /// The fs daemon. Default `husk-fs` beside the shim.
    pub(crate) fs: Option<PathBuf>,
    /// Request queues (and threads) of the fs daemon. Default 1.
    pub(crate) fs_request_queues: u16,
    /// The VMM's user and group id are this plus the shim's process id, so that no two pods share one. Default 2000000000.
    pub(crate) vmm_uid_base: u32,
    /// Further words for the guest's kernel command line. Default none.
    pub(crate) kernel_parameters: String,
    /// Longest time in seconds from the VMM's start to the agent's hello. Default 30.
    pub(crate) hello_timeout_s: u64,
    /// Whether pods start from templates, and who makes those. Default auto.
    pub(crate) templates: Templates,
    /// Whether pods from one template have one copy of the guest kernel's code. Default true.
    pub(crate) share_code: bool,
    /// An early serial console, to find out why a guest does not start; slow. Default false.
    pub(crate) serial: bool,
    /// What is logged: error, warn, info, debug or trace. containerd's own debug switch raises it to debug. Default info.
    pub(crate) log_level: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vcpus: 1,
            max_vcpus: MAX_VCPUS,
            memory_mib: 2048,
            boot_memory_mib: 256,
            memory_overhead_mib: 64,
            kernel: None,
            initramfs: None,
            vmm: None,
            fs: None,
            fs_request_queues: 1,
            vmm_uid_base: 2_000_000_000,
            kernel_parameters: String::new(),
            hello_timeout_s: 30,
            templates: Templates::Auto,
            share_code: true,
            serial: false,
            log_level: "info".to_owned(),
        }
    }
}

/// Why the configuration can't be used.
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    /// A file can't be read.
    #[error("cannot read the configuration {path}", path = path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no TOML.
    #[error("the configuration {path} is no TOML", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key is unknown or of another type.
    #[error("the configuration {path} (with its drop-ins) has a key that husk can't use", path = path.display())]
    Key {
        /// The main file.
        path: PathBuf,
        /// Which.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is out of bounds.
    #[error("the configuration's {key} must be {wanted}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it may be.
        wanted: &'static str,
    },
    /// The shim's own place is unknown.
    #[error("cannot find the shim's own directory")]
    OwnPath(#[source] io::Error),
}

/// The files of a pod's processes, found.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    /// husk-vmm.
    pub(crate) vmm: PathBuf,
    /// husk-fs.
    pub(crate) fs: PathBuf,
    /// The guest kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's initramfs.
    pub(crate) initramfs: PathBuf,
}

impl Config {
    /// Reads the configuration of this host.
    pub(crate) fn load() -> Result<Self, ConfigError> {
        let path = std::env::var_os("HUSK_CONFIG").map_or_else(|| PathBuf::from(DEFAULT_PATH), PathBuf::from);
        Self::load_from(&path)
    }

    /// Reads `path`, if it is there, and its drop-ins.
    fn load_from(path: &Path) -> Result<Self, ConfigError> {
        let mut merged = toml::Table::new();
        for file in std::iter::once(path.to_owned()).chain(drop_ins(path)?) {
            let text = match fs::read_to_string(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(|source| ConfigError::Read { path: file.clone(), source })?,
            };
            let table: toml::Table = toml::from_str(&text)
                .map_err(|source| ConfigError::Syntax { path: file.clone(), source: Box::new(source) })?;
            merged.extend(table);
        }
        let config: Self =
            merged.try_into().map_err(|source| ConfigError::Key { path: path.to_owned(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Refuses values that no pod could be started with.
    fn check(&self) -> Result<(), ConfigError> {
        let bounds: [(&'static str, bool, &'static str); 8] = [
            ("vcpus", (1..=MAX_VCPUS).contains(&self.vcpus), "1 to 64"),
            ("max_vcpus", (1..=MAX_VCPUS).contains(&self.max_vcpus), "1 to 64"),
            ("memory_mib", self.memory_mib >= MIN_MEMORY_MIB, "at least 64"),
            ("boot_memory_mib", self.boot_memory_mib >= MIN_BOOT_MIB, "at least 128"),
            ("fs_request_queues", (1..=64).contains(&self.fs_request_queues), "1 to 64"),
            ("vmm_uid_base", (1000..=4_000_000_000).contains(&self.vmm_uid_base), "1000 to 4000000000"),
            ("hello_timeout_s", (1..=600).contains(&self.hello_timeout_s), "1 to 600"),
            (
                "log_level",
                ["error", "warn", "info", "debug", "trace"].contains(&self.log_level.as_str()),
                "error, warn, info, debug or trace",
            ),
        ];
        match bounds.iter().find(|(_, holds, _)| !holds) {
            Some(&(key, _, wanted)) => Err(ConfigError::Value { key, wanted }),
            None => Ok(()),
        }
    }

    /// The longest wait for the agent's hello.
    pub(crate) fn hello_timeout(&self) -> Duration {
        Duration::from_secs(self.hello_timeout_s)
    }

    /// The files of a pod's processes: configured ones, else those of the shim's own installation.
    pub(crate) fn programs(&self) -> Result<Programs, ConfigError> {
        let own = std::env::current_exe().map_err(ConfigError::OwnPath)?;
        Ok(self.programs_of(own.parent().unwrap_or(Path::new("/"))))
    }

    fn programs_of(&self, bin: &Path) -> Programs {
        let share = bin.parent().unwrap_or(Path::new("/")).join("share/husk");
        let or = |configured: &Option<PathBuf>, default: PathBuf| configured.clone().unwrap_or(default);
        Programs {
            vmm: or(&self.vmm, bin.join("husk-vmm")),
            fs: or(&self.fs, bin.join("husk-fs")),
            kernel: or(&self.kernel, share.join("vmlinux")),
            initramfs: or(&self.initramfs, share.join("initramfs")),
        }
    }
}

/// The drop-ins beside `path`, in order of name.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let directory = path.with_file_name("config.d");
    let read = |source| ConfigError::Read { path: directory.clone(), source };
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(read)?,
    };
    let mut files =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(read)?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of the test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("husk-config-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("config.d")).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.join(name), text).unwrap();
        }

        fn load(&self) -> Result<Config, ConfigError> {
            Config::load_from(&self.0.join("config.toml"))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn needs_no_file() {
        assert_eq!(Config::load_from(Path::new("/nonexistent/config.toml")).unwrap(), Config::default());
    }

    #[test]
    fn later_drop_ins_win() {
        let scratch = Scratch::new("order");
        scratch.write("config.toml", "vcpus = 2\nmemory_mib = 512\n");
        scratch.write("config.d/20-b.toml", "vcpus = 4\n");
        scratch.write("config.d/10-a.toml", "vcpus = 3\nserial = true\n");
        scratch.write("config.d/ignored.txt", "not toml");
        let config = scratch.load().unwrap();
        assert_eq!((config.vcpus, config.memory_mib, config.serial), (4, 512, true));
    }

    #[test]
    fn refuses_unknown_keys_and_values_out_of_bounds() {
        let scratch = Scratch::new("refuse");
        scratch.write("config.toml", "vcpu = 2\n");
        assert!(matches!(scratch.load(), Err(ConfigError::Key { .. })));
        scratch.write("config.toml", "vcpus = 0\n");
        assert!(matches!(scratch.load(), Err(ConfigError::Value { key: "vcpus", .. })));
        scratch.write("config.toml", "vcpus = \n");
        assert!(matches!(scratch.load(), Err(ConfigError::Syntax { .. })));
    }

    #[test]
    fn each_key_is_documented_with_its_default() {
        let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config.toml")).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("# "));
        let assigned = lines.filter_map(|line| Some((line.split_once(" = ")?.0, line)));
        let documented: Vec<_> = assigned.filter(|(key, _)| !key.contains(' ')).collect();
        // serde names all keys where it refuses one.
        let refused = toml::from_str::<Config>("none = 1").unwrap_err().to_string();
        let expected = refused.split_once("expected").unwrap().1;
        let keys: Vec<_> = expected.split('`').skip(1).step_by(2).collect();
        assert_eq!(documented.len(), keys.len(), "{keys:?}");
        assert!(keys.iter().all(|key| documented.iter().any(|(documented, _)| documented == key)), "{documented:?}");
        let paths = ["kernel", "initramfs", "vmm", "fs"];
        let defaults = documented.iter().filter(|(key, _)| !paths.contains(key)).map(|(_, line)| *line);
        let scratch = Scratch::new("documented");
        scratch.write("config.toml", &defaults.collect::<Vec<_>>().join("\n"));
        assert_eq!(scratch.load().unwrap(), Config::default());
    }

    #[test]
    fn programs_lie_beside_the_shim() {
        let programs = Config::default().programs_of(Path::new("/opt/husk/bin"));
        assert_eq!(programs.vmm, Path::new("/opt/husk/bin/husk-vmm"));
        assert_eq!(programs.kernel, Path::new("/opt/husk/share/husk/vmlinux"));
    }
}
