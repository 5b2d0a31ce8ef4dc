//! The walk on every server: moto and LocalStack with what they lack, the lab's EC2 with nothing left out.

// The SDK's futures nest deeply, and tests that await many of them at once nest them once more.
#![recursion_limit = "256"]
#![allow(clippy::unwrap_used, reason = "tests")]

mod iam;
mod lab;
mod life;
mod mocks;
