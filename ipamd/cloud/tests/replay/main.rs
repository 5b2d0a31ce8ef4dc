//! The adapter against answers written down beforehand, over real HTTP: one program, since linking the SDK is what
//! costs.

#![allow(clippy::unwrap_used, reason = "tests")]

mod damage;
mod ec2;
mod imds;
mod preflight;
mod support;
