//! Histories of every kind of record: what is written is what is read, a snapshot says what the history says, and a journal
//! that was damaged gives a prefix of its history or is refused.

#![allow(clippy::unwrap_used, reason = "tests")]

mod records;

use flatwire_core::ledger::{LedgerState, Record};
use flatwire_store::format::{self, Damage};
use flatwire_store::journal::Journal;
use proptest::prelude::*;

use records::history;

fn text(records: &[Record]) -> Vec<u8> {
    (format::header() + &format::encode(records)).into_bytes()
}

/// A snapshot leaves out the rest of addresses that no ENI holds any more: nobody could be given them.
fn without_rest_of_strangers(mut state: LedgerState) -> LedgerState {
    let held: Vec<_> = state.slots.values().flatten().copied().collect();
    state.freed.retain(|address, _| held.iter().any(|slot| slot.contains(address)));
    state
}

/// What can happen to the bytes of a file. Whole lines that vanish or come twice are no damage that a sum per line could see.
#[derive(Debug, Clone)]
enum Blow {
    /// Everything from here on is lost.
    Cut(usize),
    /// A block the disk never wrote.
    Zeros(usize, usize),
    Byte(usize, u8),
    Insert(usize, Vec<u8>),
    /// So many bytes vanish; never from one start of a line to another.
    Remove(usize, usize),
    Append(Vec<u8>),
}

fn blow() -> impl Strategy<Value = Blow> {
    let at = any::<usize>();
    prop_oneof![
        at.prop_map(Blow::Cut),
        (at, 1usize..400).prop_map(|(at, length)| Blow::Zeros(at, length)),
        (at, any::<u8>()).prop_map(|(at, byte)| Blow::Byte(at, byte)),
        (at, prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Blow::Insert(at, bytes)),
        (at, prop::sample::select(b"\n \"{}0f".to_vec())).prop_map(|(at, byte)| Blow::Insert(at, vec![byte])),
        (at, 1usize..400).prop_map(|(at, length)| Blow::Remove(at, length)),
        prop::collection::vec(any::<u8>(), 1..40).prop_map(Blow::Append),
    ]
}

fn strike(bytes: &mut Vec<u8>, blow: &Blow) {
    let place = |at: usize, length: usize| at % (length + 1);
    match blow {
        Blow::Cut(at) => bytes.truncate(place(*at, bytes.len())),
        Blow::Zeros(at, length) => {
            let at = place(*at, bytes.len());
            bytes.iter_mut().skip(at).take(*length).for_each(|byte| *byte = 0);
        }
        Blow::Byte(at, to) => {
            let at = place(*at, bytes.len());
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *to;
            }
        }
        Blow::Insert(at, more) => {
            let at = place(*at, bytes.len());
            bytes.splice(at..at, more.iter().copied());
        }
        Blow::Remove(at, length) => {
            let mut at = place(*at, bytes.len());
            while at > 0 && bytes.get(at - 1) == Some(&b'\n') {
                at -= 1;
            }
            let end = (at + length).min(bytes.len());
            bytes.drain(at..end);
        }
        Blow::Append(more) => bytes.extend_from_slice(more),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn what_is_written_is_what_is_read(records in history(30)) {
        let bytes = text(&records);
        prop_assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), records.len() + 1, "a record a line");
        let parsed = format::parse(&bytes).unwrap();
        prop_assert_eq!(parsed.valid_len, bytes.len());
        prop_assert_eq!(parsed.records, records);
    }

    #[test]
    fn a_snapshot_says_what_the_history_says(records in history(40)) {
        let state = LedgerState::replay(&records);
        let snapshot = LedgerState::replay(&state.as_records());
        prop_assert_eq!(&snapshot, &without_rest_of_strangers(state));
        prop_assert_eq!(LedgerState::replay(&snapshot.as_records()), snapshot, "and again");
    }

    #[test]
    fn any_damage_leaves_a_prefix_of_history_or_is_refused(records in history(12), blows in prop::collection::vec(blow(), 1..4)) {
        let mut bytes = text(&records);
        for blow in &blows {
            strike(&mut bytes, blow);
        }
        match format::parse(&bytes) {
            Ok(parsed) => {
                prop_assert!(records.starts_with(&parsed.records), "{:?} is no prefix", parsed.records);
                prop_assert!(parsed.valid_len <= bytes.len());
                let again = format::parse(&bytes[..parsed.valid_len]).unwrap();
                prop_assert_eq!(again, parsed, "what is kept is whole");
            }
            Err(Damage { line, why }) => {
                prop_assert!((1..=bytes.iter().filter(|byte| **byte == b'\n').count()).contains(&line), "{line}");
                prop_assert!(!why.is_empty());
            }
        }
    }

    #[test]
    fn any_bytes_at_all_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(parsed) = format::parse(&bytes) {
            prop_assert!(parsed.records.is_empty());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The file itself: what a damaged one still says is what goes on, and a refused one is left as it is.
    #[test]
    fn a_damaged_file_goes_on_from_what_it_still_says(records in history(12), blow in blow(), more in history(3)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flatwire.journal");
        let mut bytes = text(&records);
        strike(&mut bytes, &blow);
        std::fs::write(&path, &bytes).unwrap();
        match (Journal::open(&path), format::parse(&bytes)) {
            (Ok((mut journal, opened)), Ok(parsed)) => {
                prop_assert_eq!(&opened.state, &LedgerState::replay(&parsed.records));
                journal.append(&more).unwrap();
                drop(journal);
                let all: Vec<Record> = parsed.records.into_iter().chain(more).collect();
                prop_assert_eq!(Journal::open(&path).unwrap().1.state, LedgerState::replay(&all));
            }
            (Err(error), Err(_)) => {
                prop_assert!(error.to_string().contains("flatwire.journal"));
                prop_assert_eq!(std::fs::read(&path).unwrap(), bytes);
            }
            (opened, parsed) => prop_assert!(false, "{:?} but {:?}", opened.map(|(_, o)| o), parsed),
        }
    }
}
