//! The ledger on disk.
//!
//! `journal` is the truth: an append-only file, one checked line per record, each append flushed before anybody is told.
//! `format` is what its lines look like, and nothing else.
//! `checkpoint` keeps the add-on's own `ipam.json` beside it, so that a rollback to the add-on finds every pod.
//! `releases` is the queue of DELs that found no daemon. What the records mean is `flatwire_core::ledger`'s business.

pub mod checkpoint;
pub mod format;
pub mod journal;
pub mod releases;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{action} {path}", path = path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the ledger {path} is damaged at line {line} ({why}) with valid records behind it, so something was lost in the \
         middle; nothing was changed. Restore the file, or move it aside (mv {path} {path}.damaged) and start again: \
         ipamd then learns its addresses from EC2, and keeps every address that still has a pod route out of use",
        path = path.display()
    )]
    Damaged { path: PathBuf, line: usize, why: String },
    #[error(
        "the state file {path} of the add-on cannot be used: {why}. Correct it, or remove it: pods that run keep their \
         addresses, because an address with a pod route is in use whatever any file says",
        path = path.display()
    )]
    Checkpoint { path: PathBuf, why: String },
    #[error("{path} is held by another ipamd; stop that one first", path = path.display())]
    Locked { path: PathBuf },
}

fn io_error<'p>(action: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> StoreError + 'p {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

/// Replaces a file so that a crash leaves the old content or the new, never a mixture: write beside, flush, rename, flush
/// the folder.
pub fn replace(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let (beside, _) = write_beside(path, content)?;
    fs::rename(&beside, path).map_err(io_error("rename into place", path))?;
    flush_folder_of(path)
}

/// Writes and flushes the file that is to take `path`'s place; returns it open for appending.
fn write_beside(path: &Path, content: &[u8]) -> Result<(PathBuf, File), StoreError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &beside)(e)),
        _ => {}
    }
    let mut file = OpenOptions::new().create(true).append(true).open(&beside).map_err(io_error("create", &beside))?;
    file.write_all(content).map_err(io_error("write", &beside))?;
    file.sync_all().map_err(io_error("flush", &beside))?;
    Ok((beside, file))
}

fn flush_folder_of(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(io_error("flush folder", folder))
}
