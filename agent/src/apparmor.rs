//! AppArmor in the guest's kernel: profiles that the shim brings from the host (kernel: Documentation/admin-guide/LSM/apparmor.rst and
//! security/apparmor/apparmorfs.c).

use std::fs;
use std::io;

use thiserror::Error;

/// Takes a policy in its binary form, and replaces profiles of the same name. The whole policy is one write.
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";

/// The loaded profiles, a line each: the name and, in parentheses, the mode.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// Longest policy in bytes.
const MAX_POLICY: usize = 3 << 20;

/// Why a profile is not there.
#[derive(Debug, Error)]
pub(crate) enum ProfileError {
    #[error("The policy of the AppArmor profile {name:?} has {length} bytes; {MAX_POLICY} are possible")]
    Length { name: String, length: usize },
    #[error("The guest's kernel did not take the policy of the AppArmor profile {name:?}")]
    Refused {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("The policy that came for the AppArmor profile {0:?} is not its")]
    Other(String),
}

/// Loads `policy`, after which the profile `name` must be there.
pub(crate) fn load(name: &str, policy: &[u8]) -> Result<(), ProfileError> {
    if policy.is_empty() || policy.len() > MAX_POLICY {
        return Err(ProfileError::Length { name: name.to_owned(), length: policy.len() });
    }
    let refused = |source| ProfileError::Refused { name: name.to_owned(), source };
    fs::write(REPLACE, policy).map_err(refused)?;
    let loaded = fs::read_to_string(PROFILES).map_err(refused)?;
    if husk_cell::profile_is_listed(&loaded, name) { Ok(()) } else { Err(ProfileError::Other(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_the_policy() {
        assert!(matches!(load("x", &[]), Err(ProfileError::Length { length: 0, .. })));
        assert!(matches!(load("x", &vec![0; MAX_POLICY + 1]), Err(ProfileError::Length { .. })));
    }

    #[test]
    fn what_the_kernel_does_not_take_is_refused_by_name() {
        let error = load("husk-test-none", b"no policy").unwrap_err();
        assert!(matches!(error, ProfileError::Refused { .. }), "{error}");
        assert!(
            error.to_string().contains("did not take the policy of the AppArmor profile \"husk-test-none\""),
            "{error}"
        );
    }
}
