//! The plugin's log: JSON lines appended to `pluginLogFile`, one file for all processes on the node.
//!
//! Logging never fails a verb, and never holds what arrived on standard input: annotations and keys of other plugins in
//! it are not ours to publish. Lines are whole because each is one `write` to a file opened for appending.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flatwire_core::error::chain;
use flatwire_core::ids::Time;
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::spec::NetConf;

/// The file is moved aside at this size, so a node keeps at most twice as much.
pub const MAX_LOG_BYTES: u64 = 20 * 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    /// The names the add-on accepts; anything else is its default, debug.
    fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "info" => Self::Info,
            "warn" | "warning" => Self::Warn,
            "error" | "fatal" => Self::Error,
            _ => Self::Debug,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

enum Sink {
    Nowhere,
    Stderr,
    File(File),
}

pub struct Log {
    sink: Sink,
    level: Level,
    /// On every line: verb, sandbox, pod.
    context: Map<String, Value>,
}

impl Log {
    pub fn open(conf: &NetConf, context: Map<String, Value>) -> Self {
        let sink = match conf.log_file() {
            // "stdout" would spoil the answer.
            None | Some("stdout") => Sink::Nowhere,
            Some("stderr") => Sink::Stderr,
            Some(path) => append_to(Path::new(path), MAX_LOG_BYTES).map_or(Sink::Nowhere, Sink::File),
        };
        Self { sink, level: conf.log_level().map_or(Level::Debug, Level::parse), context }
    }

    /// The last line of every call: how it ended and how long it took.
    pub fn outcome(&self, outcome: &Result<Option<Value>, Failure>, took: Duration) {
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).into();
        match outcome {
            Ok(_) => self.line(Level::Info, "done", &[("ms", millis)]),
            Err(failure) => {
                let error = chain(failure).into();
                self.line(Level::Error, "failed", &[("ms", millis), ("code", failure.code().into()), ("error", error)]);
            }
        }
    }

    pub fn line(&self, level: Level, message: &str, fields: &[(&str, Value)]) {
        if level < self.level || matches!(self.sink, Sink::Nowhere) {
            return;
        }
        let mut line = Map::new();
        line.insert("level".into(), level.text().into());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.insert("ts".into(), timestamp(now).into());
        line.insert("msg".into(), message.into());
        line.extend(self.context.clone());
        line.extend(fields.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let text = format!("{}\n", Value::Object(line));
        // Nothing can be done about a log that cannot be written, and the pod must not suffer from it.
        let _ = match &self.sink {
            Sink::Nowhere => Ok(()),
            Sink::Stderr => std::io::stderr().write_all(text.as_bytes()),
            Sink::File(file) => (&*file).write_all(text.as_bytes()),
        };
    }
}

fn append_to(path: &Path, max_bytes: u64) -> Option<File> {
    if !path.is_absolute() {
        return None;
    }
    let open = || OpenOptions::new().create(true).append(true).mode(0o644).custom_flags(NON_BLOCKING).open(path).ok();
    let first_on_node = || {
        let _ = path.parent().map(fs::create_dir_all);
        open()
    };
    let file = open().or_else(first_on_node)?;
    let opened = file.metadata().ok()?;
    if !opened.is_file() || opened.len() < max_bytes {
        return opened.is_file().then_some(file);
    }
    // Another process may have moved it since: only the file that was found too large is moved.
    if fs::metadata(path).is_ok_and(|now| now.ino() == opened.ino()) {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".1");
        let _ = fs::rename(path, aside);
    }
    open()
}

/// O_NONBLOCK, so that a pipe somebody put there cannot hold up a pod.
const NON_BLOCKING: i32 = 0o4000;

/// UTC in the form of RFC 3339, to the millisecond.
fn timestamp(since_epoch: Duration) -> String {
    Time(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)).rfc3339_ms()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_civil_dates() {
        let table = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_600, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ];
        for (seconds, text) in table {
            assert_eq!(timestamp(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_full_log_is_moved_aside_and_lines_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/plugin.log");
        append_to(&path, 10).unwrap().write_all(b"0123456789ab").unwrap();
        append_to(&path, 10).unwrap().write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read(dir.path().join("deep/er/plugin.log.1")).unwrap(), b"0123456789ab");
    }

    #[test]
    fn a_log_that_cannot_be_opened_is_no_log() {
        let dir = tempfile::tempdir().unwrap();
        assert!(append_to(dir.path(), 10).is_none());
        assert!(append_to(Path::new("relative.log"), 10).is_none());
        assert!(append_to(&dir.path().join("file\0name"), 10).is_none());
    }
}
