//! The ledger's body: the journal's own bytes in memory, with what a disk does to them when the daemon dies.

use flatwire_core::ledger::{LedgerState, Record};
use flatwire_store::format::{self, Damage};

use crate::dice::Dice;

/// Rewritten once it has so many lines more than its shortest form. The store waits ten times as long; here snapshots
/// are to be met often.
const COMPACT_AFTER: usize = 200;

#[derive(Debug, Clone)]
pub struct Journal {
    bytes: Vec<u8>,
    lines: usize,
    /// Appends fail: the disk is full.
    pub full: bool,
}

impl Default for Journal {
    fn default() -> Self {
        Self { bytes: format::header().into_bytes(), lines: 0, full: false }
    }
}

impl Journal {
    /// Appends and flushes, or refuses and leaves no trace.
    pub fn append(&mut self, records: &[Record]) -> Result<(), String> {
        if self.full {
            return Err("No space left on device (os error 28)".to_owned());
        }
        self.bytes.extend_from_slice(format::encode(records).as_bytes());
        self.lines += records.len();
        Ok(())
    }

    /// The daemon dies while it appends: any part of the text may be there afterwards, even all of it.
    pub fn tear(&mut self, records: &[Record], dice: &mut Dice) {
        let text = format::encode(records);
        let len = u64::try_from(text.len()).unwrap_or(0);
        let kept = usize::try_from(dice.between(0, len)).unwrap_or(0);
        self.bytes.extend_from_slice(text.as_bytes().get(..kept).unwrap_or_default());
    }

    /// What the next daemon finds; the torn tail is cut off.
    pub fn replay(&mut self) -> Result<LedgerState, Damage> {
        let parsed = format::parse(&self.bytes)?;
        if parsed.valid_len == 0 {
            self.bytes = format::header().into_bytes();
        } else {
            self.bytes.truncate(parsed.valid_len);
        }
        self.lines = parsed.records.len();
        Ok(LedgerState::replay(&parsed.records))
    }

    /// Rewrites the journal to its shortest form when it has grown long. The rename is atomic.
    pub fn compact_if_long(&mut self, state: &LedgerState) -> bool {
        if self.full || self.lines < state.record_count() + COMPACT_AFTER {
            return false;
        }
        let records = state.as_records();
        self.bytes = (format::header() + &format::encode(&records)).into_bytes();
        self.lines = records.len();
        true
    }
}
