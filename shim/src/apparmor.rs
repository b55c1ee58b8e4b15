//! AppArmor profiles of the host's kernel, given to the guest's: the host's securityfs keeps every profile's policy in the binary form in
//! which it was loaded (kernel: security/apparmor/apparmorfs.c; CONFIG_SECURITY_APPARMOR_EXPORT_BINARY).

use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::peer::PeerError;
use crate::peer::agent::Agent;

/// The host's profiles.
const PROFILES: &str = "/sys/kernel/security/apparmor/policy/profiles";

/// Largest policy in bytes, below ttrpc's largest message of 4 MiB. containerd's default profile has 30 KiB.
const MAX_POLICY: u64 = 3 << 20;

/// Longest name that the kernel is asked for.
const MAX_NAME: usize = 512;

/// Why a profile can't be had.
#[derive(Debug, Error)]
pub(crate) enum ProfileError {
    /// No such profile, or no AppArmor.
    #[error("the AppArmor profile {0:?} is not loaded on this host")]
    NotLoaded(String),
    /// More than one.
    #[error(
        "the AppArmor profile {0:?} is a stack or lies in a namespace of the host's: husk loads single profiles only"
    )]
    Unfit(String),
    /// The kernel has forgotten the policy.
    #[error(
        "the host's kernel keeps no policy of the AppArmor profile {0:?}, so it cannot be loaded in the virtual machine: boot the host with apparmor.export_binary=1 and load the profile again"
    )]
    NoPolicy(String),
    /// More than anybody needs.
    #[error("the policy of the AppArmor profile {0:?} has more than {MAX_POLICY} bytes")]
    TooLarge(String),
    /// The host's securityfs.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// Work that was cut off.
    #[error("the reading of an AppArmor profile ended early")]
    Cut(#[from] tokio::task::JoinError),
}

/// The profiles that a guest has been given, with a hash of each one's policy.
#[derive(Debug, Default)]
pub(crate) struct Given(tokio::sync::Mutex<HashMap<String, u64>>);

impl Given {
    /// Makes sure that the guest has the profile called `name` as the host has it now.
    pub(crate) async fn give(&self, agent: &Agent, name: &str) -> Result<(), ProfileError> {
        let owned = name.to_owned();
        let policy = tokio::task::spawn_blocking(move || policy(Path::new(PROFILES), &owned)).await??;
        let mut hasher = DefaultHasher::new();
        policy.hash(&mut hasher);
        // Held over the call, so that nobody takes a profile for loaded before it is.
        let mut given = self.0.lock().await;
        if given.get(name) != Some(&hasher.finish()) {
            agent.load_profile(name, policy).await?;
            given.insert(name.to_owned(), hasher.finish());
        }
        Ok(())
    }

    /// Makes sure that the guest has some version of the profile called `name`, as for a further process of a container.
    pub(crate) async fn give_once(&self, agent: &Agent, name: &str) -> Result<(), ProfileError> {
        if self.0.lock().await.contains_key(name) {
            return Ok(());
        }
        self.give(agent, name).await
    }
}

/// The profile that a process wants to run under, if it is not what it would be anyway.
pub(crate) fn wanted(process: Option<&oci_spec::runtime::Process>) -> Option<&str> {
    process?.apparmor_profile().as_deref().filter(|name| !matches!(*name, "" | "unconfined"))
}

