//! What happened, told in aligned lines. Telling costs more than simulating, so a world is usually run in silence and a
//! seed that failed is run again aloud.

use std::collections::VecDeque;
use std::fmt::Write as _;

use flatwire_core::ids::Time;

/// How much of the story is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Telling {
    Nothing,
    /// The last so many events.
    Tail(usize),
    Full,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    at: Time,
    who: &'static str,
    text: String,
}

#[derive(Debug, Clone)]
pub struct Story {
    telling: Telling,
    begin: Time,
    lines: VecDeque<Line>,
    /// Events so far, kept or not.
    pub events: u64,
    hash: u64,
}

impl Story {
    pub fn new(telling: Telling, begin: Time) -> Self {
        Self { telling, begin, lines: VecDeque::new(), events: 0, hash: 0xcbf2_9ce4_8422_2325 }
    }

    /// `text` is made only if it is kept.
    pub fn tell(&mut self, at: Time, who: &'static str, text: impl FnOnce() -> String) {
        self.events += 1;
        if self.telling == Telling::Nothing {
            return;
        }
        let line = Line { at, who, text: text() };
        self.digest(&line);
        if let Telling::Tail(most) = self.telling
            && self.lines.len() >= most
        {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// FNV-1a over everything told: two runs are the same run if this is the same.
    fn digest(&mut self, line: &Line) {
        let bytes = line.at.0.to_be_bytes().into_iter().chain(line.who.bytes()).chain(line.text.bytes());
        for byte in bytes {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }
}

impl std::fmt::Display for Story {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kept = u64::try_from(self.lines.len()).unwrap_or(u64::MAX);
        if kept < self.events {
            writeln!(f, "  … {} earlier events", self.events - kept)?;
        }
        for Line { at, who, text } in &self.lines {
            writeln!(f, "  {}  {who:<8}{text}", clock(at.since_ms(self.begin)))?;
        }
        Ok(())
    }
}

/// `00:12:03.120`
fn clock(ms: u64) -> String {
    let mut text = String::new();
    let (secs, ms) = (ms / 1_000, ms % 1_000);
    let _ = write!(text, "{:02}:{:02}:{:02}.{ms:03}", secs / 3_600, secs / 60 % 60, secs % 60);
    text
}
