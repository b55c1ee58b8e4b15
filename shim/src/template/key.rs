//! What shaped a template: a pod uses it only if all of this is the same for the pod. It stands in full in the template's manifest
//! and is compared field by field; the name only tells templates apart.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::NOTES;
use crate::config::{Config, Programs};
use crate::pod::command_line;
use crate::spec::size::Size;

/// The processor as the host's kernel sees it, and the microcode that can be given to it at any time (its absence tells nothing: virtual machines
/// have none).
const CPU_INFO_PATH: &str = "/proc/cpuinfo";
const MICROCODE_PATH: &str = "/sys/devices/system/cpu/cpu0/microcode/version";

/// Where the processor is noted until the host's next boot, which is cheaper to read.
const PROCESSOR_NOTE: &str = "processor";

/// Bytes looked at of /proc/cpuinfo: more than the first processor's part has.
const CPU_INFO: u64 = 4 << 10;

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Inputs {
    /// husk's version.
    version: String,
    /// The guest's kernel.
    kernel: FileIdentity,
    /// The guest's initramfs.
    initramfs: FileIdentity,
    /// husk-vmm.
    vmm: FileIdentity,
    /// The shim, which gives the machine its devices.
    shim: FileIdentity,
    /// The host's processor: its first entry of /proc/cpuinfo, without the frequency of the moment.
    processor: String,
    /// The host's kernel, whose KVM it was: release and version as uname(2) gives them.
    host_kernel: String,
    /// Number of vCPUs.
    pub(super) vcpus: u8,
    /// Memory in MiB that the machine boots with.
    pub(super) memory_mib: u64,
    /// Most memory in MiB that can be plugged in.
    hotplug_mib: u64,
    /// Request queues of the file system device.
    fs_request_queues: u16,
    /// The guest kernel's command line, without what differs from boot to boot.
    command_line: String,
}

/// A file, told apart from what is or was at its place at another time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl FileIdentity {
    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }
}

/// An input that could not be looked at.
#[derive(Debug, thiserror::Error)]
#[error("cannot look at {path}", path = path.display())]
pub(crate) struct InputError {
    path: PathBuf,
    source: io::Error,
}

impl Inputs {
    /// Those of a machine of this size on this host.
    pub(crate) fn gather(config: &Config, programs: &Programs, size: Size) -> Result<Self, InputError> {
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: identity(&programs.kernel)?,
            initramfs: identity(&programs.initramfs)?,
            vmm: identity(&programs.vmm)?,
            shim: identity(Path::new("/proc/self/exe"))?,
            processor: noted(&Path::new(NOTES).join(PROCESSOR_NOTE), Path::new(MICROCODE_PATH), || {
                processor(Path::new(CPU_INFO_PATH))
            })?,
            host_kernel: host_kernel()?,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            hotplug_mib: size.hotplug_mib,
            fs_request_queues: config.fs_request_queues,
            command_line: command_line::fixed(config),
        })
    }

    /// All of them in one line.
    pub(super) fn text(&self) -> String {
        // Numbers and strings can't fail to be JSON.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// A short name, the same for the same inputs; others have it too with a chance of 1 to 4 billion.
    pub(crate) fn name(&self) -> String {
        self.name_by(&self.text())
    }

    /// The name where the text is known.
    pub(super) fn name_by(&self, text: &str) -> String {
        format!("{}cpu-{}mib-{:08x}", self.vcpus, self.memory_mib, crc32fast::hash(text.as_bytes()))
    }

    /// The fields in which these differ from others.
    pub(super) fn differences(&self, other: &Self) -> Vec<String> {
        let fields = |inputs: &Self| match serde_json::to_value(inputs) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (own, others) = (fields(self), fields(other));
        own.iter().filter(|(name, value)| others.get(*name) != Some(value)).map(|(name, _)| name.clone()).collect()
    }

    /// The machine's size.
    pub(super) fn size(&self) -> Size {
        Size::fixed(self.vcpus, self.memory_mib, self.hotplug_mib)
    }
}

fn identity(path: &Path) -> Result<FileIdentity, InputError> {
    let metadata = fs::metadata(path).map_err(|source| InputError { path: path.to_owned(), source })?;
    Ok(FileIdentity::of(&metadata))
}

fn processor(path: &Path) -> Result<String, InputError> {
    let mut text = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(CPU_INFO).read_to_end(&mut text));
    read.map_err(|source| InputError { path: path.to_owned(), source })?;
    let text = String::from_utf8_lossy(&text);
    let first = text.split("\n\n").next().unwrap_or_default();
    let lines = first.lines().filter(|line| !line.starts_with("cpu MHz"));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// The processor as it was noted since the host's boot; what `read` gives is noted. The note's first line tells a torn note, and one of other
