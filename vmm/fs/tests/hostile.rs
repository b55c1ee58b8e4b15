//! What a hostile guest may send: nothing makes the server panic, leave the share, or grow without bound.

mod harness;

use std::fs;

use harness::{Guest, bytes, name, parse};
use husk_fs::wire::{
    BatchForgetIn, CopyFileRangeIn, CreateIn, FallocateIn, GetxattrIn, InHeader, InitIn, InitOut, LinkIn, LseekIn,
    MkdirIn, MknodIn, OutHeader, ReadIn, Rename2In, RenameIn, SetattrIn, SetxattrIn, WriteIn, fattr, opcode,
};
use proptest::prelude::*;

const BAD_NAMES: [&str; 8] = ["", ".", "..", "/", "a/b", "../x", "/etc/passwd", "x/"];

#[test]
fn bad_names_are_refused_by_every_operation() {
    let mut guest = Guest::new();
    fs::create_dir(guest.host("d")).unwrap();
    fs::write(guest.host("f"), "").unwrap();
    let (d, f) = (guest.lookup(1, "d").unwrap().nodeid, guest.lookup(1, "f").unwrap().nodeid);
    let long = "x".repeat(256);
    for (bad, errno) in BAD_NAMES.iter().map(|bad| (*bad, libc::EINVAL)).chain([(&*long, libc::ENAMETOOLONG)]) {
        let refused = Err(errno);
        for plain in [opcode::LOOKUP, opcode::UNLINK, opcode::RMDIR] {
            assert_eq!(guest.call(plain, d, &name(bad)), refused, "{plain} {bad:?}");
        }
        let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
        assert_eq!(guest.with(opcode::CREATE, d, &create, &[bad]), refused);
        assert_eq!(guest.with(opcode::MKDIR, d, &MkdirIn::default(), &[bad]), refused);
        assert_eq!(
            guest.with(opcode::MKNOD, d, &MknodIn { mode: libc::S_IFREG, ..MknodIn::default() }, &[bad]),
            refused
        );
        assert_eq!(guest.call(opcode::SYMLINK, d, &[name(bad), name("target")].concat()), refused);
        assert_eq!(guest.with(opcode::LINK, d, &LinkIn { oldnodeid: f }, &[bad]), refused);
        assert_eq!(guest.with(opcode::RENAME, 1, &RenameIn { newdir: d }, &["f", bad]), refused);
        assert_eq!(guest.with(opcode::RENAME, d, &RenameIn { newdir: 1 }, &[bad, "g"]), refused);
        assert_eq!(
            guest.with(opcode::RENAME2, 1, &Rename2In { newdir: d, ..Rename2In::default() }, &["f", bad]),
            refused
        );
    }
    assert_eq!(fs::read_dir(guest.host("d")).unwrap().count(), 0);
}

#[test]
fn truncated_requests_are_refused() {
    let mut guest = Guest::new();
    let (file, open) = guest.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    let directory = guest.opendir(1).unwrap().fh;
    let whole: Vec<(u32, u64, Vec<u8>)> = vec![
        (opcode::LOOKUP, 1, name("f")),
        (opcode::GETATTR, 1, vec![0; 16]),
        (opcode::STATX, 1, vec![0; 24]),
        (opcode::SETATTR, 1, bytes(&SetattrIn::default())),
        (opcode::OPEN, file.nodeid, vec![0; 8]),
        (opcode::READ, file.nodeid, bytes(&ReadIn { fh: open.fh, size: 10, ..ReadIn::default() })),
        (opcode::READDIR, 1, bytes(&ReadIn { fh: directory, size: 4096, ..ReadIn::default() })),
        (opcode::READDIRPLUS, 1, bytes(&ReadIn { fh: directory, size: 4096, ..ReadIn::default() })),
        (
            opcode::WRITE,
            file.nodeid,
            [bytes(&WriteIn { fh: open.fh, size: 4, ..WriteIn::default() }), vec![1; 4]].concat(),
        ),
        (opcode::GETXATTR, 1, [bytes(&GetxattrIn::default()), name("user.a")].concat()),
        (opcode::LISTXATTR, 1, bytes(&GetxattrIn::default())),
        (
            opcode::SETXATTR,
            1,
            [bytes(&SetxattrIn { size: 3, ..SetxattrIn::default() }), name("user.a"), vec![1; 3]].concat(),
        ),
        (opcode::LSEEK, file.nodeid, bytes(&LseekIn { fh: open.fh, whence: 3, ..LseekIn::default() })),
        (
            opcode::COPY_FILE_RANGE,
            1,
            bytes(&CopyFileRangeIn { fh_in: open.fh, fh_out: open.fh, ..CopyFileRangeIn::default() }),
        ),
        (opcode::RENAME2, 1, [bytes(&Rename2In { newdir: 1, ..Rename2In::default() }), name("f"), name("f")].concat()),
        (opcode::LINK, 1, [bytes(&LinkIn { oldnodeid: file.nodeid }), name("g")].concat()),
        (opcode::CREATE, 1, [bytes(&CreateIn { flags: 2, ..CreateIn::default() }), name("h")].concat()),
        (opcode::MKNOD, 1, [bytes(&MknodIn { mode: libc::S_IFREG, ..MknodIn::default() }), name("i")].concat()),
        (opcode::MKDIR, 1, [bytes(&MkdirIn::default()), name("j")].concat()),
        (opcode::SYMLINK, 1, [name("k"), name("target")].concat()),
        (opcode::FALLOCATE, file.nodeid, bytes(&FallocateIn { fh: open.fh, length: 1, ..FallocateIn::default() })),
        (opcode::RELEASE, file.nodeid, vec![0; 24]),
    ];
    for (opcode, node, body) in whole {
        for length in 0..body.len() {
            assert_eq!(guest.call(opcode, node, &body[..length]), Err(libc::EINVAL), "opcode {opcode}, {length} bytes");
        }
    }
    for length in 0..size_of::<InHeader>() {
        let header = bytes(&guest.header(opcode::GETATTR, 1, 0));
        assert!(guest.raw(&header[..length], 4096, 4096).is_empty());
    }
    assert_eq!(fs::read_dir(guest.host("")).unwrap().count(), 1);
}

