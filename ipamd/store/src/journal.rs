//! The journal: a file of records (`format` says how they are written), appended and flushed.
//!
//! A torn tail is the trace of a crash and is dropped; damage in the middle is refused. When the history has grown long
//! beside what it says, the file is rewritten to the shortest journal of the same meaning.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use flatwire_core::ledger::{LedgerState, Record};

use crate::format::{self, Damage};
use crate::{StoreError, flush_folder_of, io_error, replace, write_beside};

/// Rewritten once it has this many lines more than its shortest form.
pub const COMPACT_AFTER: usize = 2_000;

pub struct Journal {
    path: PathBuf,
    file: File,
    /// Beside the journal and held for life, so that it holds whatever file the journal is at the moment. The kernel lets go
    /// of it when the process ends, however that ends.
    _lock: File,
    /// A rename whose folder could not be flushed: until it is, a crash might bring the old file back.
    unflushed: bool,
    /// Length up to which every byte is flushed and valid.
    valid_len: u64,
    lines: usize,
    /// A failed append may have left half a line: nothing is appended before it is cut off.
    torn: bool,
}

/// What opening found.
#[derive(Debug)]
pub struct Opened {
    pub state: LedgerState,
    /// Bytes of a cut-off last line that were dropped.
    pub dropped_bytes: u64,
}

