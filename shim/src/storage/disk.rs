//! What goes into the machine as a disk of its own: raw block volumes, and root file systems that lie on a block device or in an image
//! file. The host only opens them; their file systems are the guest's to read.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::StorageError;
use super::rootfs::{Options, RootfsMount};

/// File systems that the guest's kernel mounts from a disk.
const TYPES: [&str; 3] = ["ext4", "xfs", "erofs"];

/// A root file system on a disk.
#[derive(Debug)]
pub(crate) struct RootDisk {
    /// The device or image, open.
    pub(crate) file: OwnedFd,
    /// Whether the guest may only read it.
    pub(crate) read_only: bool,
    /// Type of the file system.
    pub(crate) kind: String,
    /// mount(2)'s flags.
    pub(crate) flags: u64,
    /// mount(2)'s options of the file system's own.
    pub(crate) data: String,
}

/// Opens a root file system that is one file system on one block device, or with the option `loop` in one file. None if it is
/// anything else, to be mounted on the host.
pub(crate) fn root_disk(mounts: &[RootfsMount]) -> Result<Option<RootDisk>, StorageError> {
    let [mount] = mounts else { return Ok(None) };
    if !TYPES.contains(&mount.kind.as_str()) || !matches!(mount.target.as_str(), "" | "/") {
        return Ok(None);
    }
    let failed = |step| failed(&mount.source, step);
    let options = Options::parse(&mount.options);
    let path = Path::new(&mount.source);
    let kind = fs::metadata(path).map_err(failed("look at it"))?.file_type();
    if !kind.is_block_device() && !(kind.is_file() && (options.looped || mount.kind == "erofs")) {
        return Ok(None);
    }
    if options.maps_ids() {
        let cause = Error::new(ErrorKind::Unsupported, "that is possible for root file systems in directories only");
        return Err(failed("map its user ids")(cause));
    }
    let read_only = options.readonly() || mount.kind == "erofs";
    // A claim on the device: while the guest has it, nobody on the host mounts it too (open(2), O_EXCL on block devices).
    let claim = if kind.is_block_device() && !read_only { libc::O_EXCL } else { 0 };
    let file = OpenOptions::new().read(true).write(!read_only).custom_flags(claim).open(path);
    let mut flags = options.flags.bits();
    if read_only {
        flags |= libc::MS_RDONLY;
    }
    Ok(Some(RootDisk {
        file: file.map_err(failed("open it"))?.into(),
        read_only,
        kind: mount.kind.clone(),
        flags,
        data: options.data,
    }))
}

/// Opens the host's block device with these numbers.
pub(crate) fn open_device(major: i64, minor: i64, read_only: bool) -> Result<OwnedFd, StorageError> {
    let name = format!("block device {major}:{minor}");
    let failed = |step| failed(&name, step);
    // The kernel knows its name in /dev (Documentation/ABI/testing/sysfs-dev); udev's links may not be there.
    let uevent = format!("/sys/dev/block/{major}:{minor}/uevent");
    let uevent = fs::read_to_string(uevent).map_err(failed("find it in /sys/dev/block"))?;
    let node = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let node = node.ok_or_else(|| failed("learn its name in /dev")(ErrorKind::NotFound.into()))?;
    let file = OpenOptions::new().read(true).write(!read_only).open(Path::new("/dev").join(node));
    let file: File = file.map_err(failed("open it"))?;
    let metadata = file.metadata().map_err(failed("look at it"))?;
    let number = metadata.rdev();
    let is_it = metadata.file_type().is_block_device()
        && (i64::from(libc::major(number)), i64::from(libc::minor(number))) == (major, minor);
    if !is_it {
        return Err(failed("open it")(Error::other(format!("/dev/{node} is another device"))));
    }
    Ok(file.into())
}

fn failed(name: &str, step: &'static str) -> impl FnOnce(Error) -> StorageError {
    let name = name.to_owned();
    move |cause| StorageError::Disk { name, step, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> RootfsMount {
        RootfsMount {
            kind: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    #[test]
    fn images_are_disks_and_other_mounts_are_not() {
        let image = std::env::temp_dir().join(format!("husk-image-{}", std::process::id()));
        fs::write(&image, [0; 4096]).unwrap();
        let path = image.to_str().unwrap();
        let disk = root_disk(&[mount("ext4", path, &["loop", "noatime", "data=ordered"])]).unwrap().unwrap();
        assert_eq!((disk.read_only, disk.flags, disk.data.as_str()), (false, libc::MS_NOATIME, "data=ordered"));
        let disk = root_disk(&[mount("xfs", path, &["loop", "ro"])]).unwrap().unwrap();
        assert_eq!((disk.read_only, disk.flags, disk.kind.as_str()), (true, libc::MS_RDONLY, "xfs"));
        assert!(root_disk(&[mount("erofs", path, &[])]).unwrap().unwrap().read_only);
        let mut inner = mount("ext4", path, &["loop"]);
        inner.target = "/inner".into();
        let others =
            [mount("ext4", path, &[]), mount("overlay", path, &[]), mount("ext4", "/dev/null", &["loop"]), inner];
        for other in others {
            assert!(root_disk(std::slice::from_ref(&other)).unwrap().is_none(), "{other:?}");
        }
        assert!(root_disk(&[]).unwrap().is_none());
        let error = root_disk(&[mount("ext4", path, &["loop", "uidmap=0:1:1", "gidmap=0:1:1"])]).unwrap_err();
        assert!(error.to_string().contains("map its user ids"), "{error}");
        fs::remove_file(&image).unwrap();
        let error = root_disk(&[mount("ext4", path, &["loop"])]).unwrap_err();
        assert!(error.to_string().contains("husk-image"), "{error}");
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = open_device(4095, 1, true).unwrap_err();
        assert!(error.to_string().contains("4095:1"), "{error}");
    }
}
