//! Sysctls of the calling thread's network namespace, by file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::errno::Errno;

use crate::error::KernelError;

/// What became of a wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sysctl {
    /// It had the value already.
    Stood,
    /// It was given the value.
    Changed,
    /// The kernel does not know it.
    Unknown,
    /// It may not be written here (a read-only /proc).
    ReadOnly,
}

/// Where a container that is not privileged, and whose own /proc/sys is therefore read-only, has the host's mounted. The
/// files are of whoever opens them: they show its network namespace, and CAP_NET_ADMIN there is enough to write them.
const MOUNTED: &str = "/host/proc/sys";

/// The file of `net/ipv4/ip_forward` and the like.
pub fn path(key: &str) -> PathBuf {
    static IS_MOUNTED: LazyLock<bool> = LazyLock::new(|| Path::new(MOUNTED).join("net").exists());
    Path::new(if *IS_MOUNTED { MOUNTED } else { "/proc/sys" }).join(key)
}

/// Gives a sysctl a value, unless it has it. Unknown and read-only ones are reported and not an error.
pub(crate) fn set(key: &str, value: &str) -> Result<Sysctl, KernelError> {
    let path = path(key);
    match fs::read_to_string(&path) {
        Ok(now) if now.trim_end() == value => return Ok(Sysctl::Stood),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Sysctl::Unknown),
        // Write-only ones, and whatever else: writing tells.
        _ => {}
    }
    match fs::write(&path, value) {
        Ok(()) => Ok(Sysctl::Changed),
        Err(e) => match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => Ok(Sysctl::Unknown),
            Some(Errno::EROFS) => Ok(Sysctl::ReadOnly),
            Some(Errno::EPERM | Errno::EACCES) => {
                Err(KernelError::Denied { operation: format!("write sysctl {key}"), source: e })
            }
            _ => Err(KernelError::Sysctl { operation: "write", key: key.to_owned(), source: e }),
        },
    }
}
