//! The queue of releases that the plugin leaves on disk when a DEL finds no daemon: one small JSON file per sandbox.

use std::fs;
use std::path::{Path, PathBuf};

use flatwire_core::ids::{PodName, SandboxId};
use serde::{Deserialize, Serialize};

use crate::{StoreError, io_error};

/// Releases taken in one pass; the next pass takes the rest.
pub const MAX_PER_PASS: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedRelease {
    pub version: u32,
    pub network: String,
    pub container_id: String,
    pub if_name: String,
    #[serde(default)]
    pub pod_namespace: String,
    #[serde(default)]
    pub pod_name: String,
    #[serde(default)]
    pub queued_at_ms: u64,
}

impl QueuedRelease {
    pub fn sandbox(&self) -> SandboxId {
        SandboxId {
            network: self.network.clone(),
            container_id: self.container_id.clone(),
            if_name: self.if_name.clone(),
        }
    }

    pub fn pod(&self) -> PodName {
        PodName { namespace: self.pod_namespace.clone(), name: self.pod_name.clone() }
    }
}

/// One file of the queue: readable, or why not.
#[derive(Debug)]
pub struct Queued {
    pub path: PathBuf,
    pub release: Result<QueuedRelease, String>,
}

/// What is to be settled in this pass, by file name.
pub fn list(folder: &Path) -> Result<Vec<Queued>, StoreError> {
    // What cannot be read does not stand in the way of what can.
    let mut readable = 0;
    let mut queued = all(folder)?;
    let end = queued.iter().position(|one| {
        readable += usize::from(one.release.is_ok());
        readable > MAX_PER_PASS
    });
    queued.truncate(end.unwrap_or(queued.len()));
    Ok(queued)
}

/// What is queued now, by file name. A folder that is not there is an empty queue.
pub fn all(folder: &Path) -> Result<Vec<Queued>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error("read", folder)(e)),
    };
    let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let release = fs::read(&path)
            .map_err(|e| e.to_string())
            .and_then(|bytes| serde_json::from_slice(&bytes).map_err(|e| e.to_string()));
        Queued { path, release }
    };
    Ok(paths.into_iter().map(read).collect())
}

/// Takes a settled release out of the queue. Absent means done.
pub fn settle(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io_error("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_lists_what_is_readable_and_names_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(&dir.path().join("absent")).unwrap().is_empty());
        let good = r#"{"version":1,"network":"aws-cni","container_id":"c1","if_name":"eth0"}"#;
        fs::write(dir.path().join("a.json"), good).unwrap();
        fs::write(dir.path().join("b.json"), "{").unwrap();
        fs::write(dir.path().join("c.json.tmp"), good).unwrap();
        let queued = list(dir.path()).unwrap();
        assert_eq!(queued.len(), 2);
        assert_eq!(queued[0].release.as_ref().unwrap().sandbox().container_id, "c1");
        assert!(queued[1].release.is_err());
        settle(&queued[0].path).unwrap();
        settle(&queued[0].path).unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 1);
    }
}
