//! The Terraform modules pass `tests/terraform.sh`, and what is broken on purpose does not.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the root folder").to_owned()
}

/// `None`, said loudly, where there is no network on purpose.
fn check(folder: &Path) -> Option<Output> {
    if std::env::var_os("FLATWIRE_OFFLINE").is_some_and(|value| value == "1") {
        writeln!(std::io::stderr(), "SKIPPED: FLATWIRE_OFFLINE=1, and what reads Terraform comes from the network")
            .expect("standard error is open");
        return None;
    }
    Some(Command::new(root().join("tests/terraform.sh")).arg(folder).output().expect("bash starts"))
}

fn said(output: &Output) -> String {
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    format!("{}({})", String::from_utf8_lossy(&text), output.status)
}

#[test]
fn the_modules_pass() {
    let Some(output) = check(&root().join("terraform")) else { return };
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    let last = said.lines().find(|line| line.starts_with("terraform: rules=yes ")).expect("it says what it did");
    if last.contains("skipped") {
        writeln!(std::io::stderr(), "SKIPPED terraform fmt, validate and test: neither terraform nor tofu is here")
            .expect("standard error is open");
    }
}

/// A file of the modules, a text in it, what takes its place, and what the check must say of it.
const BREAKS: &[(&str, &str, &str, &str)] = &[
    ("cluster/network.tf", "resource \"aws_vpc\" \"this\" {", "resource \"aws_vpc\" \"this\" {{", "cannot be read"),
    ("cluster/network.tf", "var.nat_gateway ? 1", "var.nat_gatewy ? 1", "var.nat_gatewy is not declared"),
    ("cluster/network.tf", "aws_eip.nat[0].id", "aws_eip.out[0].id", "aws_eip.out is not declared"),
    ("cluster/network.tf", "enable_dns_support ", "enable_dns_suport ", "has no argument 'enable_dns_suport'"),
    ("cluster/network.tf", "  reservation_type = \"prefix\"\n", "", "lacks 'reservation_type'"),
    ("cluster/variables.tf", "  description = \"Further variables", "  # \"Further variables", "has no description"),
    ("cluster/variables.tf", "variable \"tags\"", "variable \"marks\"", "variable marks is used nowhere"),
    ("cluster/outputs.tf", "output \"vpc_id\"", "output \"vpc\"", "module.west has no output 'vpc_id'"),
    ("examples/two-regions/main.tf", "  zones            = var.west.zones\n", "", "module west lacks 'zones'"),
    ("cluster/tests/network.tftest.hcl", "run \"subnets\" {", "run \"subnets\" {{", "cannot be read"),
];

/// Broken in ways that only Terraform itself sees.
const BREAKS_FOR_TERRAFORM: &[(&str, &str, &str, &str)] = &[
    ("cluster/network.tf", "  enable_dns_support   = true", "  enable_dns_support = true", "not formatted"),
    ("cluster/network.tf", "cidrsubnet(each.value, 1, 1)", "cidrsubnet(each.value, 1, \"x\")", "validate failed"),
    ("cluster/network.tf", "\"kubernetes.io/role/cni\" = \"1\"", "\"kubernetes.io/role/cni\" = \"0\"", "tests failed"),
];

#[test]
fn what_is_broken_is_named() {
    let whole = tempfile::tempdir().unwrap();
    copy(&root().join("terraform"), whole.path());
    let has_terraform = ["terraform", "tofu"].iter().any(|tool| Command::new(tool).arg("version").output().is_ok());
    let more = if has_terraform { BREAKS_FOR_TERRAFORM } else { &[] };
    for (file, from, to, complaint) in BREAKS.iter().chain(more) {
        let path = whole.path().join("terraform").join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no {from:?} to break");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let Some(output) = check(&whole.path().join("terraform")) else { return };
        let said = said(&output);
        assert!(!output.status.success() && said.contains(complaint), "{file} with {to:?} gives:\n{said}");
        std::fs::write(&path, text).unwrap();
    }
}

fn copy(from: &Path, into: &Path) {
    let done = Command::new("cp").arg("-r").arg(from).arg(into).status().expect("cp starts");
    assert!(done.success(), "cp -r {} {}", from.display(), into.display());
}
