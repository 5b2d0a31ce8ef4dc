//! The real EC2 adapter against EC2 servers that others wrote: moto and LocalStack (one opinion, two serializers), and
//! against the lab's own, by one and the same walk.
//!
//! What this proves: signing, form encoding, XML of two foreign serializers, error shapes, and with moto's IAM check
//! that the shipped policy names every action the adapter calls. What it cannot prove there: prefixes, limits,
//! uniqueness of addresses, asynchronous states; moto and LocalStack have none of them. Each step that a server
//! cannot take is printed as a `SKIPPED` line past the test harness's capture, with the reason.

#![allow(clippy::unwrap_used, reason = "a test harness: what fails here fails the test")]

pub mod process;
pub mod query;
pub mod server;
pub mod walk;

/// The canned HTTP server and metadata service of the adapter's own tests.
#[path = "../../../ipamd/cloud/tests/replay/support.rs"]
pub mod canned;

use std::io::Write;

/// Prints a line that `cargo test` does not swallow.
pub fn loud(line: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "{line}");
}

/// Where test programs put what must outlive them.
pub fn target_dir() -> std::path::PathBuf {
    root().join("target")
}

/// The repository.
pub fn root() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}
