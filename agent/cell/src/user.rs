//! The container's /etc/passwd, as far as HOME needs it.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    os::fd::OwnedFd,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{SFlag, fstat},
};

use crate::paths;

/// Larger files are read no further: this is an image's file.
const MAX_PASSWD: u64 = 1 << 20;

/// The home directory of `uid`, `/` if the container doesn't know it.
pub(crate) fn home(root: &OwnedFd, uid: u32) -> String {
    passwd(root).and_then(|file| find_home(BufReader::new(file.take(MAX_PASSWD)), uid)).unwrap_or_else(|| "/".into())
}

fn passwd(root: &OwnedFd) -> Option<File> {
    // O_NONBLOCK, since a FIFO here would hang us.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(root, "etc/passwd", how).ok()?;
    paths::is(&fstat(&file).ok()?, SFlag::S_IFREG).then(|| file.into())
}

fn find_home(lines: impl BufRead, uid: u32) -> Option<String> {
    // passwd(5): name:password:uid:gid:comment:home:shell
    lines.lines().map_while(Result::ok).find_map(|line| {
        let mut fields = line.split(':');
        (fields.nth(2)?.parse() == Ok(uid)).then(|| fields.nth(2).filter(|home| !home.is_empty()).map(str::to_owned))?
    })
}

#[cfg(test)]
mod tests {
    use super::find_home;

    #[test]
    fn finds_by_uid() {
        let text = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\nempty:x:34:34:::\n";
        assert_eq!(find_home(text.as_bytes(), 33).as_deref(), Some("/var/www"));
        assert_eq!(find_home(text.as_bytes(), 0).as_deref(), Some("/root"));
        assert_eq!(find_home(text.as_bytes(), 34), None);
        assert_eq!(find_home(text.as_bytes(), 99), None);
    }
}
