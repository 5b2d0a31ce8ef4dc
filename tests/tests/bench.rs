//! The benchmark as a test: that a run is complete and its report well formed. What the figures are is not judged here.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use flatwire_tests::{binary, name_of, programs};
use serde_json::Value;

/// Runs a quick benchmark and returns its report and its last line.
fn quick(name: &str, out: &Path, options: &[&str]) -> (Value, String) {
    let name = name_of(name);
    let output = Command::new(binary("lab"))
        .args(["bench", "--quick", "--name", &name, "--bin-dir"])
        .arg(programs())
        .arg("--out")
        .arg(out)
        .args(options)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(!lab::boot::dir_of(&name).unwrap().exists(), "the lab is gone");
    for picture in ["latency.svg", "throughput.svg", "pods.svg"] {
        let text = std::fs::read_to_string(out.join(picture)).unwrap();
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n") && !text.contains("NaN"), "{picture}: {text}");
    }
    let report = std::fs::read_to_string(out.join("report.json")).unwrap();
    (serde_json::from_str(&report).unwrap(), said.lines().last().unwrap_or_default().to_owned())
}

/// Every number of the report, with its path.
fn numbers(value: &Value, path: &str, out: &mut Vec<(String, f64)>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| numbers(value, &format!("{path}.{key}"), out)),
        Value::Array(list) => list.iter().for_each(|value| numbers(value, path, out)),
        Value::Number(number) => out.push((path.to_owned(), number.as_f64().unwrap())),
        Value::Null => panic!("{path} was not measured"),
        _ => {}
    }
}

#[test]
fn a_quick_run_measures_every_layout_and_every_field_is_documented() {
    let out = tempfile::tempdir().unwrap();
    let (report, last) = quick("bench", out.path(), &[]);
    let rows: BTreeSet<(String, String, u64)> = (report["path"].as_array().unwrap().iter())
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap().to_owned();
            (text("layout"), text("scope"), row["pods"].as_u64().unwrap())
        })
        .collect();
    let mut wanted = BTreeSet::new();
    for layout in ["flat", "pod-rules", "bridge", "vxlan"] {
        for scope in ["same-node", "across-nodes"] {
            wanted.extend([1, 10, 20].map(|pods| (layout.to_owned(), scope.to_owned(), pods)));
        }
    }
    assert_eq!(rows, wanted);

    let mut measured = Vec::new();
    numbers(&report, "", &mut measured);
    for (path, number) in &measured {
        let may_be_zero = path == ".machine.load";
        assert!(number.is_finite() && (*number > 0.0 || may_be_zero), "{path} is {number}");
    }
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/benchmarks.md")).unwrap();
    for field in measured.iter().flat_map(|(path, _)| path.split('.')).filter(|field| !field.is_empty()) {
        assert!(page.contains(&format!("`{field}`")), "docs/benchmarks.md does not explain {field}");
    }
    assert!(last.starts_with("bench: p50_20_over_1="), "{last}");
    for ratio in [" addon=", " bridge=", " vxlan=", " add_over_floor=", " burst10_p99_ms="] {
        assert!(last.contains(ratio), "{last}");
    }
}

#[test]
fn another_plugin_and_its_daemon_are_measured_by_path_and_environment() {
    let out = tempfile::tempdir().unwrap();
    let programs = programs();
    let conflist = out.path().join("other.conflist");
    let text = r#"{ "cniVersion": "1.0.0", "name": "other",
        "plugins": [{ "name": "other", "type": "aws-cni", "vethPrefix": "eni", "mtu": "9001" }] }"#;
    std::fs::write(&conflist, text).unwrap();
    let path = |path: &Path| path.display().to_string();
    let (plugin, daemon) = (path(&programs.join("aws-cni")), path(&programs.join("ipamd")));
    let given = ["--plugin", &plugin, "--conflist", &path(&conflist), "--daemon", &daemon, "--daemon-arg", "run"];
    let env = ["--daemon-env", "ENABLE_PREFIX_DELEGATION=true", "--daemon-env", "MINIMUM_IP_TARGET=320"];
    let (report, last) = quick("other", out.path(), &[given.as_slice(), env.as_slice()].concat());
    assert_eq!(report["pods"]["plugin"], "other");
    let rows = report["path"].as_array().unwrap();
    assert_eq!(rows.len(), 4, "both scopes, with the first pods and with the burst: {rows:?}");
    assert!(rows.iter().all(|row| row["layout"] == "given" && row["rtt_us"]["p50"].as_f64().unwrap() > 0.0));
    assert!(last.starts_with("bench: add_p50_ms="), "{last}");
}
