//! The store against damage, foreign files, and other builders. It takes root, whose own everything must be.

use std::os::unix::fs::{PermissionsExt, symlink};

use husk_snapshot::MemorySum;
use tempfile::TempDir;

use super::*;
use crate::template::key;

struct World {
    place: TempDir,
    store: Store,
    inputs: Inputs,
}

impl World {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let store =
            Store { root: place.path().join("lib/templates"), notes: Notes::at(place.path().join("run/.templates")) };
        let inputs = key::tests::inputs(place.path());
        Self { place, store, inputs }
    }

    /// Makes a template whose memory holds `filling` at its beginning.
    fn make(&self, inputs: &Inputs, filling: &[u8]) {
        let lock = self.store.try_lock().unwrap().unwrap();
        let (made, files) = self.store.begin(&inputs.name(), &lock).unwrap();
        let (mut state, memory) = (File::from(files.state), File::from(files.memory));
        memory.set_len(inputs.memory_mib << 20).unwrap();
        let mut block = vec![0; 64 << 10];
        block[..filling.len()].copy_from_slice(filling);
        std::os::unix::fs::FileExt::write_all_at(&memory, &block, 0).unwrap();
        let sum = MemorySum { len: block.len() as u64, checksum: crc32fast::hash(&block) };
        state.write_all(&husk_snapshot::wire::encode(b"state", sum)).unwrap();
        let manifest = Manifest {
            nonce: "ab".repeat(16),
            created_s: 1,
            memory_length: inputs.memory_mib << 20,
            code: Some(Code { start: 0, end: 64 << 10 }),
            inputs: inputs.clone(),
        };
        self.store.finish(&made, &manifest, &lock).unwrap();
    }

    fn directory(&self) -> PathBuf {
        self.store.root.join(self.inputs.name())
    }

    fn find(&self) -> Result<Option<(Template, Saved)>, StoreError> {
        self.store.find(&self.inputs)
    }

    /// As after the host's boot.
    fn forget_notes(&self) {
        fs::remove_dir_all(self.store.notes.path("")).unwrap();
    }
}

#[test]
#[ignore = "needs root"]
fn what_is_made_is_found_until_it_is_removed() {
    let world = World::new();
    assert!(world.find().unwrap().is_none());
    assert!(!world.store.remove_named(&world.inputs.name()).unwrap());
    world.make(&world.inputs, b"first");
    let (template, _) = world.find().unwrap().unwrap();
    assert_eq!(template.nonce, [0xab; 16]);
    // Made again, as by a forced build: the one that was found before does not take the new one away.
    world.make(&world.inputs, b"second");
    world.store.remove(&template).unwrap();
    let (template, _) = world.find().unwrap().unwrap();
    world.store.remove(&template).unwrap();
    assert!(world.find().unwrap().is_none());
    assert_eq!(world.store.entries(), [world.store.root.join(".lock")]);
}

#[test]
#[ignore = "needs root"]
fn the_kernels_code_is_one_file_for_all_until_the_template_is_removed() {
    use std::os::unix::fs::FileExt;
    let world = World::new();
    let code = || {
        let (template, saved) = world.find().unwrap().unwrap();
        let shared = world.store.notes.share(&template, &saved);
        shared.map(|code| code.map(|(file, address)| (File::from(file), address)).unwrap())
    };
    let files = || {
        let names = fs::read_dir(world.store.notes.path("")).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.to_string_lossy().contains("code-")).collect::<Vec<_>>()
    };
    world.make(&world.inputs, b"first");
    let at_once: std::collections::HashSet<_> = std::thread::scope(|scope| {
        let pods: Vec<_> = (0..8).map(|_| scope.spawn(|| code().unwrap().0.metadata().unwrap().ino())).collect();
        pods.into_iter().map(|pod| pod.join().unwrap()).collect()
    });
    assert_eq!((at_once.len(), files().len()), (1, 1));
    let ((first, address), (again, _)) = (code().unwrap(), code().unwrap());
    let mut bytes = [0; 6];
    first.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((&bytes, address), (b"first\0", 0));
    assert_eq!(first.metadata().unwrap().ino(), again.metadata().unwrap().ino());
    assert!(first.write_at(b"x", 0).is_err(), "a pod could write what others run");
    world.make(&world.inputs, b"second");
    let (second, _) = code().unwrap();
    second.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((&bytes, files().len()), (b"second", 1));
    first.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"first\0");
    // Of no use to anybody: the template is, without it.
    File::options().write(true).open(&files()[0]).unwrap().set_len(5).unwrap();
    assert!(code().is_err());
    code().unwrap();
    assert!(world.store.remove_named(&world.inputs.name()).unwrap());
    assert!(files().is_empty());
}

#[test]
#[ignore = "needs root"]
fn other_inputs_find_nothing() {
    let world = World::new();
    world.make(&world.inputs, b"x");
    fs::write(world.place.path().join("kernel"), "another").unwrap();
    let other = key::tests::inputs(world.place.path());
    assert!(world.store.find(&other).unwrap().is_none());
    // Even under the same name.
    fs::rename(world.directory(), world.store.root.join(other.name())).unwrap();
    assert!(world.store.find(&other).unwrap().is_none());
}

