//! Tests of the tree: identity, counting, bounds.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::*;

pub(crate) fn tree(path: &Path, limits: Limits) -> Tree {
    let own = SelfFd::open().unwrap();
    own.enter().unwrap();
    let root = open::directory_path(&CString::new(path.as_os_str().as_bytes()).unwrap()).unwrap();
    Tree::new(Arc::new(own), root, limits).unwrap()
}

pub(crate) const LIMITS: Limits = Limits { descriptors: 8, warm: 4 };

pub(crate) fn name(name: &CString) -> Name<'_> {
    Name::new(name).unwrap()
}

pub(crate) fn cstring(text: &str) -> CString {
    CString::new(text).unwrap()
}

#[test]
fn one_file_is_one_node_and_lives_until_all_lookups_are_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("a"), "x").unwrap();
    std::fs::hard_link(directory.path().join("a"), directory.path().join("b")).unwrap();
    let tree = tree(directory.path(), LIMITS);
    let root = tree.get(ROOT_ID).unwrap();
    let (a, _) = tree.lookup(&root, name(&cstring("a"))).unwrap();
    let (b, _) = tree.lookup(&root, name(&cstring("b"))).unwrap();
    assert_eq!(a.id, b.id);
    tree.forget(a.id, 1);
    assert!(tree.get(a.id).is_ok());
    tree.forget(a.id, u64::MAX);
    assert_eq!(tree.get(a.id).unwrap_err(), Errno::ESTALE);
    tree.forget(a.id, 1);
    tree.forget(12345, 1);
    tree.forget(ROOT_ID, u64::MAX);
    assert!(tree.get(ROOT_ID).is_ok());
    assert_eq!(tree.len(), 1);
}

#[test]
fn many_nodes_need_few_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..100).map(|n| cstring(&n.to_string())).collect();
    for each in &names {
        std::fs::write(directory.path().join(each.to_str().unwrap()), "x").unwrap();
    }
    let tree = tree(directory.path(), LIMITS);
    let root = tree.get(ROOT_ID).unwrap();
    if root.mount.handle(tree.fd(&root).unwrap().as_fd()).is_none() {
        eprintln!("skipped: no file handles in {}", directory.path().display());
        return;
    }
    let nodes: Vec<_> = names.iter().map(|each| tree.lookup(&root, name(each)).unwrap().0).collect();
    let warm = nodes.iter().filter(|node| lock(&node.warm).is_some()).count();
    assert!(warm <= LIMITS.warm, "{warm}");
    for (node, each) in nodes.iter().zip(&names) {
        let stat = node::stat(tree.fd(node).unwrap().as_fd()).unwrap();
        let again = tree.lookup(&root, name(each)).unwrap();
        assert_eq!((again.0.id, again.1.stx_ino), (node.id, stat.stx_ino));
    }
    assert!(lock(&tree.ring).len() <= LIMITS.warm + 1);
}

#[test]
fn a_new_file_with_an_old_inode_number_is_a_new_node() {
    let directory = tempfile::tempdir().unwrap();
    let tree = tree(directory.path(), Limits { descriptors: 8, warm: 0 });
    let root = tree.get(ROOT_ID).unwrap();
    let file = directory.path().join("f");
    let mut seen = std::collections::HashSet::new();
    for _ in 0..20 {
        std::fs::write(&file, "x").unwrap();
        assert!(seen.insert(tree.lookup(&root, name(&cstring("f"))).unwrap().0.id));
        std::fs::remove_file(&file).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
