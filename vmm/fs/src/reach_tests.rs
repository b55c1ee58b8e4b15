//! Files on mounts without handles: few descriptors, and names that stay true.

use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::*;
use crate::tree::tests::{LIMITS, cstring, name, tree};
use crate::wire::ROOT_ID;

/// An overlay in a mount namespace of this thread's, and a tree of it. Needs root.
fn overlay() -> (tempfile::TempDir, PathBuf, Tree) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let base = tempfile::tempdir().unwrap();
    for part in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(base.path().join(part)).unwrap();
    }
    let at = base.path().display();
    let options = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work");
    let merged = base.path().join("merged");
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
    let tree = tree(&merged, LIMITS);
    (base, merged, tree)
}

fn find(tree: &Tree, path: &str) -> Arc<Node> {
    let mut node = tree.get(ROOT_ID).unwrap();
    for part in path.split('/') {
        node = tree.lookup(&node, name(&cstring(part))).unwrap().0;
    }
    node
}

/// Makes all descriptors of the ring somebody else's.
fn cool(tree: &Tree, host: &Path) {
    for n in 0..2 * LIMITS.warm {
        let file = format!("cool-{n}");
        std::fs::write(host.join(&file), "").unwrap();
        find(tree, &file);
    }
}

fn inode(tree: &Tree, node: &Arc<Node>) -> sys::Result<u64> {
    Ok(node::stat(tree.fd(node)?.as_fd())?.stx_ino)
}

#[test]
fn many_files_need_few_descriptors() {
    // procfs has no handles either.
    let tree = tree(Path::new("/proc/sys/net/ipv4"), LIMITS);
    let root = tree.get(ROOT_ID).unwrap();
    let files: Vec<_> = std::fs::read_dir("/proc/sys/net/ipv4")
        .unwrap()
        .map(|entry| cstring(entry.unwrap().file_name().to_str().unwrap()))
        .map(|file| tree.lookup(&root, name(&file)).unwrap().0)
        .collect();
    assert!(files.len() > 5 * LIMITS.warm);
    let open = files.iter().filter(|node| lock(&node.warm).is_some() || node.holds()).count();
    assert!(open <= LIMITS.warm, "{open}");
    for file in &files {
        assert_eq!(
            Key::new(&node::stat(tree.fd(file).unwrap().as_fd()).unwrap(), &file.mount, file.policy, false),
            file.key
        );
    }
}

#[test]
fn names_stay_true_over_renames() {
    let (_base, host, tree) = overlay();
    std::fs::create_dir_all(host.join("d/e")).unwrap();
    for file in ["d/e/f", "g", "h"] {
        std::fs::write(host.join(file), file).unwrap();
    }
    let [root, d, f, g, h] = ["", "d", "d/e/f", "g", "h"]
        .map(|path| if path.is_empty() { tree.get(ROOT_ID).unwrap() } else { find(&tree, path) });
    let before = [&f, &g, &h].map(|node| inode(&tree, node).unwrap());
    let names = ["d", "D", "g", "h"].map(cstring);
    let [small, large, plain, other] = [0, 1, 2, 3].map(|at| name(&names[at]));
    tree.rename((&root, small), (&root, large), 0).unwrap();
    tree.rename((&root, plain), (&d, small), 0).unwrap();
    std::fs::write(host.join("D/e/x"), "").unwrap();
    tree.rename((&d, small), (&root, other), libc::RENAME_EXCHANGE).unwrap();
    cool(&tree, &host);
    assert_eq!([&f, &g, &h].map(|node| inode(&tree, node).unwrap()), before);
    assert_eq!(std::fs::read(host.join("D/d")).unwrap(), b"h");
    // The one that is replaced is kept until the guest forgets it.
    tree.rename((&d, small), (&root, other), 0).unwrap();
    cool(&tree, &host);
    assert_eq!([&f, &g, &h].map(|node| inode(&tree, node).unwrap()), before);
    assert!(g.holds() && !h.holds());
}

#[test]
fn what_lost_its_name_is_kept_until_it_is_forgotten() {
    let (_base, host, tree) = overlay();
    std::fs::create_dir(host.join("full")).unwrap();
    std::fs::write(host.join("full/f"), "").unwrap();
    std::fs::write(host.join("a"), "a").unwrap();
    std::fs::hard_link(host.join("a"), host.join("b")).unwrap();
    let (root, full, a) = (tree.get(ROOT_ID).unwrap(), find(&tree, "full"), find(&tree, "a"));
    let number = inode(&tree, &a).unwrap();
    assert_eq!(tree.unlink(&root, name(&cstring("full")), libc::AT_REMOVEDIR), Err(Errno::ENOTEMPTY));
    assert!(!full.holds(), "it still has its name");
    tree.unlink(&root, name(&cstring("b")), 0).unwrap();
    assert!(!a.holds(), "that was another name");
    cool(&tree, &host);
    tree.unlink(&root, name(&cstring("a")), 0).unwrap();
    assert!(a.holds());
    cool(&tree, &host);
    assert_eq!(inode(&tree, &a).unwrap(), number);
    tree.open(&a, libc::O_RDONLY).unwrap();
    // Beyond the bound it is not kept.
    for n in 0..2 * LIMITS.descriptors {
        std::fs::write(host.join("many"), "").unwrap();
        let node = find(&tree, "many");
        tree.unlink(&root, name(&cstring("many")), 0).unwrap();
        assert_eq!(node.holds(), n < LIMITS.descriptors - 2, "{n}");
    }
    tree.forget(a.id, 1);
    std::fs::write(host.join("many"), "").unwrap();
    let node = find(&tree, "many");
    tree.unlink(&root, name(&cstring("many")), 0).unwrap();
    assert!(node.holds());
}

#[test]
fn names_that_lie_are_stale() {
    let (_base, host, tree) = overlay();
    std::fs::create_dir_all(host.join("d/e")).unwrap();
    std::fs::write(host.join("f"), "f").unwrap();
    let (f, d, e) = (find(&tree, "f"), find(&tree, "d"), find(&tree, "d/e"));
    cool(&tree, &host);
    // The host renames, and puts another file there.
    std::fs::rename(host.join("f"), host.join("g")).unwrap();
    assert_eq!(inode(&tree, &f), Err(Errno::ESTALE));
    std::fs::write(host.join("f"), "other").unwrap();
    assert_eq!(inode(&tree, &f), Err(Errno::ESTALE));
    assert_eq!(find(&tree, "g").id, f.id);
    cool(&tree, &host);
    inode(&tree, &f).unwrap();
    // In a circle.
    cool(&tree, &host);
    tree.learn_name(&d, &e, name(&cstring("x")));
    tree.learn_name(&e, &d, name(&cstring("y")));
    assert_eq!(inode(&tree, &e), Err(Errno::ESTALE));
    // By a directory that the guest forgot.
    tree.learn_name(&f, &e, name(&cstring("f")));
    tree.forget(e.id, u64::MAX);
    cool(&tree, &host);
    assert_eq!(inode(&tree, &f), Err(Errno::ESTALE));
}
