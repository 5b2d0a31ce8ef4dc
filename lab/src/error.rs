//! The lab's one error type.

pub use flatwire_core::error::chain;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call, a file or a socket.
    #[error("cannot {what}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
    /// Links, addresses, routes, neighbours.
    #[error("the kernel refused")]
    Kernel(#[from] flatwire_kernel::KernelError),
    /// Text that should have been JSON of a known shape.
    #[error("cannot read {what}")]
    Json {
        what: String,
        #[source]
        source: serde_json::Error,
    },
    /// The EC2 API of the lab answered with an error.
    #[error("ec2 {action} failed: {code}: {message}")]
    Ec2 { action: String, code: String, message: String },
    /// A CNI plugin answered with an error.
    #[error("cni {verb} of {pod} failed with code {code}: {message}")]
    Cni { verb: &'static str, pod: String, code: i64, message: String },
    /// What was asked for cannot be done as things stand.
    #[error("{0}")]
    Refused(String),
    /// A condition that did not come true within its deadline.
    #[error("{what} did not happen within {seconds} s")]
    Deadline { what: String, seconds: u64 },
}

impl Error {
    pub fn refused(text: impl Into<String>) -> Self {
        Self::Refused(text.into())
    }
}

/// Says what was being done when an operation failed.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

impl<T> Doing<T> for nix::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::Io { what: what(), source: errno.into() })
    }
}

impl<T> Doing<T> for serde_json::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Json { what: what(), source })
    }
}
