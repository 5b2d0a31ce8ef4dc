//! What can go wrong between this crate and the kernel. A variant names the operation and carries its object; the
//! kernel's own sentence is kept where it gives one.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why something could not be read from, or made so in, the kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("network namespace {} does not exist", path.display())]
    NetnsMissing { path: PathBuf },

    #[error("{} is not a network namespace", path.display())]
    NotANetns { path: PathBuf },

    #[error("could not {operation} network namespace {}", path.display())]
    Netns { operation: &'static str, path: PathBuf, source: io::Error },

    #[error("{name:?} is not a usable interface name (1 to 15 bytes, no '/', ':' or space)")]
    BadName { name: String },

    #[error("{what} is not usable: {why}")]
    BadInput { what: String, why: &'static str },

    #[error("interface {name} already exists in the pod's namespace {}", netns.display())]
    PodInterfaceTaken { name: String, netns: PathBuf },

    #[error("interface {name} already exists on the host and is not the host end of a pod's veth ({kind})")]
    HostInterfaceTaken { name: String, kind: String },

    #[error("interface {name} does not exist")]
    NoSuchLink { name: String },

    #[error("not permitted to {operation}: this needs CAP_NET_ADMIN, and CAP_SYS_ADMIN to enter a namespace")]
    Denied { operation: String, source: io::Error },

    #[error("could not {operation}{}", said.as_deref().map(|s| format!(" (the kernel says: {s})")).unwrap_or_default())]
    Refused { operation: String, said: Option<String>, source: io::Error },

    #[error("no answer from the kernel within {deadline_ms} ms to: {operation}")]
    Timeout { operation: String, deadline_ms: u64 },

    #[error("could not open a netlink socket")]
    Open { source: io::Error },

    #[error("could not exchange messages with the kernel to {operation}")]
    Exchange { operation: String, source: io::Error },

    #[error("could not read the kernel's answer to: {operation}")]
    Decode { operation: String, source: netlink_packet_core::DecodeError },

    #[error("could not {operation}: the list changed under every one of {tries} readings")]
    Torn { operation: String, tries: u32 },

    #[error("could not {operation} sysctl {key}")]
    Sysctl { operation: &'static str, key: String, source: io::Error },

    #[error("{} of the steps to {operation} failed: {}", errors.len(), one_line(errors))]
    Several { operation: String, errors: Vec<KernelError> },
}

impl KernelError {
    /// The error number behind this error, where the kernel gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Netns { source, .. }
            | Self::Denied { source, .. }
            | Self::Refused { source, .. }
            | Self::Open { source }
            | Self::Exchange { source, .. }
            | Self::Sysctl { source, .. } => source.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }

    /// True where the object of the operation does not exist, which teardown takes for done.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::NetnsMissing { .. } | Self::NotANetns { .. } | Self::NoSuchLink { .. })
            || matches!(self.errno(), Some(Errno::ENODEV | Errno::ESRCH | Errno::ENOENT | Errno::EADDRNOTAVAIL))
    }

    /// The kernel's refusal of `operation`, with its own sentence if it gave one.
    pub(crate) fn refused(operation: String, code: i32, said: Option<String>) -> Self {
        let source = io::Error::from_raw_os_error(code.saturating_abs());
        match Errno::from_raw(code.saturating_abs()) {
            Errno::EPERM | Errno::EACCES => Self::Denied { operation, source },
            _ => Self::Refused { operation, said, source },
        }
    }

    /// Nothing, the one error, or all of them: for teardown, which goes on after an error.
    pub(crate) fn collect(operation: impl Into<String>, mut errors: Vec<Self>) -> Result<(), Self> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several { operation: operation.into(), errors }),
        }
    }
}

/// The collected errors have no single source, so their chains are written out here.
fn one_line(errors: &[KernelError]) -> String {
    let mut text = String::new();
    for error in errors {
        if !text.is_empty() {
            text.push_str("; ");
        }
        text.push_str(&error.to_string());
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
    }
    text
}
