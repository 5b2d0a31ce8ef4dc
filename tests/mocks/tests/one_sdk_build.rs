//! Cargo builds aws-sdk-ec2 again for every set of features it finds below it. These selections of packages must find
//! the same set, or each costs its own five minutes and seven gigabytes; the anchors in `ipamd/cloud/Cargo.toml` see
//! to it.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use flatwire_mock_tests::root;

#[test]
fn every_selection_of_packages_shares_one_build_of_the_sdk() {
    let below_sdk = features(&["-p", "aws-sdk-ec2", "-e", "normal,build"]);
    let of_cloud = features(&["-p", "flatwire-cloud", "-e", "normal,build"]);
    // What other packages need for their tests alone does not count: those run without the SDK.
    for selection in [
        ["-p", "flatwire-mock-tests", "-e", "normal,build,dev"].as_slice(),
        &["-p", "ipamd", "-e", "normal,build,dev"],
        &["--workspace", "-e", "normal,build"],
    ] {
        let other = features(selection);
        // A package may stand there once more with other features, for a build script or a macro of somebody else's.
        let found = |sets: &BTreeMap<String, BTreeSet<String>>, package| sets.get(package).cloned().unwrap_or_default();
        let differing: Vec<String> = below_sdk
            .keys()
            .map(|package| (package, found(&of_cloud, package), found(&other, package)))
            .filter(|(_, ours, theirs)| !ours.is_subset(theirs))
            .map(|(package, ours, theirs)| format!("{package}: {ours:?} against {theirs:?}"))
            .collect();
        assert!(
            differing.is_empty(),
            "{selection:?} finds other features below aws-sdk-ec2; add anchors to ipamd/cloud/Cargo.toml:\n{}",
            differing.join("\n")
        );
    }
}

/// Each package in the tree with the feature sets it is built with.
fn features(selection: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--prefix", "none", "--no-dedupe", "--format", "{p}|{f}"])
        .args(selection)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        if let Some((package, features)) = line.split_once('|') {
            found.entry(package.to_owned()).or_default().insert(features.to_owned());
        }
    }
    found
}
