//! The repository's own rules, held by tests: arrows, invariants, and documents that keep up with the code.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the root folder").to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every file of the repository with this ending, by git, so that nothing built is looked at.
fn files(ending: &str) -> Vec<String> {
    let output = Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git starts");
    assert!(output.status.success(), "git ls-files failed");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter(|name| name.ends_with(ending)).map(str::to_owned).collect()
}

/// Packages of ours that each package names outside its dev-dependencies.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps"])
        .current_dir(root())
        .output()
        .expect("cargo starts");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages").clone();
    let name = |v: &serde_json::Value| v["name"].as_str().expect("a name").to_owned();
    let ours: BTreeSet<String> = packages.iter().map(name).collect();
    let interesting = |dep: &String| ours.contains(dep) || dep.starts_with("aws-") || dep == "tokio";
    packages
        .iter()
        .map(|package| {
            let deps = package["dependencies"].as_array().expect("dependencies").iter();
            let deps = deps.filter(|dep| dep["kind"].is_null()).map(name).filter(interesting).collect();
            (name(package), deps)
        })
        .collect()
}

#[test]
fn arrows_point_to_core() {
    let arrows = arrows();
    let allowed: [(&str, &[&str]); 11] = [
        ("flatwire-core", &[]),
        ("flatwire-proto", &[]),
        ("flatwire-store", &["flatwire-core"]),
        ("flatwire-kernel", &["flatwire-core", "tokio"]),
        ("flatwire-cloud", &["flatwire-core", "tokio", "aws-"]),
        ("flatwire-kube", &["flatwire-core", "tokio"]),
        ("aws-cni", &["flatwire-core", "flatwire-kernel", "flatwire-proto", "tokio"]),
        ("lab-ec2", &["flatwire-core", "tokio"]),
        ("lab-sim", &["flatwire-core", "flatwire-store", "lab-ec2"]),
        ("lab", &["flatwire-core", "flatwire-kernel", "flatwire-proto", "lab-ec2", "tokio"]),
        (
            "ipamd",
            &[
                "flatwire-cloud",
                "flatwire-core",
                "flatwire-kernel",
                "flatwire-kube",
                "flatwire-proto",
                "flatwire-store",
                "tokio",
            ],
        ),
    ];
    for (package, may) in allowed {
        let named = arrows.get(package).unwrap_or_else(|| panic!("no package {package}"));
        for dep in named {
            let fits = may.iter().any(|m| m == dep || (m.ends_with('-') && dep.starts_with(*m)));
            assert!(fits, "{package} may not know {dep}");
        }
    }
}

#[test]
fn only_the_cloud_adapter_knows_the_sdk() {
    for (package, deps) in arrows() {
        let sdk = deps.iter().any(|dep| dep.starts_with("aws-sdk") || dep == "aws-config");
        let may = ["flatwire-cloud", "flatwire-mock-tests"].contains(&package.as_str());
        assert!(!sdk || may, "{package} names the SDK");
    }
    for package in ["aws-cni", "lab", "flatwire-tests"] {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "-p", package, "-e", "normal,build,dev", "--prefix", "none"])
            .current_dir(root())
            .output()
            .expect("cargo starts");
        assert!(output.status.success(), "cargo tree -p {package} failed");
        let tree = String::from_utf8_lossy(&output.stdout);
        assert!(!tree.contains("aws-sdk-ec2"), "{package} links the SDK");
    }
}

#[test]
fn every_invariant_names_a_test_that_exists() {
    let architecture = read("ARCHITECTURE.md");
    let code: String = files(".rs").iter().map(|file| read(file)).collect();
    let mut named = 0;
    for paragraph in architecture.split("* Invariant:").skip(1) {
        let paragraph = paragraph.split("\n\n").next().unwrap_or_default();
        let tests: Vec<&str> = paragraph.split('`').skip(1).step_by(2).filter(|t| t.contains('_')).collect();
        assert!(!tests.is_empty(), "an invariant without a test: {paragraph}");
        for test in tests {
            assert!(code.contains(&format!("fn {test}(")), "there is no test {test}");
            named += 1;
        }
    }
    assert!(named >= 8, "the invariants were not found");
}

#[test]
fn every_setting_is_documented_with_its_default() {
    let page = read("docs/settings.md");
    for (name, default, _) in flatwire_core::settings::SETTINGS {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("docs/settings.md has no row for {name}"));
        assert!(default.is_empty() || row.contains(default), "the default of {name} is {default}: {row}");
    }
    for (name, _) in flatwire_core::settings::WITHOUT_EFFECT {
        assert!(page.contains(&format!("| `{name}` |")), "docs/settings.md has no row for {name}");
    }
    let config = read("ipamd/src/config.rs");
    let places = config.split("place(").skip(1).map(|piece| piece.split(")").next().unwrap_or_default());
    let places: Vec<Vec<&str>> = places.map(|place| place.split('"').skip(1).step_by(2).collect()).collect();
    let places: Vec<Vec<&str>> = places.into_iter().filter(|quoted| quoted.len() >= 3).collect();
    assert!(places.len() > 10, "the places were not found");
    for quoted in places {
        // Option, variable, default and meaning; a default that is a constant stands without quotes.
        let (name, default) = (quoted[1], if quoted.len() == 4 { quoted[2] } else { "" });
        let row = page.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("docs/settings.md has no row for {name}"));
        assert!(row.contains(default), "the default of {name} is {default}: {row}");
    }
}