/// microcode, from a good one.
fn noted(
    note: &Path,
    microcode: &Path,
    read: impl FnOnce() -> Result<String, InputError>,
) -> Result<String, InputError> {
    let microcode = fs::read_to_string(microcode).unwrap_or_default();
    let head = |text: &str| format!("{:08x} {}", crc32fast::hash(text.as_bytes()), microcode.trim());
    if let Ok(noted) = fs::read_to_string(note)
        && let Some((first, text)) = noted.split_once('\n')
        && first == head(text)
    {
        return Ok(text.to_owned());
    }
    let text = read()?;
    // Before the first template there is no directory for it.
    let _ = fs::write(note, format!("{}\n{text}", head(&text)));
    Ok(text)
}

fn host_kernel() -> Result<String, InputError> {
    let name = nix::sys::utsname::uname()
        .map_err(|errno| InputError { path: "the host's kernel (uname)".into(), source: errno.into() })?;
    Ok(format!("{} {}", name.release().to_string_lossy(), name.version().to_string_lossy()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Inputs of files in `directory`.
    pub(in crate::template) fn inputs(directory: &Path) -> Inputs {
        for name in ["vmm", "kernel", "initramfs"] {
            if !directory.join(name).exists() {
                fs::write(directory.join(name), name).unwrap();
            }
        }
        let file = |name| directory.join(name);
        let programs =
            Programs { vmm: file("vmm"), fs: file("fs"), kernel: file("kernel"), initramfs: file("initramfs") };
        Inputs::gather(&Config::default(), &programs, Size::fixed(2, 256, 4096)).unwrap()
    }

    /// The same with another size of memory.
    pub(in crate::template) fn with_memory(inputs: &Inputs, memory_mib: u64) -> Inputs {
        Inputs { memory_mib, ..inputs.clone() }
    }

    #[test]
    fn every_input_counts() {
        let directory = tempfile::tempdir().unwrap();
        let before = inputs(directory.path());
        assert_eq!(inputs(directory.path()), before);
        assert!(before.name().starts_with("2cpu-256mib-"), "{}", before.name());
        fs::write(directory.path().join("kernel"), "kernel!").unwrap();
        let after = inputs(directory.path());
        assert_eq!(after.differences(&before), ["kernel"]);
        assert_ne!(after.name(), before.name());
        let other = Inputs { memory_mib: 512, command_line: "quiet".to_owned(), ..before.clone() };
        assert_eq!(other.differences(&before), ["command_line", "memory_mib"]);
        fs::remove_file(directory.path().join("vmm")).unwrap();
        assert!(identity(&directory.path().join("vmm")).is_err());
    }

    #[test]
    fn the_processor_is_read_once_a_boot() {
        let directory = tempfile::tempdir().unwrap();
        let (note, microcode) = (directory.path().join("processor"), directory.path().join("version"));
        let seen = |text: &str| noted(&note, &microcode, || Ok(text.to_owned())).unwrap();
        assert_eq!((seen("a\nb"), seen("other")), ("a\nb".to_owned(), "a\nb".to_owned()));
        fs::write(&microcode, "0x1\n").unwrap();
        assert_eq!((seen("c"), seen("other")), ("c".to_owned(), "c".to_owned()));
        for torn in ["", "0", "1 0x1\nc", "00000000 0x1\nx"] {
            fs::write(&note, torn).unwrap();
            assert_eq!((seen("d"), seen("other")), ("d".to_owned(), "d".to_owned()));
        }
        let nowhere = directory.path().join("none/processor");
        assert_eq!(noted(&nowhere, &microcode, || Ok("e".to_owned())).unwrap(), "e");
    }

    #[test]
    fn the_processor_has_no_frequency_of_the_moment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cpuinfo");
        let text = |mhz: &str| {
            format!("processor\t: 0\nflags\t\t: fpu vme\ncpu MHz\t\t: {mhz}\nbugs\t\t:\n\nprocessor\t: 1\n")
        };
        fs::write(&path, text("800.000")).unwrap();
        let slow = processor(&path).unwrap();
        fs::write(&path, text("3000.000")).unwrap();
        assert_eq!(processor(&path).unwrap(), slow);
        assert_eq!(slow, "processor\t: 0\nflags\t\t: fpu vme\nbugs\t\t:");
        assert!(processor(Path::new("/proc/cpuinfo")).unwrap().contains("flags"));
    }
}