#[test]
fn lengths_and_counts_are_bounded() {
    let mut guest = Guest::new();
    let (file, open) = guest.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    guest.write(file.nodeid, open.fh, 0, b"text", 0).unwrap();
    // More than the chain has.
    let mut body = bytes(&WriteIn { fh: open.fh, size: u32::MAX, ..WriteIn::default() });
    body.extend_from_slice(b"short");
    assert_eq!(guest.call(opcode::WRITE, file.nodeid, &body), Err(libc::EINVAL));
    // A READ and a listing of 4 GiB into little room.
    let huge = ReadIn { fh: open.fh, size: u32::MAX, ..ReadIn::default() };
    assert_eq!(guest.call_with_room(opcode::READ, file.nodeid, &bytes(&huge), 2).unwrap(), b"te");
    assert_eq!(guest.call_with_room(opcode::READ, file.nodeid, &bytes(&huge), 0).unwrap(), b"");
    let fh = guest.opendir(1).unwrap().fh;
    let huge = ReadIn { fh, size: u32::MAX, ..ReadIn::default() };
    assert!(guest.call_with_room(opcode::READDIRPLUS, 1, &bytes(&huge), 4000).unwrap().len() <= 4000);
    // Offsets beyond what the host's type holds.
    assert_eq!(guest.read(file.nodeid, open.fh, u64::MAX, 10), Err(libc::EINVAL));
    assert_eq!(guest.write(file.nodeid, open.fh, 1 << 63, b"x", 0), Err(libc::EINVAL));
    let size = SetattrIn { valid: fattr::SIZE, size: u64::MAX, ..SetattrIn::default() };
    assert_eq!(guest.with(opcode::SETATTR, file.nodeid, &size, &[]), Err(libc::EFBIG));
    let seek = ReadIn { fh, offset: u64::MAX, size: 4096, ..ReadIn::default() };
    assert_eq!(guest.with(opcode::READDIR, 1, &seek, &[]), Err(libc::EINVAL));
    // Attributes.
    let get = GetxattrIn { size: u32::MAX, padding: 0 };
    assert_eq!(guest.with(opcode::GETXATTR, 1, &get, &["user.none"]), Err(libc::ENODATA));
    let set = SetxattrIn { size: u32::MAX, ..SetxattrIn::default() };
    assert_eq!(guest.with(opcode::SETXATTR, 1, &set, &["user.a"]), Err(libc::E2BIG));
    // A body beyond any bound, and a reply that does not fit.
    assert_eq!(guest.call(opcode::LOOKUP, 1, &vec![b'x'; 1 << 20]), Err(libc::EINVAL));
    assert_eq!(guest.call_with_room(opcode::GETATTR, 1, &[0; 16], 8), Err(libc::EIO));
    // No room for a header.
    let request = [bytes(&guest.header(opcode::GETATTR, 1, 16)), vec![0; 16]].concat();
    for room in 0..16 {
        assert!(guest.raw(&request, room, 4096).is_empty());
    }
    // The header's length says less or more than there is.
    let mut header = guest.header(opcode::GETATTR, 1, 16);
    for (length, errno) in [(0, -libc::EINVAL), (40, -libc::EINVAL), (55, -libc::EINVAL), (56, 0), (u32::MAX, 0)] {
        header.len = length;
        let reply = guest.raw(&[bytes(&header), vec![0; 16]].concat(), 4096, 4096);
        assert_eq!(parse::<OutHeader>(&reply).error, errno, "{length}");
    }
    let batch = [bytes(&BatchForgetIn { count: u32::MAX, dummy: 0 }), vec![0xff; 40]].concat();
    assert_eq!(guest.call(opcode::BATCH_FORGET, 0, &batch), Err(0));
    guest.getattr(1).unwrap();
}

#[test]
fn requests_in_pieces_of_one_byte_are_the_same() {
    let mut guest = Guest::new();
    let request = [bytes(&guest.header(opcode::MKDIR, 1, 10)), vec![0xed, 1, 0, 0, 0, 0, 0, 0], name("d")].concat();
    let reply = guest.raw(&request, 16 + 128, 1);
    assert_eq!(reply.len(), 144);
    assert!(guest.host("d").is_dir());
}

