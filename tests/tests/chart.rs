//! The chart and the plain manifest pass `tests/chart.sh`, and what is broken on purpose does not.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the root folder").to_owned()
}

/// `None`, said loudly, where there is no network on purpose.
fn check(chart: &Path) -> Option<Output> {
    if std::env::var_os("FLATWIRE_OFFLINE").is_some_and(|value| value == "1") {
        writeln!(std::io::stderr(), "SKIPPED: FLATWIRE_OFFLINE=1, and Helm's engine comes from the network")
            .expect("standard error is open");
        return None;
    }
    Some(Command::new(root().join("tests/chart.sh")).arg(chart).output().expect("bash starts"))
}

fn said(output: &Output) -> String {
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    format!("{}({})", String::from_utf8_lossy(&text), output.status)
}

#[test]
fn the_chart_renders_what_kubernetes_takes() {
    let Some(output) = check(&root().join("deploy/chart")) else { return };
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    let last = said.lines().find(|line| line.starts_with("chart: rendered=yes ")).unwrap_or_default();
    let counts: Vec<&str> = last.split(['=', ' ']).collect();
    assert!(counts.len() == 7 && counts[4] == counts[6] && counts[4] != "0", "{last}");
}

/// A file below `deploy/`, a text in it, what takes its place, and what the check must say of it.
const BREAKS: &[(&str, &str, &str, &str)] = &[
    ("chart/templates/daemonset.yaml", "{{ .Release.Namespace }}", "{{ .Release.Namespace }", "cannot be rendered"),
    ("chart/templates/daemonset.yaml", "imagePullPolicy:", "imagePullPolice:", "imagePullPolice"),
    (
        "chart/templates/daemonset.yaml",
        "containerPort: {{ .Values.metricsPort }}",
        "containerPort: web",
        "'web' is not",
    ),
    (
        "chart/templates/_helpers.tpl",
        "allowPrivilegeEscalation: false",
        "allowPrivilegeEscalation: true",
        "more rights",
    ),
    (
        "chart/templates/daemonset.yaml",
        "add: [NET_ADMIN]\n          resources: {{- toYaml .Values.resources",
        "add: [SYS_ADMIN]\n          resources: {{- toYaml .Values.resources",
        "SYS_ADMIN",
    ),
    ("chart/templates/daemonset.yaml", "- name: MY_POD_NAME", "- name: MY_PODS_NAME", "MY_PODS_NAME"),
    ("chart/templates/rbac.yaml", "verbs: [patch]", "verb: [patch]", "'verbs' is a required property"),
    ("chart/crds/eniconfig.yaml", "served: true", "served: 3", "3 is not of type 'boolean'"),
    (
        "chart/values.schema.json",
        "\n  \"additionalProperties\": false,",
        "\n  \"additionalProperties\": true,",
        "are not refused",
    ),
    ("flatwire.yaml", "memory: 128Mi", "memory: 64Mi", "is not what the chart renders"),
];

#[test]
fn what_is_broken_is_named() {
    let copy = tempfile::tempdir().unwrap();
    for part in ["deploy", "docs"] {
        let done = Command::new("cp").arg("-r").arg(root().join(part)).arg(copy.path()).status().expect("cp starts");
        assert!(done.success(), "cp -r {part}");
    }
    for (file, from, to, complaint) in BREAKS {
        let path = copy.path().join("deploy").join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no {from:?} to break");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let Some(output) = check(&copy.path().join("deploy/chart")) else { return };
        let said = said(&output);
        assert!(!output.status.success() && said.contains(complaint), "{file} with {to:?} gives:\n{said}");
        std::fs::write(&path, text).unwrap();
    }
}
