//! What the suites of this crate share. It holds no tests of its own.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

pub mod manifest;
pub mod runtimes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use lab::api::element;
use lab::client::Lab;
use lab::ctl::Spec;

/// The path of one of our programs, ready to run.
///
/// With `FLATWIRE_BIN_DIR` set it is taken from that folder, which must hold it; otherwise it is built once per process
/// by cargo, into the same target folder as the tests. The package must have the name of the program.
///
/// # Panics
///
/// If there is no such program, with what cargo said.
pub fn binary(name: &str) -> PathBuf {
    if let Some(dir) = std::env::var_os("FLATWIRE_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        assert!(path.is_file(), "FLATWIRE_BIN_DIR is set, but {} is not there", path.display());
        return path;
    }
    static BUILT: OnceLock<Mutex<BTreeMap<String, PathBuf>>> = OnceLock::new();
    let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build(name)).clone()
}

fn build(name: &str) -> PathBuf {
    let output = Command::new(env!("CARGO"))
        .args(["build", "--message-format=json-render-diagnostics", "-p", name, "--bin", name])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "cargo could not build {name}; see above");
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let of_this = message["target"]["name"] == *name;
        message["executable"].as_str().filter(|_| of_this).map(PathBuf::from)
    });
    executable.unwrap_or_else(|| panic!("cargo built {name} but named no executable"))
}

/// The folder of our programs, with the daemon and the plugin in it: a lab is given both together.
///
/// # Panics
///
/// If they cannot be built, or are in two folders.
pub fn programs() -> PathBuf {
    let (ipamd, plugin) = (binary("ipamd"), binary("aws-cni"));
    assert_eq!(ipamd.parent(), plugin.parent(), "both programs are in one folder");
    ipamd.parent().expect("a program is in a folder").to_owned()
}

/// A lab's name that no other test of this machine has.
pub fn name_of(suite: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{suite}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A lab of its own.
///
/// # Panics
///
/// If it does not come up, with its reason.
pub fn start(spec: &Spec) -> Lab {
    Lab::start(&binary("lab"), spec).unwrap_or_else(|error| panic!("{}", lab::error::chain(&error)))
}

/// Waits for a condition, a minute at most.
///
/// # Panics
///
/// If it does not come.
pub fn eventually(what: &str, holds: impl FnMut() -> bool) {
    within(60, what, holds);
}

/// Waits for a condition, so many seconds at most.
///
/// # Panics
///
/// If it does not come.
pub fn within(secs: u64, what: &str, mut holds: impl FnMut() -> bool) {
    found(secs, what, || if holds() { Ok(()) } else { Err("it does not hold") });
}

/// Waits for what a look finds, so many seconds at most.
///
/// # Panics
///
/// If it does not come, with what there was instead.
pub fn found<T, E: std::fmt::Display>(secs: u64, what: &str, mut look: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + Duration::from_secs(secs);
    loop {
        match look() {
            Ok(found) => return found,
            Err(instead) => assert!(Instant::now() < deadline, "{what}: not within {secs} s: {instead}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A group of its own in the lab's VPC, with no rule for what comes in.
///
/// # Panics
///
/// If the lab's EC2 refuses.
pub fn closed_group(lab: &Lab, name: &str) -> String {
    let vpc = lab.info().vpc.id.clone();
    let parameters = [("GroupName", name), ("GroupDescription", "a test's"), ("VpcId", vpc.as_str())];
    element(&lab.ec2().call("CreateSecurityGroup", &parameters).unwrap(), "groupId").unwrap()
}

/// One permission more or less of a group, by the EC2 action.
///
/// # Panics
///
/// If the lab's EC2 refuses.
pub fn change_group(lab: &Lab, action: &str, group: &str, permission: &[(&str, &str)]) {
    let named: Vec<(String, &str)> =
        permission.iter().map(|(name, value)| (format!("IpPermissions.1.{name}"), *value)).collect();
    let mut parameters = vec![("GroupId", group)];
    parameters.extend(named.iter().map(|(name, value)| (name.as_str(), *value)));
    lab.ec2().call(action, &parameters).unwrap();
}
