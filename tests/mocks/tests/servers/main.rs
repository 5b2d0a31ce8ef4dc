//! The walk on every server: moto and LocalStack with what they lack, the lab's EC2 with nothing left out.

#![allow(clippy::unwrap_used, reason = "tests")]

mod iam;
mod lab;
mod mocks;
