//! Everything this project does to, and reads from, the kernel: links, addresses, routes and rules by route netlink,
//! nftables by netfilter netlink, namespaces and sysctls by system calls and files. No program is ever executed.
//!
//! * `pod` wires one pod and takes it down again (the CNI plugin's part).
//! * `node` makes the node what a `NodePlan` says (the daemon's part).
//! * `netns`, `link`, `address`, `route`, `rule` and `nft` are the verbs both are made of, usable in any namespace; `batch`
//!   makes many of them at once.
//!
//! Nothing here decides what the data path should be; plans and addresses come in as values.

mod address;
mod apply;
mod batch;
mod check;
mod conntrack;
pub mod error;
mod link;
mod netlink;
pub mod netns;
pub mod nft;
mod nl;
pub mod node;
pub mod pod;
mod route;
mod rule;
mod ruleset;
pub mod sysctl;
mod watch;

pub use address::LinkAddress;
pub use batch::Batch;
pub use error::KernelError;
pub use link::{Link, MAX_NAME_BYTES, POD_GROUP, VethEnd};
pub use netlink::Netlink;
pub use netns::{Netns, NetnsId};
pub use node::{NodeKernel, NodeLink};
pub use route::{PROTOCOL, Route};
pub use rule::Rule;
