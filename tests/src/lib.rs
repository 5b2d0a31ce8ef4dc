//! What the suites of this crate share. It holds no tests of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

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
