//! The gRPC contract between the CNI plugin and ipamd, generated from `rpc.proto`, and nothing else.

#[allow(clippy::all, clippy::as_conversions, clippy::unwrap_used, missing_docs)]
mod generated {
    tonic::include_proto!("rpc");
}

pub use generated::*;
