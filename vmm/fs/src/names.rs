//! Names that the guest gives: each is one component of a directory and nothing else, whatever the guest's kernel would have sent.

use std::ffi::CStr;

use crate::sys::Errno;

/// NAME_MAX of limits.h.
const LONGEST: usize = 255;

/// A checked name of a directory entry: not empty, not `.` or `..`, without `/`, at most 255 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks `name`; ENAMETOOLONG or EINVAL when it is none.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::EINVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::EINVAL),
            bytes if bytes.len() > LONGEST => Err(Errno::ENAMETOOLONG),
            _ => Ok(Self(name)),
        }
    }

    /// As a C string, for system calls.
    pub fn as_cstr(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_single_components_pass() {
        for good in [c"a", c"...", c".a", c"..a", c"a b\n", c"\\", c"\xff\xfe"] {
            assert!(Name::new(good).is_ok(), "{good:?}");
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"/etc", c"a/", c"../x"] {
            assert_eq!(Name::new(bad), Err(Errno::EINVAL), "{bad:?}");
        }
        assert!(Name::new(&CString::new(vec![b'x'; 255]).unwrap()).is_ok());
        assert_eq!(Name::new(&CString::new(vec![b'x'; 256]).unwrap()), Err(Errno::ENAMETOOLONG));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_passes_is_one_component(bytes in proptest::collection::vec(1u8..=255, 0..300)) {
            let string = CString::new(bytes.clone()).unwrap();
            let sound = !bytes.is_empty() && bytes.len() <= 255 && !bytes.contains(&b'/') && bytes != b"." && bytes != b"..";
            prop_assert_eq!(Name::new(&string).is_ok(), sound);
        }
    }
}