#[test]
#[ignore = "needs root"]
fn damage_is_noticed_once_a_boot_and_where_a_file_has_changed() {
    let world = World::new();
    let damaged = || match world.find() {
        Err(StoreError::Damaged { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    world.make(&world.inputs, b"x");
    world.forget_notes();
    assert!(world.find().unwrap().is_some());
    assert!(world.store.notes.path(&world.inputs.name()).exists());
    let memory = world.directory().join("memory");
    let write = |byte: &[u8]| {
        let file = File::options().write(true).open(&memory).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, byte, 100).unwrap();
    };
    write(b"y");
    assert!(damaged().contains("checksum"), "{}", damaged());
    write(&[0]);
    assert!(world.find().unwrap().is_some());
    File::options().write(true).open(&memory).unwrap().set_len(1 << 20).unwrap();
    assert!(damaged().contains("length"));
    world.make(&world.inputs, b"x");
    let state = world.directory().join("state");
    let good = fs::read(&state).unwrap();
    for bad in [&good[..20], &[&good[..], b"x"].concat(), b""] {
        fs::write(&state, bad).unwrap();
        damaged();
    }
    fs::write(&state, &good).unwrap();
    assert!(world.find().unwrap().is_some());
    for file in ["state", "memory", "manifest.json"] {
        world.make(&world.inputs, b"x");
        fs::remove_file(world.directory().join(file)).unwrap();
        assert!(damaged().contains(file));
    }
    world.make(&world.inputs, b"x");
    fs::write(world.directory().join("manifest.json"), "{}").unwrap();
    assert!(damaged().contains("manifest.json"));
}

#[test]
#[ignore = "needs root"]
fn what_others_could_have_made_is_left_alone() {
    let world = World::new();
    world.make(&world.inputs, b"x");
    let foreign = |path: &Path| match world.find() {
        Err(error @ StoreError::Foreign { .. }) => {
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}")
        }
        other => panic!("{other:?}"),
    };
    let directory = world.directory();
    for (path, mode) in
        [(world.store.root.clone(), 0o700), (directory.clone(), 0o700), (directory.join("state"), 0o600)]
    {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode | 0o005)).unwrap();
        foreign(&path);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        foreign(&path);
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        assert!(world.find().unwrap().is_some());
    }
    let elsewhere = world.place.path().join("elsewhere");
    fs::rename(&directory, &elsewhere).unwrap();
    symlink(&elsewhere, &directory).unwrap();
    foreign(&directory);
    fs::remove_file(&directory).unwrap();
    fs::rename(&elsewhere, &directory).unwrap();
    fs::rename(directory.join("memory"), &elsewhere).unwrap();
    symlink(&elsewhere, directory.join("memory")).unwrap();
    assert!(matches!(world.find(), Err(StoreError::Io { doing: "open", .. })));
}

#[test]
#[ignore = "needs root"]
fn one_builder_at_a_time_takes_away_what_a_killed_one_left() {
    let world = World::new();
    let lock = world.store.try_lock().unwrap().unwrap();
    assert!(world.store.try_lock().unwrap().is_none());
    world.store.begin(&world.inputs.name(), &lock).unwrap();
    let late = world.store.lock(Duration::from_millis(20)).unwrap_err().to_string();
    let holder = format!("which process {} (", std::process::id());
    assert!(late.contains("waited 20ms for ") && late.contains(&holder), "{late}");
    drop(lock);
    // The thread that waits on takes it and gives it back, for there is nobody to have it.
    drop(world.store.lock(Duration::from_secs(60)).unwrap());
    let lock = world.store.try_lock().unwrap().unwrap();
    fs::create_dir(world.store.root.join("lost+found")).unwrap();
    world.store.sweep(&lock);
    let mut left = world.store.entries();
    left.sort();
    assert_eq!(left, [".lock", "lost+found"].map(|name| world.store.root.join(name)));
}

#[test]
#[ignore = "needs root"]
fn eight_are_kept_that_still_fit() {
    let world = World::new();
    fs::create_dir_all(world.store.root.join("lost+found")).unwrap();
    fs::set_permissions(&world.store.root, fs::Permissions::from_mode(0o700)).unwrap();
    for number in 1..=10 {
        let inputs = key::tests::with_memory(&world.inputs, number);
        world.make(&inputs, b"x");
        let manifest = File::open(world.store.root.join(inputs.name()).join("manifest.json")).unwrap();
        manifest.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(number)).unwrap();
    }
    let lock = world.store.try_lock().unwrap().unwrap();
    world.store.prune(|inputs| inputs.memory_mib != 10, &lock);
    let kept: Vec<_> =
        world.store.list().iter().map(|listed| listed.manifest.as_ref().unwrap().inputs.memory_mib).collect();
    assert_eq!(kept.len(), 8);
    assert!(!kept.contains(&10) && !kept.contains(&1), "{kept:?}");
    assert!(world.store.root.join("lost+found").exists());
}

#[test]
#[ignore = "needs root"]
fn a_failure_is_remembered_until_there_is_a_template() {
    let world = World::new();
    let name = world.inputs.name();
    assert_eq!(world.store.notes.failed_lately(&name), None);
    world.store.notes.note_failure(&name, "no room");
    assert_eq!(world.store.notes.failed_lately(&name).as_deref(), Some("no room"));
    world.make(&world.inputs, b"x");
    assert_eq!(world.store.notes.failed_lately(&name), None);
}

#[test]
fn names_are_of_one_form() {
    assert!(is_name("1cpu-256mib-0123abcd"));
    for other in [
        "",
        ".lock",
        ".building-1cpu-256mib-0123abcd",
        "cpu-256mib-0123abcd",
        "1cpu-256mib-0123abc",
        "../x",
        "1cpu-256mib-0123abcg",
    ] {
        assert!(!is_name(other), "{other}");
    }
}
