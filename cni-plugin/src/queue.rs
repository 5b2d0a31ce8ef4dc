//! Releases that ipamd could not be told about, one small file per sandbox interface.
//!
//! ipamd drains the folder: it releases what a file names and removes the file. A file is
//! `{"version":1,"network":…,"container_id":…,"if_name":…,"pod_namespace":…,"pod_name":…,"queued_at_ms":…}` and is called
//! `<sha1 of "network/container_id/if_name">.json`. It appears by rename, complete and on disk; names that begin with a
//! dot are unfinished and not to be read.
//!
//! **A release must not hit a later ADD.** Some runtimes restart a container under its old id, so a file can name a
//! sandbox that lives again. Therefore ADD removes the file first, on disk, and only then asks for an address; and ipamd
//! lists the folder and releases what it listed in one step of its loop, which takes no request in between, and skips an
//! allocation that was granted after `queued_at_ms`. Then, whichever comes first:
//!
//! * ADD removes the file before ipamd lists: nothing is released.
//! * ipamd lists first: its release has ended before it looks at the AddNetwork that follows, which is granted anew.
//! * The file stayed although its sandbox lives again (the removal failed): the grant is younger than the file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use sha1::{Digest, Sha1};

use crate::failure::Failure;
use crate::input::Call;

/// Several times the pods a node can have; beyond it the folder is not being drained at all.
pub const MAX_QUEUED: usize = 4096;

/// What became of a release.
#[derive(Debug, PartialEq, Eq)]
pub enum Queued {
    Written,
    /// The folder is full. The address stays taken until ipamd's own audit finds that its sandbox is gone.
    Full,
}

#[derive(Debug, Serialize)]
struct Entry<'a> {
    version: u32,
    network: &'a str,
    container_id: &'a str,
    if_name: &'a str,
    pod_namespace: &'a str,
    pod_name: &'a str,
    queued_at_ms: u64,
}

pub struct Queue {
    dir: PathBuf,
    max: usize,
}

impl Queue {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, max: MAX_QUEUED }
    }

    /// Keeps a release for later. Writing the same one again replaces it.
    pub fn push(&self, call: &Call) -> Result<Queued, Failure> {
        let path = self.path(call);
        let failed = |operation| move |source| Failure::Queue { operation, path: path.clone(), source };
        let path = self.path(call);
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(failed("create the folder of"))?;
        if !path.exists() && self.is_full() {
            return Ok(Queued::Full);
        }
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let entry = Entry {
            version: 1,
            network: &call.conf.name,
            container_id: &call.container_id,
            if_name: &call.if_name,
            pod_namespace: &call.args.pod_namespace,
            pod_name: &call.args.pod_name,
            queued_at_ms: u64::try_from(millis).unwrap_or(u64::MAX),
        };
        self.write(&path, &entry).map_err(|source| Failure::Queue { operation: "write", path, source })?;
        Ok(Queued::Written)
    }

    /// Removes what is queued for this sandbox: ADD before it asks, DEL once ipamd has released.
    pub fn settle(&self, call: &Call) -> Result<(), Failure> {
        let path = self.path(call);
        match fs::remove_file(&path).and_then(|()| sync_dir(&self.dir)) {
            Err(source) if absent(&source) => Ok(()),
            other => other.map_err(|source| Failure::Queue { operation: "remove", path, source }),
        }
    }

    fn write(&self, path: &Path, entry: &Entry<'_>) -> io::Result<()> {
        // The runtime never runs two calls for one sandbox at a time, so a fixed name cannot clash and a crash leaves at
        // most one unfinished file per sandbox.
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let unfinished = self.dir.join(format!(".{name}.tmp"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        let written = file
            .write_all(&serde_json::to_vec(entry)?)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&unfinished, path))
            .and_then(|()| sync_dir(&self.dir));
        if written.is_err() {
            // The first error is the one to tell.
            let _ = fs::remove_file(&unfinished);
        }
        written
    }

    fn is_full(&self) -> bool {
        fs::read_dir(&self.dir).is_ok_and(|entries| entries.take(self.max).count() == self.max)
    }

    fn path(&self, call: &Call) -> PathBuf {
        // None of the three may hold a slash, so the text is unambiguous.
        let id = format!("{}/{}/{}", call.conf.name, call.container_id, call.if_name);
        let mut name = String::with_capacity(45);
        for byte in Sha1::digest(id.as_bytes()) {
            name.push_str(&format!("{byte:02x}"));
        }
        name.push_str(".json");
        self.dir.join(name)
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::input::tests::{read, sample};

    fn call() -> Call {
        sample("DEL", &json!({ "cniVersion": "1.0.0", "name": "aws-cni" }))
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// The contract with ipamd, which drains the folder.
    #[test]
    fn an_entry_is_one_complete_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("not/yet/there");
        let queue = Queue::new(folder.clone());
        assert_eq!(queue.push(&call()).unwrap(), Queued::Written);
        assert_eq!(queue.push(&call()).unwrap(), Queued::Written);
        let [path] = &files(&folder)[..] else { panic!("one file") };
        // printf aws-cni/c1/eth0 | sha1sum
        assert_eq!(path.file_name().unwrap(), "09a0006e445ca7d63b5453ae1af8ce49cd65b64e.json");
        let mut entry: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let queued_at = entry.as_object_mut().unwrap().remove("queued_at_ms").unwrap();
        assert!(queued_at.as_u64().unwrap() > 1_700_000_000_000);
        let expected = json!({
            "version": 1, "network": "aws-cni", "container_id": "c1", "if_name": "eth0",
            "pod_namespace": "default", "pod_name": "sample-pod-1"
        });
        assert_eq!(entry, expected);
    }

    #[test]
    fn settling_removes_the_entry_and_absent_is_settled() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::new(dir.path().join("q"));
        queue.settle(&call()).unwrap();
        queue.push(&call()).unwrap();
        queue.settle(&call()).unwrap();
        queue.settle(&call()).unwrap();
        assert!(files(&dir.path().join("q")).is_empty());
    }

    #[test]
    fn a_full_queue_takes_nothing_new_but_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue { dir: dir.path().to_owned(), max: 2 };
        let numbered = |id: &str| {
            let conf = r#"{"cniVersion":"1.0.0","name":"aws-cni"}"#;
            read(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", id)], conf.as_bytes()).unwrap()
        };
        assert_eq!(queue.push(&numbered("a")).unwrap(), Queued::Written);
        assert_eq!(queue.push(&numbered("b")).unwrap(), Queued::Written);
        assert_eq!(queue.push(&numbered("c")).unwrap(), Queued::Full);
        assert_eq!(queue.push(&numbered("a")).unwrap(), Queued::Written);
        assert_eq!(files(dir.path()).len(), 2);
    }

    #[test]
    fn a_folder_that_cannot_be_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let queue = Queue::new(dir.path().join("file/queue"));
        let failure = queue.push(&call()).unwrap_err();
        assert_eq!(failure.code(), 5);
        assert!(failure.to_string().contains("file/queue"), "{failure}");
        queue.settle(&call()).unwrap();
    }
}
