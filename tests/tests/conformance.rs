//! The CNI specification 1.1.0 as tests of the built plugin, one per requirement, named after the section it is in.
//! `conformance/README.md` lists them. The driver, the daemon and the readers share no code with the plugin.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[path = "../conformance/add.rs"]
mod add;
#[path = "../conformance/check.rs"]
mod check;
#[path = "../conformance/del.rs"]
mod del;
#[path = "../conformance/driver.rs"]
mod driver;
#[path = "../conformance/gc_status_version.rs"]
mod gc_status_version;
#[path = "../conformance/ipamd.rs"]
mod ipamd;
#[path = "../conformance/libcni.rs"]
mod libcni;
#[path = "../conformance/node.rs"]
mod node;
#[path = "../conformance/protocol.rs"]
mod protocol;

/// The table in `conformance/README.md` names every test here, and nothing that is gone.
#[test]
fn the_readme_lists_every_test() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance");
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
    let names = |text: &str, before: &str, after: char| {
        let found = text.split(before).skip(1).filter_map(|rest| rest.split_once(after));
        found.map(|(name, _)| format!("sec{name}")).collect::<std::collections::BTreeSet<_>>()
    };
    let listed = names(&read(&folder.join("README.md")), "::sec", '`');
    let mut written = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            written.extend(names(&read(&path), "fn sec", '('));
        }
    }
    assert_eq!(listed, written);
}
