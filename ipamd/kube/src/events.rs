//! Events: one for each object, reason and matter, however often it happens. The first is told at once, repetitions as a
//! count at most once a minute. Pure.

use std::collections::BTreeMap;

use flatwire_core::ids::Time;

/// Repetitions are told this seldom.
pub const REPEAT_EVERY_MS: u64 = 60_000;
/// What did not happen again for this long begins anew: the server forgets events after an hour.
pub const FORGET_AFTER_MS: u64 = 1_800_000;
/// Objects and reasons at once; beyond them the one that happened longest ago is forgotten.
pub const MAX_REMEMBERED: usize = 512;
/// The server takes no longer text.
const MAX_NOTE_BYTES: usize = 1_000;

/// Whom an event is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct About {
    pub kind: &'static str,
    pub namespace: String,
    pub name: String,
    /// `kubectl describe` finds the events of an object by it.
    pub uid: String,
}

/// An event as it stands, to be written under its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub about: About,
    /// The same for every repetition.
    pub name: String,
    /// In CamelCase.
    pub reason: String,
    pub action: &'static str,
    pub note: String,
    pub first: Time,
    pub last: Time,
    pub count: u32,
}

#[derive(Debug, Default)]
pub struct Events {
    /// By object, reason, and what of it where the reason alone leaves that open.
    remembered: BTreeMap<(About, String, String), (Event, Time)>,
}

impl Events {
    /// What is to be written of this happening, if anything.
    pub fn happened(
        &mut self,
        about: About,
        reason: &str,
        matter: &str,
        action: &'static str,
        note: &str,
        now: Time,
    ) -> Option<Event> {
        let reason = camel_case(reason);
        let key = (about.clone(), reason.clone(), matter.to_owned());
        self.remembered.retain(|_, (event, _)| now.since_ms(event.last) < FORGET_AFTER_MS);
        if let Some((event, told)) = self.remembered.get_mut(&key) {
            event.count = event.count.saturating_add(1);
            event.last = now;
            event.note = cut(note);
            if now.since_ms(*told) < REPEAT_EVERY_MS {
                return None;
            }
            *told = now;
            return Some(event.clone());
        }
        if self.remembered.len() >= MAX_REMEMBERED {
            let oldest = self.remembered.iter().min_by_key(|(_, (event, _))| event.last).map(|(key, _)| key.clone());
            oldest.map(|key| self.remembered.remove(&key));
        }
        let name = name_of(&about, &format!("{reason}{matter}"), now);
        let note = cut(note);
        let event = Event { about, name, reason, action, note, first: now, last: now, count: 1 };
        self.remembered.insert(key, (event.clone(), now));
        Some(event)
    }
}

/// `SubnetEmpty` for `subnet_empty`.
pub fn camel_case(reason: &str) -> String {
    reason
        .split('_')
        .map(|word| {
            let (first, rest) = word.split_at_checked(1).unwrap_or((word, ""));
            format!("{}{rest}", first.to_ascii_uppercase())
        })
        .collect()
}

/// A name that no other event has: its object's, and when and why it began.
fn name_of(about: &About, why: &str, now: Time) -> String {
    // FNV-1a: names need to differ, not to be secret.
    let hash = why
        .bytes()
        .chain(about.uid.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    // Names of objects may be as long as those of events, which must end in something of their own.
    let stem: String = about.name.chars().take(200).collect();
    let stem = stem.trim_end_matches(['.', '-']);
    format!("{stem}.{:x}", hash ^ now.0)
}

fn cut(note: &str) -> String {
    let mut end = note.len().min(MAX_NOTE_BYTES);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    note[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(name: &str) -> About {
        About { kind: "Pod", namespace: "default".into(), name: name.into(), uid: format!("uid-{name}") }
    }

    fn happens(events: &mut Events, name: &str, reason: &str, at: u64) -> Option<Event> {
        events.happened(about(name), reason, "", "AssignAddress", "no address", Time(at))
    }

    #[test]
    fn a_repetition_is_a_count_told_once_a_minute() {
        let mut events = Events::default();
        let first = happens(&mut events, "web", "subnet_empty", 0).unwrap();
        assert_eq!((first.reason.as_str(), first.count), ("SubnetEmpty", 1));
        assert!((1..60).all(|second| happens(&mut events, "web", "subnet_empty", second * 1_000).is_none()));
        let again = happens(&mut events, "web", "subnet_empty", 60_000).unwrap();
        assert_eq!((again.count, again.first, again.last), (61, Time(0), Time(60_000)));
        assert_eq!(again.name, first.name, "it is the same event");
    }

    #[test]
    fn two_settings_that_are_not_allowed_are_two_events() {
        let mut events = Events::default();
        let mut refused = |matter| events.happened(about("node"), "invalid_setting", matter, "Read", matter, Time(0));
        let (one, other) = (refused("a is not allowed").unwrap(), refused("b is not allowed").unwrap());
        assert!(one.name != other.name && one.reason == other.reason, "{one:?} {other:?}");
        assert_eq!(refused("a is not allowed"), None);
    }

    #[test]
    fn another_pod_or_reason_is_another_event_and_so_is_what_happens_much_later() {
        let mut events = Events::default();
        let first = happens(&mut events, "web", "subnet_empty", 0).unwrap();
        let others = [
            happens(&mut events, "db", "subnet_empty", 1).unwrap(),
            happens(&mut events, "web", "throttled", 1).unwrap(),
            happens(&mut events, "web", "subnet_empty", FORGET_AFTER_MS).unwrap(),
        ];
        assert!(others.iter().all(|other| other.name != first.name && other.count == 1), "{others:?}");
    }

    #[test]
    fn no_more_is_remembered_than_the_bound() {
        let mut events = Events::default();
        for n in 0..2 * MAX_REMEMBERED {
            assert!(happens(&mut events, &format!("pod-{n}"), "cooling", 7).is_some());
        }
        assert_eq!(events.remembered.len(), MAX_REMEMBERED);
    }

    #[test]
    fn names_and_notes_are_as_long_as_the_server_takes() {
        let mut events = Events::default();
        let long =
            events.happened(about(&"a".repeat(253)), "denied", "", "AssignAddress", &"ä".repeat(900), Time(u64::MAX));
        let long = long.unwrap();
        assert!(long.name.len() <= 253 && long.note.len() <= 1_000, "{}", long.name.len());
    }
}