/// What a node may have for itself, with the variable it stands for.
#[test]
fn every_setting_of_a_node_is_documented() {
    let page = read("docs/settings.md");
    for (key, variable) in flatwire_core::settings::PER_NODE {
        assert!(page.contains(&format!("| `flatwire.io/{key}` | `{variable}` |")), "docs/settings.md has no {key}");
    }
}

#[test]
fn every_metric_is_documented() {
    let page = read("docs/metrics.md");
    let code = read("ipamd/src/metrics.rs");
    let names = code.split('"').skip(1).step_by(2);
    let names: Vec<&str> = names.filter(|n| n.starts_with("awscni_") || n.starts_with("flatwire_")).collect();
    assert!(names.len() > 15, "the metrics were not found");
    for name in names {
        assert!(page.contains(&format!("| `{name}` |")), "docs/metrics.md has no row for {name}");
    }
}

/// What the dashboard draws and the alerts watch is there: metrics, their labels, and the values that labels are held to.
#[test]
fn dashboard_and_alerts_name_what_the_daemon_has() {
    let dashboard = read("deploy/chart/monitoring/dashboard.json");
    let panels: serde_json::Value = serde_json::from_str(&dashboard).expect("the dashboard is JSON");
    let alerts = read("deploy/chart/monitoring/alerts.yaml");
    let from_panels = panels["panels"].as_array().expect("panels").iter().flat_map(|panel| {
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(|target| target["expr"].as_str().expect("an expression").to_owned())
    });
    let from_alerts = alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).map(str::to_owned);
    let expressions: Vec<String> = from_panels.chain(from_alerts).collect();
    assert!(expressions.len() > 30, "the expressions were not found");
    let rows: BTreeMap<String, String> = read("docs/metrics.md")
        .lines()
        .filter_map(|line| Some((line.strip_prefix("| `")?.split_once('`')?.0.to_owned(), line.to_owned())))
        .collect();
    let (ports, operating) = (read("ipamd/core/src/ports.rs"), read("docs/operating.md"));
    for expression in &expressions {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let metrics: Vec<&str> = words.filter(|w| w.starts_with("awscni_") || w.starts_with("flatwire_")).collect();
        for metric in &metrics {
            let known = rows.contains_key(*metric) || rows.contains_key(metric.trim_end_matches("_bucket"));
            assert!(known, "docs/metrics.md has no {metric}: {expression}");
        }
        for labels in expression.split(" by (").skip(1).filter_map(|rest| rest.split(')').next()) {
            for label in labels.split(", ").filter(|label| !["instance", "le"].contains(label)) {
                let has = |m: &&str| rows[m.trim_end_matches("_bucket")].split('|').nth(3).unwrap().contains(label);
                assert!(metrics.iter().all(has), "no label {label} in {expression}");
            }
        }
        for kind in expression.split("error=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            assert!(ports.contains(&format!("    {kind},\n")), "EC2's errors have no class {kind}: {expression}");
        }
        for reasons in expression.split("reason=~\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            let missing = reasons.split('|').find(|reason| !operating.contains(&format!("| `{reason}` |")));
            assert_eq!(missing, None, "no such reason: {expression}");
        }
    }
}

/// A link in a document leads somewhere.
#[test]
fn links_between_documents_hold() {
    for file in files(".md") {
        let folder = root().join(&file).parent().expect("a file is in a folder").to_owned();
        let text = read(&file);
        for piece in text.split("](").skip(1) {
            let target = piece.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(folder.join(target).exists(), "{file} points to {target}, which is not there");
        }
    }
}

/// Unfinished marks, paths of a machine and credentials have no place in what others clone.
#[test]
fn nothing_unfinished_and_nothing_of_one_machine() {
    let marks = [
        "TO".to_owned() + "DO",
        "DEMO_".to_owned() + "OUTPUT",
        "FIX".to_owned() + "ME",
        "/ro".to_owned() + "ot/",
        "/wo".to_owned() + "rk/",
    ];
    for file in [".rs", ".sh", ".md", ".toml", ".py", ".yml", "Makefile"].iter().flat_map(|e| files(e)) {
        let text = read(&file);
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{file} contains {mark}");
        }
    }
}

/// The plugin is copied to every node and started for every pod: one static file under 4 MB.
#[test]
fn the_plugin_is_static_and_small() {
    if std::env::var_os("FLATWIRE_BIN_DIR").is_none() {
        println!(
            "SKIPPED the plugin's size: FLATWIRE_BIN_DIR is not set, so there is no release binary (make test sets it)"
        );
        return;
    }
    let plugin = flatwire_tests::binary("aws-cni");
    let bytes = std::fs::metadata(&plugin).unwrap().len();
    assert!(bytes < 4_000_000, "{} has {bytes} bytes", plugin.display());
    let output = Command::new("ldd").arg(&plugin).output().expect("ldd starts");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("statically linked") || said.contains("not a dynamic executable"), "{said}");
}

#[test]
fn every_document_is_listed() {
    let index = read("docs/README.md");
    for file in files(".md").iter().filter(|f| f.starts_with("docs/") && *f != "docs/README.md") {
        let name = file.trim_start_matches("docs/");
        assert!(index.contains(&format!("]({name})")), "docs/README.md does not list {name}");
    }
}