impl Journal {
    /// Opens or creates the journal and locks it against a second daemon.
    pub fn open(path: &Path) -> Result<(Self, Opened), StoreError> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(io_error("create folder", folder))?;
        }
        // Before reading: what another daemon appends while it ends must be seen.
        let lock = lock(path)?;
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io_error("read", path)(e)),
        };
        let parsed = format::parse(&bytes).map_err(|Damage { line, why }| StoreError::Damaged {
            path: path.to_owned(),
            line,
            why,
        })?;
        let valid_len = match parsed.valid_len {
            0 => {
                let head = format::header();
                replace(path, head.as_bytes())?;
                head.len()
            }
            len => len,
        };
        let file = OpenOptions::new().append(true).open(path).map_err(io_error("open", path))?;
        let valid_len = to_u64(valid_len);
        let lines = parsed.records.len();
        let mut journal =
            Self { path: path.to_owned(), file, _lock: lock, unflushed: false, valid_len, lines, torn: true };
        journal.cut_torn_tail()?;
        let dropped_bytes = to_u64(bytes.len().saturating_sub(parsed.valid_len));
        Ok((journal, Opened { state: LedgerState::replay(&parsed.records), dropped_bytes }))
    }

    /// Appends and flushes. On an error nothing of it counts: the file is cut back before the next append.
    pub fn append(&mut self, records: &[Record]) -> Result<(), StoreError> {
        self.cut_torn_tail()?;
        let text = format::encode(records);
        if self.unflushed {
            flush_folder_of(&self.path)?;
            self.unflushed = false;
        }
        self.torn = true;
        if let Err(error) = self.write(&text) {
            // At once if it can be: a crash must not bring back what was refused.
            let _ = self.cut_torn_tail();
            return Err(error);
        }
        self.torn = false;
        self.valid_len += to_u64(text.len());
        self.lines += records.len();
        Ok(())
    }

    fn write(&mut self, text: &str) -> Result<(), StoreError> {
        self.file.write_all(text.as_bytes()).map_err(io_error("append to", &self.path))?;
        self.file.sync_data().map_err(io_error("flush", &self.path))
    }

    /// Longer than what it says warrants: time to compact.
    pub fn is_long(&self, state: &LedgerState) -> bool {
        self.lines >= state.record_count() + COMPACT_AFTER
    }

    /// Rewrites the journal to its shortest form.
    pub fn compact(&mut self, state: &LedgerState) -> Result<(), StoreError> {
        let records = state.as_records();
        let text = format::header() + &format::encode(&records);
        let (beside, file) = write_beside(&self.path, text.as_bytes())?;
        fs::rename(&beside, &self.path).map_err(io_error("rename into place", &self.path))?;
        // From here on this is the journal, whatever fails.
        self.file = file;
        self.valid_len = to_u64(text.len());
        self.lines = records.len();
        self.torn = false;
        self.unflushed = true;
        flush_folder_of(&self.path)?;
        self.unflushed = false;
        Ok(())
    }

    fn cut_torn_tail(&mut self) -> Result<(), StoreError> {
        if self.torn {
            self.file.set_len(self.valid_len).map_err(io_error("cut", &self.path))?;
            self.file.sync_all().map_err(io_error("flush", &self.path))?;
            self.torn = false;
        }
        Ok(())
    }
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    let beside = PathBuf::from(beside);
    let file = OpenOptions::new().create(true).append(true).open(&beside).map_err(io_error("open", &beside))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::Locked { path: path.to_owned() }),
        Err(std::fs::TryLockError::Error(e)) => Err(io_error("lock", &beside)(e)),
    }
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::ids::{EniId, PodName, RouteTable, SandboxId, Time};
    use flatwire_core::ledger::Allocation;
    use proptest::prelude::*;

    fn allocation(n: u8) -> Record {
        Record::Allocated(Allocation {
            sandbox: SandboxId { network: "aws-cni".into(), container_id: format!("c{n}"), if_name: "eth0".into() },
            pod: PodName { namespace: "default".into(), name: format!("p{n}") },
            address: std::net::Ipv4Addr::new(10, 0, 0, n).into(),
            second: None,
            eni: EniId::new("eni-1").unwrap(),
            device: flatwire_core::ids::DeviceIndex(0),
            table: RouteTable::MAIN,
            at: Time(5),
        })
    }

    fn journal(dir: &Path) -> PathBuf {
        dir.join("flatwire.journal")
    }

    #[test]
    fn what_was_appended_is_read_back_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = journal(dir.path());
        let (mut j, opened) = Journal::open(&path).unwrap();
        assert_eq!(opened.state, LedgerState::default());
        j.append(&[allocation(1), allocation(2)]).unwrap();
        drop(j);
        let (_, opened) = Journal::open(&path).unwrap();
        assert_eq!(opened.state, LedgerState::replay(&[allocation(1), allocation(2)]));
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (_held, _) = Journal::open(&journal(dir.path())).unwrap();
        assert!(matches!(Journal::open(&journal(dir.path())), Err(StoreError::Locked { .. })));
    }

    #[test]
    fn a_whole_record_of_another_version_is_refused_and_not_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = journal(dir.path());
        let (mut j, _) = Journal::open(&path).unwrap();
        j.append(&[allocation(1)]).unwrap();
        drop(j);
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str(&format::line(r#"{"from_the_future":{}}"#));
        fs::write(&path, &text).unwrap();
        assert!(matches!(Journal::open(&path), Err(StoreError::Damaged { line: 3, .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn compaction_keeps_the_meaning_and_shortens_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = journal(dir.path());
        let (mut j, _) = Journal::open(&path).unwrap();
        let mut all = Vec::new();
        for _ in 0..50 {
            all.push(allocation(1));
        }
        j.append(&all).unwrap();
        let before = fs::metadata(&path).unwrap().len();
        let state = LedgerState::replay(&all);
        j.compact(&state).unwrap();
        assert!(fs::metadata(&path).unwrap().len() < before);
        j.append(&[allocation(2)]).unwrap();
        drop(j);
        all.push(allocation(2));
        assert_eq!(Journal::open(&path).unwrap().1.state, LedgerState::replay(&all));
    }

    #[test]
    fn a_file_of_another_program_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = journal(dir.path());
        fs::write(&path, "{\"version\":\"vpc-cni-ipam/1\"}\n").unwrap();
        assert!(matches!(Journal::open(&path), Err(StoreError::Damaged { line: 1, .. })));
        assert!(fs::read_to_string(&path).unwrap().contains("vpc-cni-ipam"));
    }

    proptest! {
        /// A journal cut at any byte recovers a prefix of history.
        #[test]
        fn a_cut_anywhere_recovers_a_prefix_of_history(count in 1u8..8, cut in 0usize..2_000) {
            let dir = tempfile::tempdir().unwrap();
            let path = journal(dir.path());
            let records: Vec<Record> = (1..=count).map(allocation).collect();
            let (mut j, _) = Journal::open(&path).unwrap();
            j.append(&records).unwrap();
            drop(j);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..cut.min(bytes.len())]).unwrap();
            let (mut j, opened) = Journal::open(&path).unwrap();
            let prefixes: Vec<LedgerState> = (0..=records.len()).map(|n| LedgerState::replay(&records[..n])).collect();
            prop_assert!(prefixes.contains(&opened.state));
            // And it goes on from there.
            j.append(&[allocation(99)]).unwrap();
            drop(j);
            prop_assert!(Journal::open(&path).unwrap().1.state.pods.len() == opened.state.pods.len() + 1);
        }

        /// A changed byte recovers a prefix of history or is refused; it never invents one.
        #[test]
        fn a_changed_byte_recovers_a_prefix_or_is_refused(count in 1u8..6, at in 0usize..2_000, to: u8) {
            let dir = tempfile::tempdir().unwrap();
            let path = journal(dir.path());
            let records: Vec<Record> = (1..=count).map(allocation).collect();
            let (mut j, _) = Journal::open(&path).unwrap();
            j.append(&records).unwrap();
            drop(j);
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = to;
            fs::write(&path, &bytes).unwrap();
            let prefixes: Vec<LedgerState> = (0..=records.len()).map(|n| LedgerState::replay(&records[..n])).collect();
            match Journal::open(&path) {
                Ok((_, opened)) => prop_assert!(prefixes.contains(&opened.state)),
                Err(e) => {
                    let damaged = matches!(e, StoreError::Damaged { .. });
                    prop_assert!(damaged);
                    prop_assert_eq!(fs::read(&path).unwrap(), bytes, "a refused file is left as it is");
                }
            }
        }
    }
}
