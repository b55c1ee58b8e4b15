//! The guest's huge pages: set aside for containers by their limits, and the volumes of them, which may have more if the memory does
//! (hugetlbpage.rst of the kernel).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use husk_agent_api::HUGE_DIR;
use husk_agent_api::agent::HugeVolume;
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::LinuxHugepageLimit;
use thiserror::Error;

/// A directory for each size of page.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Volumes of a container: more than it has mounts.
const MOST_VOLUMES: usize = 1024;

/// Memory that the guest keeps in ordinary pages whatever is set aside.
const KEPT: u64 = 32 << 20;

const MIB: u64 = 1 << 20;

/// Why huge pages can't be had.
#[derive(Debug, Error)]
pub(crate) enum HugeError {
    #[error("{0}")]
    Unfit(String),
    #[error(
        "The container wants {wanted} MiB in huge pages of {page} KiB, but the virtual machine has {available} MiB of memory to spare: give the \
         pod more with the annotation io.husk.memory-mib"
    )]
    Memory { wanted: u64, page: u64, available: u64 },
    #[error("Could not {what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Pages by their size in bytes.
type Pages = BTreeMap<u64, u64>;

/// What is set aside, and for whom.
#[derive(Debug, Default)]
pub(crate) struct HugePages(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    reserved: HashMap<String, Pages>,
    volumes: Vec<String>,
}

impl HugePages {
    /// Sets pages aside for container `id`, in place of those it had, and makes the volumes that are not there yet. Blocks.
    pub(crate) fn reserve(
        &self,
        id: &str,
        limits: &[LinuxHugepageLimit],
        volumes: &[HugeVolume],
    ) -> Result<(), HugeError> {
        let wanted = pages(limits)?;
        if volumes.len() > MOST_VOLUMES {
            return Err(HugeError::Unfit(format!("More than {MOST_VOLUMES} volumes of huge pages")));
        }
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.reserved.get(id).cloned().unwrap_or_default();
        for (&size, &count) in &wanted {
            let more = count.saturating_sub(before.get(&size).copied().unwrap_or(0));
            if more > 0
                && let Err(error) = grow(size, more)
            {
                // What was added before it failed goes back.
                for (&size, &count) in wanted.range(..size) {
                    shrink(size, count.saturating_sub(before.get(&size).copied().unwrap_or(0)));
                }
                return Err(error);
            }
        }
        for (&size, &count) in &before {
            shrink(size, count.saturating_sub(wanted.get(&size).copied().unwrap_or(0)));
        }
        state.reserved.insert(id.to_owned(), wanted);
        for volume in volumes {
            if !state.volumes.contains(&volume.name) {
                mount_volume(volume)?;
                state.volumes.push(volume.name.clone());
            }
        }
        Ok(())
    }

    /// Gives the pages of container `id` back; those that a file of a volume still holds follow with the file.
    pub(crate) fn release(&self, id: &str) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (size, count) in state.reserved.remove(id).unwrap_or_default() {
            shrink(size, count);
        }
    }
}

/// The limits as numbers of pages. A size that is not asked for may be one that the guest doesn't have.
fn pages(limits: &[LinuxHugepageLimit]) -> Result<Pages, HugeError> {
    let mut pages = Pages::new();
    for limit in limits.iter().filter(|limit| limit.limit() != 0) {
        let size = page_size(limit.page_size())
            .ok_or_else(|| HugeError::Unfit(format!("{:?} is no size of huge pages", limit.page_size())))?;
        // Less than nothing is no limit: nothing is set aside for it.
        let bytes = u64::try_from(limit.limit()).unwrap_or(0);
        pages.insert(size, bytes / size);
    }
    Ok(pages)
}

/// "2MB" as OCI writes it: the units are powers of 1024.
fn page_size(text: &str) -> Option<u64> {
    let (digits, shift) = [("KB", 10), ("MB", 20), ("GB", 30)]
        .iter()
        .find_map(|(unit, shift)| text.strip_suffix(unit).map(|digits| (digits, *shift)))?;
    let number: u64 = digits.parse().ok().filter(|number| (1..=1 << 20).contains(number))?;
    Some(number << shift)
}

fn pool(size: u64) -> PathBuf {
    Path::new(POOLS).join(format!("hugepages-{}kB", size >> 10)).join("nr_hugepages")
}

/// Makes a pool larger, wholly or not at all.
fn grow(size: u64, count: u64) -> Result<(), HugeError> {
    let path = pool(size);
    if !path.exists() {
        return Err(HugeError::Unfit(format!("The guest has no huge pages of {} KiB", size >> 10)));
    }
    let bytes = size.saturating_mul(count);
    let too_much =
        |available: u64| HugeError::Memory { wanted: bytes / MIB, page: size >> 10, available: available / MIB };
    let available = available()?.saturating_sub(KEPT);
    if bytes > available {
        return Err(too_much(available));
    }
    let before = read(&path)?;
    write(&path, before + count)?;
    let now = read(&path)?;
    if now < before + count {
        write(&path, before)?;
        return Err(too_much((now - before.min(now)) * size));
    }
    Ok(())
}

