//! The journal as text: a first line that names the format, then one record a line, `<crc32c of the rest, 8 hex digits>
//! <json>`. An operator can read it with `less`.
//!
//! Pure: bytes in, records out. A line that is cut or fails its check at the very end is the trace of a crash and does not
//! count; the same with valid lines behind it is damage, and is refused.

use flatwire_core::ledger::Record;

const HEADER: &str = "flatwire-journal/1";

/// What a journal says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    pub records: Vec<Record>,
    /// Bytes up to the end of the last valid line; what follows is a torn tail.
    pub valid_len: usize,
}

/// A line that is damaged although valid ones follow it, or that another version wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Counted from 1.
    pub line: usize,
    pub why: String,
}

/// The first line of every journal.
pub fn header() -> String {
    line(HEADER)
}

/// The lines of these records.
pub fn encode(records: &[Record]) -> String {
    let mut text = String::new();
    for record in records {
        let json = serde_json::to_string(record).expect("invariant: records are plain data and always serialise");
        text.push_str(&line(&json));
    }
    text
}

/// Reads every line.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Damage> {
    let mut records = Vec::new();
    let mut valid_len = 0usize;
    let mut bad: Option<Damage> = None;
    let mut offset = 0usize;
    for (number, raw) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
        offset += raw.len();
        match (check(raw), &bad) {
            (Ok(_), Some(damage)) => return Err(damage.clone()),
            (Ok(text), None) => {
                // Whole, and not understood: another version's record, and no trace of a crash.
                records.extend(read(number, text).map_err(|why| Damage { line: number + 1, why })?);
                valid_len = offset;
            }
            (Err(why), None) => bad = Some(Damage { line: number + 1, why }),
            (Err(_), Some(_)) => {}
        }
    }
    // A whole first line that is no header is not a torn tail: it is another program's file.
    match bad {
        Some(damage) if valid_len == 0 && bytes.contains(&b'\n') => Err(damage),
        _ => Ok(Parsed { records, valid_len }),
    }
}

pub(crate) fn line(text: &str) -> String {
    format!("{:08x} {text}\n", crc32c::crc32c(text.as_bytes()))
}

fn check(raw: &[u8]) -> Result<&str, String> {
    let text = raw.strip_suffix(b"\n").ok_or("the line has no end")?;
    let text = std::str::from_utf8(text).map_err(|_| "the line is not text")?;
    let (sum, rest) = text.split_at_checked(8).ok_or("the line is too short")?;
    let rest = rest.strip_prefix(' ').ok_or("the line has no checksum")?;
    let sum = u32::from_str_radix(sum, 16).map_err(|_| "the line has no checksum")?;
    if sum != crc32c::crc32c(rest.as_bytes()) {
        return Err("the checksum does not match".to_owned());
    }
    Ok(rest)
}

fn read(number: usize, text: &str) -> Result<Option<Record>, String> {
    if number == 0 {
        return if text == HEADER { Ok(None) } else { Err(format!("the first line is not {HEADER}")) };
    }
    serde_json::from_str(text).map(Some).map_err(|e| format!("not a record of this version: {e}"))
}
