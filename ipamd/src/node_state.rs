//! What an operator says of this node, as a file: `node-state.json`, the serde form of `Said`.
//!
//! `ipamd level` writes its level; where there is no API server, other fields may be written by whoever knows them. The
//! daemon reads it and never writes it. A file that cannot be read is reported, and what it said before stays.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use flatwire_core::error::chain;
use flatwire_core::pool::{Level, Said};

/// The file is a few lines; more is not it.
const MAX_BYTES: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum NodeStateError {
    #[error("read {path}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is not the state of a node; put it right, or remove it (then nothing is said of the node)",
        path = path.display()
    )]
    Content { path: PathBuf, source: serde_json::Error },
}

/// What the file says; nothing if it is not there.
pub fn read(path: &Path) -> Result<Said, NodeStateError> {
    parse(path, content(path)?.as_deref())
}

/// `None`: there is no file. An empty one is not the same: somebody may be about to write it.
fn content(path: &Path) -> Result<Option<Vec<u8>>, NodeStateError> {
    let failed = |source| NodeStateError::Read { path: path.to_owned(), source };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

fn parse(path: &Path, content: Option<&[u8]>) -> Result<Said, NodeStateError> {
    let Some(bytes) = content else { return Ok(Said::default()) };
    serde_json::from_slice(bytes).map_err(|source| NodeStateError::Content { path: path.to_owned(), source })
}

/// The file as the daemon follows it.
#[derive(Debug)]
pub struct NodeStateFile {
    path: PathBuf,
    /// As it was when last looked at; an error as its text.
    seen: Option<Result<Option<Vec<u8>>, String>>,
}

impl NodeStateFile {
    pub fn new(path: PathBuf) -> Self {
        Self { path, seen: None }
    }

    /// What the file says, if it has changed since the last look. A bad file is an error once.
    pub fn look(&mut self) -> Option<Result<Said, NodeStateError>> {
        let content = content(&self.path);
        let now = content.as_ref().map(Option::clone).map_err(|error| chain(error));
        if self.seen.as_ref() == Some(&now) {
            return None;
        }
        self.seen = Some(now);
        Some(content.and_then(|content| parse(&self.path, content.as_deref())))
    }
}

/// What holds when the very first look finds a bad file: somebody said something, and it may have been to give nothing
/// back.
pub fn cautious() -> Said {
    Said { level: Some(Level::NoRelease), ..Said::default() }
}

pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::Normal => "normal",
        Level::NoRelease => "no-release",
        Level::NoCloud => "no-cloud",
    }
}

pub fn meaning(level: Level) -> &'static str {
    match level {
        Level::Normal => "addresses and ENIs are taken and given back as the pool needs them",
        Level::NoRelease => "nothing is given back to EC2: no unassign, no detach, no delete",
        Level::NoCloud => "EC2 is not called at all; pods are served from what the node has",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once_and_a_bad_file_is_an_error_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-state.json");
        let mut file = NodeStateFile::new(path.clone());
        assert_eq!(file.look().unwrap().unwrap(), Said::default(), "no file says nothing");
        assert!(file.look().is_none());
        fs::write(&path, r#"{"level":"no-cloud","scheduled_pods":7}"#).unwrap();
        let state = file.look().unwrap().unwrap();
        assert_eq!((state.level, state.scheduled_pods), (Some(Level::NoCloud), Some(7)));
        assert!(file.look().is_none());
        fs::write(&path, r#"{"level":"slow"}"#).unwrap();
        let error = file.look().unwrap().unwrap_err();
        let text = chain(&error);
        assert!(text.contains("node-state.json") && text.contains("slow") && text.contains("no-release"), "{text}");
        assert!(file.look().is_none());
        fs::write(&path, "").unwrap();
        assert!(file.look().unwrap().is_err(), "an empty file is no file that is not there");
        fs::remove_file(&path).unwrap();
        assert_eq!(file.look().unwrap().unwrap(), Said::default());
    }
}
