//! The VPC on one machine: simulated EC2 and IMDS over a fabric of network namespaces, with real daemons and packets.
//!
//! `boot` starts a world and `world` is it, with its doors in `serve` and what it tells of itself in `report`; `cloud`
//! holds the account, `fabric` makes its state into routes, `node` and `runtime` are machines and pods, `probe` asks the
//! network. `client` is what commands, tests and the demo use.

pub mod api;
pub mod bench;
pub mod boot;
pub mod client;
mod cloud;
pub mod ctl;
pub mod demo;
pub mod error;
pub mod fabric;
mod firewall;
mod guard;
pub mod heal;
pub mod matrix;
mod node;
pub mod ns;
pub mod picture;
pub mod probe;
mod report;
mod runtime;
mod serve;
pub mod traffic;
pub mod world;