#[test]
fn nothing_works_before_init_and_versions_are_checked() {
    let directory = tempfile::tempdir().unwrap();
    let share = directory.path().to_owned();
    let mut guest = Guest::before_init(directory, share);
    assert_eq!(guest.call(opcode::GETATTR, 1, &[0; 16]), Err(libc::EIO));
    let mut init = |major, minor| guest.with(opcode::INIT, 0, &InitIn { major, minor, ..InitIn::default() }, &[]);
    assert_eq!(init(6, 99), Err(libc::EPROTO));
    assert_eq!(init(7, 20), Err(libc::EPROTO));
    assert_eq!(parse::<InitOut>(&init(8, 0).unwrap()).major, 7);
    assert_eq!(guest.call(opcode::GETATTR, 1, &[0; 16]), Err(libc::EIO));
    guest.init();
    guest.getattr(1).unwrap();
    let node = guest.mkdir(1, "d", 0o755).unwrap().nodeid;
    guest.init();
    assert_eq!(guest.getattr(node).unwrap_err(), libc::ESTALE, "a new session knows nothing of the old one's");
    guest.call(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.call(opcode::GETATTR, 1, &[0; 16]), Err(libc::EIO));
}

#[test]
fn unknown_operations_are_not_there() {
    let mut guest = Guest::new();
    for opcode in [0, 7, 19, 31, 32, 33, 34, 37, 39, 40, 41, 48, 49, 53, 4096, 1_048_576, u32::MAX] {
        assert_eq!(guest.call(opcode, 1, &[0; 64]), Err(libc::ENOSYS), "{opcode}");
    }
    assert_eq!(guest.call(opcode::INTERRUPT, 0, &[0; 8]), Err(0), "no reply");
}

#[test]
fn open_handles_are_bounded() {
    let mut guest = Guest::new();
    let mut count = 0;
    let errno = loop {
        match guest.opendir(1) {
            Ok(_) => count += 1,
            Err(errno) => break errno,
        }
        if count > 300_000 {
            return eprintln!("skipped: the limit of open files is too high to be reached");
        }
    };
    assert_eq!(errno, libc::ENFILE);
    // There is still enough to serve with.
    fs::write(guest.host("f"), "x").unwrap();
    guest.lookup(1, "f").unwrap();
}

#[test]
fn handles_of_one_kind_are_not_the_other() {
    let mut guest = Guest::new();
    let (file, open) = guest.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    let directory = guest.opendir(1).unwrap().fh;
    assert_ne!(directory, open.fh);
    assert_eq!(guest.read(1, directory, 0, 10), Err(libc::EBADF));
    let list = ReadIn { fh: open.fh, size: 4096, ..ReadIn::default() };
    assert_eq!(guest.with(opcode::READDIR, file.nodeid, &list, &[]), Err(libc::EBADF));
    // Another node's handle does not stand for this one.
    let (other, _) = guest.create(1, "g", libc::O_RDWR, 0o600).unwrap();
    let size = SetattrIn { valid: fattr::SIZE | fattr::FH, fh: open.fh, size: 100, ..SetattrIn::default() };
    guest.with(opcode::SETATTR, other.nodeid, &size, &[]).unwrap();
    assert_eq!(fs::metadata(guest.host("f")).unwrap().len(), 0);
    assert_eq!(fs::metadata(guest.host("g")).unwrap().len(), 100);
}

/// An opcode that exists, mostly.
fn any_opcode() -> impl Strategy<Value = u32> {
    prop_oneof![20 => 0u32..60, 1 => any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_requests_are_answered(
        requests in proptest::collection::vec(
            (any_opcode(), 0u64..6, proptest::collection::vec(prop_oneof![3 => Just(0u8), 2 => 0u8..8, 1 => any::<u8>()], 0..120),
             0usize..600, 1usize..100),
            1..60,
        )
    ) {
        let mut guest = Guest::new();
        fs::write(guest.host("f"), "contents").unwrap();
        for (opcode, node, body, room, piece) in requests {
            // What waits for the whole machine's disks, or allocates the whole disk, is another test's.
            if opcode == opcode::SYNCFS || opcode == opcode::FALLOCATE {
                continue;
            }
            let request = [bytes(&guest.header(opcode, node, body.len())), body].concat();
            let reply = guest.raw(&request, room, piece);
            prop_assert!(reply.is_empty() || reply.len() >= 16);
            if !reply.is_empty() {
                let header: OutHeader = parse(&reply);
                prop_assert_eq!(header.len as usize, reply.len());
                prop_assert!(header.error <= 0 && header.error > -4096);
            }
        }
        guest.init();
        guest.getattr(1).unwrap();
    }

    #[test]
    fn random_bytes_are_answered(request in proptest::collection::vec(any::<u8>(), 0..200), room in 0usize..300) {
        let mut guest = Guest::new();
        let reply = guest.raw(&request, room, 64);
        prop_assert!(reply.is_empty() || reply.len() >= 16);
    }
}