/// Makes a pool smaller; what can't be written is told in the log, and the pages stay set aside.
fn shrink(size: u64, count: u64) {
    if count == 0 {
        return;
    }
    let path = pool(size);
    if let Err(error) = read(&path).and_then(|now| write(&path, now.saturating_sub(count))) {
        tracing::warn!("{}", crate::display(error));
    }
}

/// Bytes that the kernel could give without swapping (/proc/meminfo's MemAvailable, in KiB).
fn available() -> Result<u64, HugeError> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0);
    Ok(kib << 10)
}

fn mount_volume(volume: &HugeVolume) -> Result<(), HugeError> {
    let HugeVolume { name, page_size, size, mode, uid, gid, .. } = volume;
    if name.is_empty() || name.len() > 20 || !name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(HugeError::Unfit(format!("{name:?} is no name of a volume of huge pages")));
    }
    if *page_size == 0 || !pool(*page_size).exists() {
        return Err(HugeError::Unfit(format!("The guest has no huge pages of {} KiB", page_size >> 10)));
    }
    overcommit(*page_size);
    let target = Path::new(HUGE_DIR).join(name);
    fs::create_dir_all(&target).map_err(failed("make", &target))?;
    let mut options = format!("uid={uid},gid={gid},pagesize={page_size}");
    if *size > 0 {
        options.push_str(&format!(",size={size}"));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("hugetlbfs"), &target, Some("hugetlbfs"), flags, Some(options.as_str()))
        .map_err(|errno| failed("mount", &target)(errno.into()))?;
    // The mount's own option takes no set-group-id, which an fsGroup needs.
    fs::set_permissions(&target, Permissions::from_mode(mode & 0o7777)).map_err(failed("set the mode of", &target))
}

/// Lets files of a volume have pages beyond those set aside, as long as the memory has them: containerd keeps the limits to itself unless
/// its disable_hugetlb_controller is false, so that nothing may be set aside at all.
fn overcommit(size: u64) {
    let path = pool(size).with_file_name("nr_overcommit_hugepages");
    // Sizes that are made at boot only refuse it.
    if let Err(error) = write(&path, i64::MAX as u64 / size) {
        tracing::debug!("{}", crate::display(error));
    }
}

fn read(path: &Path) -> Result<u64, HugeError> {
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    text.trim().parse().map_err(|_| failed("read a number from", path)(io::ErrorKind::InvalidData.into()))
}

fn write(path: &Path, value: u64) -> Result<(), HugeError> {
    fs::write(path, value.to_string()).map_err(failed("write", path))
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> HugeError + 'a {
    move |source| HugeError::Io { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(json: &str) -> Vec<LinuxHugepageLimit> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn limits_are_whole_pages() {
        let of = |json: &str| pages(&limits(json));
        assert_eq!(of(r#"[{"pageSize":"2MB","limit":5000000}]"#).unwrap(), Pages::from([(2 << 20, 2)]));
        assert_eq!(of(r#"[{"pageSize":"1GB","limit":0},{"pageSize":"64KB","limit":-1}]"#).unwrap()[&(64 << 10)], 0);
        for size in ["", "2", "MB", "2TB", "-1MB", "0MB", "99999999999GB", "2MB/../x"] {
            let json = format!(r#"[{{"pageSize":"{size}","limit":1}}]"#);
            assert!(matches!(of(&json), Err(HugeError::Unfit(_))), "{size}");
        }
    }

    #[test]
    fn names_of_volumes_are_numbers() {
        for name in ["", "..", "a", "1/2", "123456789012345678901"] {
            let volume = HugeVolume { name: name.to_owned(), page_size: 2 << 20, ..HugeVolume::default() };
            assert!(matches!(mount_volume(&volume), Err(HugeError::Unfit(_))), "{name}");
        }
    }

    #[test]
    fn more_than_there_is_is_refused_with_figures() {
        let error = HugePages::default().reserve("c", &limits(r#"[{"pageSize":"2MB","limit":1125899906842624}]"#), &[]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("1073741824 MiB") && text.contains("io.husk.memory-mib"), "{text}");
        let error = HugePages::default().reserve("c", &limits(r#"[{"pageSize":"64KB","limit":1048576}]"#), &[]);
        assert_eq!(error.unwrap_err().to_string(), "The guest has no huge pages of 64 KiB");
    }
}
