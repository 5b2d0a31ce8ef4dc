//! Reading variables strictly: a value is what it should be, or is refused by name, with what is allowed.
//!
//! Leniently, for a take-over of a node whose variables the add-on put up with, a bad value is a warning and the add-on's
//! own way out is taken. What the add-on itself refuses to start with is refused either way.

use std::fmt::{self, Display};
use std::str::FromStr;

/// A variable with a value that stops the start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    #[error("{variable}={value:?} is not allowed: {allowed}")]
    NotAllowed { variable: &'static str, value: String, allowed: String },
    #[error("{variable}={value:?} is not supported by this version: {what}")]
    NotSupported { variable: &'static str, value: String, what: &'static str },
}

impl SettingError {
    pub fn variable(&self) -> &'static str {
        match self {
            Self::NotAllowed { variable, .. } | Self::NotSupported { variable, .. } => variable,
        }
    }
}

/// A bad value that a lenient reading put up with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leniency {
    pub error: SettingError,
    /// What is used in place of the value.
    pub used: String,
}

impl fmt::Display for Leniency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {} is used instead, as the add-on does", self.error, self.used)
    }
}

/// Reads variables through `lookup`, the environment or a test's map, and collects everything that is wrong with them, so
/// that one start shows it all.
pub struct Reader<L> {
    lookup: L,
    lenient: bool,
    refusals: Vec<SettingError>,
    leniencies: Vec<Leniency>,
}

impl<L: Fn(&str) -> Option<String>> Reader<L> {
    pub fn new(lookup: L) -> Self {
        Self { lookup, lenient: false, refusals: Vec::new(), leniencies: Vec::new() }
    }

    pub fn lenient(mut self, lenient: bool) -> Self {
        self.lenient = lenient;
        self
    }

    /// What was put up with, or every refusal.
    pub fn finish(self) -> Result<Vec<Leniency>, Vec<SettingError>> {
        if self.refusals.is_empty() { Ok(self.leniencies) } else { Err(self.refusals) }
    }

    /// Present and not blank; the manifest sets some variables to the empty text to mean "unset".
    pub fn text(&self, variable: &'static str) -> Option<String> {
        (self.lookup)(variable).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    /// A value that the add-on puts up with, by using something else.
    pub fn refuse(&mut self, variable: &'static str, value: &str, allowed: impl Display, used: impl Display) {
        let error = SettingError::NotAllowed { variable, value: value.to_owned(), allowed: allowed.to_string() };
        if self.lenient {
            self.leniencies.push(Leniency { error, used: used.to_string() });
        } else {
            self.refusals.push(error);
        }
    }

    /// A value that the add-on does not start with either.
    pub fn refuse_always(&mut self, variable: &'static str, value: &str, allowed: impl Display) {
        let (value, allowed) = (value.to_owned(), allowed.to_string());
        self.refusals.push(SettingError::NotAllowed { variable, value, allowed });
    }

    /// A number, or `otherwise` where a lenient reading meets a bad one.
    pub fn number(&mut self, variable: &'static str, least: u32, most: u32, otherwise: Option<u32>) -> Option<u32> {
        let value = self.text(variable)?;
        match u32::from_str(&value) {
            Ok(n) if (least..=most).contains(&n) => Some(n),
            _ => {
                let used = otherwise.map_or("the default".to_owned(), |n| n.to_string());
                self.refuse(variable, &value, format!("a whole number from {least} to {most}"), used);
                otherwise
            }
        }
    }

    /// A number the add-on does not start without.
    pub fn strict_number(&mut self, variable: &'static str, least: u32, most: u32, default: u32) -> u32 {
        let Some(value) = self.text(variable) else { return default };
        match u32::from_str(&value) {
            Ok(n) if (least..=most).contains(&n) => n,
            _ => {
                self.refuse_always(variable, &value, format!("a whole number from {least} to {most}"));
                default
            }
        }
    }

    pub fn flag(&mut self, variable: &'static str, default: bool) -> bool {
        let Some(value) = self.text(variable) else { return default };
        match value.as_str() {
            "1" | "t" | "T" | "TRUE" | "true" | "True" => true,
            "0" | "f" | "F" | "FALSE" | "false" | "False" => false,
            _ => {
                self.refuse(variable, &value, "true or false", default);
                default
            }
        }
    }

    /// The first choice is the default.
    pub fn choice<T: Copy>(&mut self, variable: &'static str, choices: &[(&str, T)]) -> T {
        let (name, default) = choices.first().copied().expect("invariant: a choice has a default");
        let Some(value) = self.text(variable) else { return default };
        if let Some((_, chosen)) = choices.iter().find(|(name, _)| *name == value) {
            return *chosen;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.refuse(variable, &value, format!("one of {}", names.join(", ")), name);
        default
    }

    /// A variable of a feature that is not built: its default is accepted, anything else is not passed over in silence.
    pub fn unsupported(
        &mut self,
        variable: &'static str,
        default: &str,
        what: &'static str,
        is_default: impl Fn(&str) -> bool,
    ) {
        let Some(value) = self.text(variable).filter(|value| !is_default(value)) else { return };
        let error = SettingError::NotSupported { variable, value, what };
        if self.lenient {
            let used = if default.is_empty() { "nothing".to_owned() } else { format!("{default:?}") };
            self.leniencies.push(Leniency { error, used });
        } else {
            self.refusals.push(error);
        }
    }

    /// The same of a switch that is off by default.
    pub fn unsupported_flag(&mut self, variable: &'static str, what: &'static str) {
        if self.flag(variable, false) {
            self.unsupported(variable, "false", what, |_| false);
        }
    }
}