/// The binary policy that the profile `name` came in.
fn policy(profiles: &Path, name: &str) -> Result<Vec<u8>, ProfileError> {
    if name.len() > MAX_NAME || name.starts_with(':') || name.contains("//&") {
        return Err(ProfileError::Unfit(name.to_owned()));
    }
    // A child profile comes with its parent.
    let top = name.split("//").next().unwrap_or(name);
    let directory = find(profiles, top)?.ok_or_else(|| ProfileError::NotLoaded(name.to_owned()))?;
    let path = directory.join("raw_data");
    let read = |source| ProfileError::Read { path: path.clone(), source };
    let file = match File::open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(ProfileError::NoPolicy(name.to_owned())),
        other => other.map_err(read)?,
    };
    let mut policy = Vec::new();
    file.take(MAX_POLICY + 1).read_to_end(&mut policy).map_err(read)?;
    match policy.len() as u64 {
        0 => Err(ProfileError::NoPolicy(name.to_owned())),
        length if length > MAX_POLICY => Err(ProfileError::TooLarge(name.to_owned())),
        _ => Ok(policy),
    }
}

/// The directory of a profile: its mangled name, a dot, and a number; the file `name` in it has the name itself.
fn find(profiles: &Path, name: &str) -> Result<Option<PathBuf>, ProfileError> {
    let prefix = mangled(name);
    let listed = match fs::read_dir(profiles) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|source| ProfileError::Read { path: profiles.to_owned(), source })?,
    };
    // The newest has the highest number.
    let mut newest = None;
    for entry in listed.flatten() {
        let file = entry.file_name();
        let Some((stem, number)) = file.to_str().and_then(|file| file.rsplit_once('.')) else { continue };
        let Ok(number) = number.parse::<u64>() else { continue };
        if stem == prefix
            && newest.as_ref().is_none_or(|(highest, _)| number > *highest)
            && fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim_end_matches('\n') == name)
        {
            newest = Some((number, entry.path()));
        }
    }
    Ok(newest.map(|(_, path)| path))
}

/// A profile's name as the kernel makes a directory's of it (`mangle_name`).
fn mangled(name: &str) -> String {
    name.trim_start_matches(['/', '.'])
        .chars()
        .filter_map(|letter| match letter {
            '/' => Some('.'),
            letter if letter.is_ascii_whitespace() => Some('_'),
            letter if letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-') => Some(letter),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("husk-apparmor-{name}-{}", std::process::id()));
        for (directory, profile, policy) in [
            ("usr.bin.man.3", "/usr/bin/man", Some("old")),
            ("usr.bin.man.12", "/usr/bin/man", Some("new")),
            ("usr.bin.man.40", "usr/bin/man", Some("another's")),
            ("bare.7", "bare", None),
        ] {
            let directory = root.join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("name"), format!("{profile}\n")).unwrap();
            if let Some(policy) = policy {
                fs::write(directory.join("raw_data"), policy).unwrap();
            }
        }
        root
    }

    #[test]
    fn finds_the_newest_of_a_name() {
        let root = host("newest");
        assert_eq!(policy(&root, "/usr/bin/man").unwrap(), b"new");
        assert_eq!(policy(&root, "/usr/bin/man//filter").unwrap(), b"new");
        assert!(matches!(policy(&root, "man"), Err(ProfileError::NotLoaded(_))));
        assert!(matches!(policy(&root, "bare"), Err(ProfileError::NoPolicy(_))));
        assert!(matches!(policy(Path::new("/no/such/place"), "bare"), Err(ProfileError::NotLoaded(_))));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn bounds_what_a_name_and_a_policy_can_be() {
        let root = host("bounds");
        for name in [":ns:bare", "bare//&other", &"x".repeat(MAX_NAME + 1)] {
            assert!(matches!(policy(&root, name), Err(ProfileError::Unfit(_))), "{name}");
        }
        for name in ["../bare", "", "..", "/"] {
            assert!(matches!(policy(&root, name), Err(ProfileError::NotLoaded(_))), "{name}");
        }
        let raw = File::create(root.join("bare.7/raw_data")).unwrap();
        raw.set_len(MAX_POLICY).unwrap();
        assert!(policy(&root, "bare").is_ok());
        raw.set_len(MAX_POLICY + 1).unwrap();
        assert!(matches!(policy(&root, "bare"), Err(ProfileError::TooLarge(_))));
        fs::remove_dir_all(root).unwrap();
    }
}
