//! nftables by netlink: a table as data, put in place of the old one in a single transaction.
//!
//! ```no_run
//! # async fn example() -> Result<(), flatwire_kernel::KernelError> {
//! use flatwire_kernel::nft::{Chain, Family, Hook, Nft, Rule, Set, Table};
//!
//! // A router that drops what comes in by a link to which its source is not routed.
//! let table = Table::new(Family::Ip, "fabric")
//!     .set(Set::addresses("known").networks(["10.0.0.0/16".parse().unwrap()]))
//!     .chain(
//!         Chain::filter("arrive", Hook::Prerouting, -150)
//!             .rule(Rule::new().fib_source_not_by_input().counter().drop())
//!             .rule(Rule::new().destination_not_in("known").comment("the way out").accept()),
//!     );
//! Nft::open()?.replace(&table).await?;
//! # Ok(())
//! # }
//! ```
//!
//! No `nft` binary is used, and a table that is replaced is never seen absent or half there. What is offered is what
//! this project needs, for IPv4; `Family` and `Key` are where another family goes in.

mod connection;
mod encode;
mod expression;
mod table;

pub use connection::{Fingerprint, Nft};
pub use expression::{Ports, Rule};
pub use table::{Chain, Family, Hook, Map, Set, Table, Target};
