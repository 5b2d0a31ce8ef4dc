//! Somebody undoes what ipamd keeps in the kernel, under traffic: everything is put back, and counted. How long the gaps
//! are is for `make heal` to say; a loaded machine proves nothing about them.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::process::Command;

use flatwire_tests::{binary, name_of, programs};
use serde_json::Value;

/// One of each kind of thing.
const STEPS: [(&str, &str); 9] = [
    ("all rules flushed", "rule"),
    ("every ENI's table flushed", "route"),
    ("pods' host routes flushed", "pod_route"),
    ("table main flushed", "node_route"),
    ("every nftables table flushed", "nftables"),
    ("MTU lowered", "link"),
    ("rp_filter strict", "sysctl"),
    ("ENI address removed", "address"),
    ("secondary ENI renamed", "link"),
];

#[test]
fn each_flush_under_traffic_is_healed_and_counted() {
    let only = STEPS.map(|(name, _)| name).join(",");
    let output = Command::new(binary("lab"))
        .args(["heal", "--json", "--only", &only, "--name", &name_of("heal"), "--bin-dir"])
        .arg(programs())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let rows: Value = serde_json::from_str(&said)
        .unwrap_or_else(|e| panic!("{e}: {said}\n{}", String::from_utf8_lossy(&output.stderr)));
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), STEPS.len(), "{said}");
    for (name, kind) in STEPS {
        let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}: {said}"));
        assert!(row["repaired_ms"].is_u64(), "not healed: {row}");
        assert!(row["counted"][kind].as_u64() > Some(0), "not counted as {kind}: {row}");
        assert_eq!(row["tcp_broken"], false, "{row}");
    }
}
