//! Mount options of the OCI spec (runtime-spec, config.md, "Linux mount options") as the kernel's mount API wants them.

use nix::mount::MsFlags;

use crate::sys::{MountAttr, attr};

/// A mount's options, sorted by who takes them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// A bind mount; `true`: with the mounts below.
    pub(crate) bind: Option<bool>,
    /// For this mount.
    pub(crate) attributes: MountAttr,
    /// For this mount and those below.
    pub(crate) recursive: MountAttr,
    /// MS_PRIVATE etc. with MS_REC, in order.
    pub(crate) propagation: Vec<MsFlags>,
    /// A tmpfs starts with what it covers.
    pub(crate) copy_up: bool,
    /// For the file system.
    pub(crate) data: Vec<(String, Option<String>)>,
}

impl Options {
    pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Self {
        let mut parsed = Self::default();
        // An option may itself be a list, as in fstab.
        for option in options.into_iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()) {
            parsed.add(option);
        }
        parsed
    }

    /// Read-only by plain option.
    pub(crate) fn read_only(&self) -> bool {
        self.attributes.set & attr::RDONLY != 0
    }

    fn add(&mut self, option: &str) {
        match option {
            "defaults" => {}
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "tmpcopyup" => self.copy_up = true,
            // Of the file system, not of the mount; flags of mount(2) that the new API takes as words.
            "async" | "nomand" | "noiversion" | "nolazytime" | "silent" | "loud" | "norelatime" | "remount" => {}
            "sync" | "dirsync" | "mand" | "lazytime" | "iversion" => self.data.push((option.to_owned(), None)),
            _ => self.add_flag(option),
        }
    }

    fn add_flag(&mut self, option: &str) {
        if let Some(flags) = propagation(option) {
            self.propagation.push(flags);
        } else if let Some(change) = attribute(option) {
            merge(&mut self.attributes, change);
        } else if let Some(change) = option.strip_prefix('r').and_then(attribute) {
            merge(&mut self.recursive, change);
        } else {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value.to_owned())),
                None => (option, None),
            };
            self.data.push((key.to_owned(), value));
        }
    }
}

/// The later option wins.
fn merge(into: &mut MountAttr, (set, clear): (u64, u64)) {
    into.set = into.set & !clear | set;
    into.clear = into.clear & !set | clear;
}

/// What to set and what to clear. A kind of atime is chosen by clearing all of the field and setting the one (mount_setattr(2)).
fn attribute(option: &str) -> Option<(u64, u64)> {
    Some(match option {
        "ro" => (attr::RDONLY, 0),
        "rw" => (0, attr::RDONLY),
        "nosuid" => (attr::NOSUID, 0),
        "suid" => (0, attr::NOSUID),
        "nodev" => (attr::NODEV, 0),
        "dev" => (0, attr::NODEV),
        "noexec" => (attr::NOEXEC, 0),
        "exec" => (0, attr::NOEXEC),
        "nodiratime" => (attr::NODIRATIME, 0),
        "diratime" => (0, attr::NODIRATIME),
        "nosymfollow" => (attr::NOSYMFOLLOW, 0),
        "symfollow" => (0, attr::NOSYMFOLLOW),
        "noatime" => (attr::NOATIME, attr::ATIME_MASK),
        "strictatime" => (attr::STRICTATIME, attr::ATIME_MASK),
        "atime" | "relatime" | "nostrictatime" => (0, attr::ATIME_MASK),
        _ => return None,
    })
}

/// Also of linux.rootfsPropagation.
pub(crate) fn propagation(word: &str) -> Option<MsFlags> {
    let (kind, recursive) = match word.strip_prefix('r') {
        Some(rest) if !word.starts_with("runbindable") || rest == "unbindable" => (rest, true),
        _ => (word, false),
    };
    let flags = match kind {
        "private" => MsFlags::MS_PRIVATE,
        "slave" => MsFlags::MS_SLAVE,
        "shared" => MsFlags::MS_SHARED,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(if recursive { flags | MsFlags::MS_REC } else { flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(options.iter().copied())
    }

    #[test]
    fn sorts_them() {
        let options = parse(&["rbind", "ro", "nosuid", "rro", "rslave", "rprivate", "size=64k", "mode=755", "noswap"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.attributes.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(options.recursive.set, attr::RDONLY);
        assert_eq!(options.propagation, [MsFlags::MS_SLAVE | MsFlags::MS_REC, MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
        assert_eq!(options.data[0], ("size".into(), Some("64k".into())));
        assert_eq!(options.data[2], ("noswap".into(), None));
    }

    #[test]
    fn the_last_word_wins() {
        let options = parse(&["ro", "rw", "noatime", "relatime", "bind", "rbind", "bind"]);
        assert_eq!(options.attributes.set, 0);
        assert_eq!(options.attributes.clear, attr::RDONLY | attr::ATIME_MASK);
        assert_eq!(options.bind, Some(true), "rbind can't be taken back by bind, as in runc");
        assert!(!options.read_only());
    }

    #[test]
    fn remount_and_relatime_are_not_recursive_forms() {
        let options = parse(&["remount", "relatime", "ro,nodev"]);
        assert_eq!(options.recursive, MountAttr::default());
        assert!(options.data.is_empty());
        assert_eq!(options.attributes.set, attr::RDONLY | attr::NODEV);
    }
}
