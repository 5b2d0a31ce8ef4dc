//! The parameters of one Query API request: flattened names (`Filter.1.Value.2`), read once, and none left over.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::str::FromStr;

use ipnet::Ipv4Net;

use crate::error::{ApiError, Kind};

/// Entries that one list may have before the request is refused as a whole.
const LIST_MAX: usize = 1_000;

/// The decoded pairs of a form or query string. Of a name given twice, the last value counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params(BTreeMap<String, String>);

impl Params {
    pub fn new<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }

    /// From `application/x-www-form-urlencoded` text.
    pub fn decode(text: &str) -> Self {
        Self::new(crate::sigv4::decode_pairs(text))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn action(&self) -> &str {
        self.get("Action").unwrap_or("")
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// Names that belong to the protocol and not to the action; presigned requests carry the signature among them.
const PROTOCOL: [&str; 13] = [
    "Action",
    "Version",
    "AWSAccessKeyId",
    "SignatureVersion",
    "SignatureMethod",
    "Timestamp",
    "X-Amz-Algorithm",
    "X-Amz-Credential",
    "X-Amz-Date",
    "X-Amz-Expires",
    "X-Amz-Security-Token",
    "X-Amz-Signature",
    "X-Amz-SignedHeaders",
];

/// Reads parameters and remembers which were read, so that `end` can refuse the unknown ones. Every action reads all it
/// knows and calls `end` before it changes anything.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    params: &'a Params,
    prefix: String,
    used: Rc<RefCell<BTreeSet<&'a str>>>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(params: &'a Params) -> Self {
        Self { params, prefix: String::new(), used: Rc::default() }
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(crate) fn opt(&self, name: &str) -> Option<&'a str> {
        let (key, value) = self.params.0.get_key_value(&self.name(name))?;
        self.used.borrow_mut().insert(key);
        Some(value)
    }

    pub(crate) fn required(&self, name: &str) -> Result<&'a str, ApiError> {
        self.opt(name).filter(|v| !v.is_empty()).ok_or_else(|| ApiError::missing(&self.name(name)))
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.opt(name).unwrap_or("").to_owned()
    }

    pub(crate) fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.opt(name) {
            None => Ok(None),
            Some("true" | "True" | "TRUE" | "1") => Ok(Some(true)),
            Some("false" | "False" | "FALSE" | "0") => Ok(Some(false)),
            Some(other) => {
                Err(ApiError::value(format!("Invalid value '{other}' for {}. Expecting a boolean.", self.name(name))))
            }
        }
    }

    /// A count that must be positive where it is given.
    pub(crate) fn count(&self, name: &str) -> Result<Option<u32>, ApiError> {
        match self.number(name)? {
            Some(0) => Err(ApiError::bad_value(&self.name(name), 0)),
            other => Ok(other),
        }
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u32>, ApiError> {
        self.parsed(name, |parameter, value| ApiError::bad_value(parameter, value))
    }

    pub(crate) fn address(&self, name: &str) -> Result<Option<Ipv4Addr>, ApiError> {
        self.parsed(name, |_, value| bad_address(value))
    }

    /// A CIDR block; bits below the mask are EC2's to clear or refuse, so they are left as given.
    pub(crate) fn cidr(&self, name: &str) -> Result<Option<Ipv4Net>, ApiError> {
        self.parsed(name, |parameter, value| {
            ApiError::value(format!(
                "Value ({value}) for parameter {parameter} is invalid. This is not a valid CIDR block."
            ))
        })
    }

    fn parsed<T: FromStr>(&self, name: &str, refuse: impl Fn(&str, &str) -> ApiError) -> Result<Option<T>, ApiError> {
        match self.opt(name) {
            None => Ok(None),
            Some(value) => value.parse().map(Some).map_err(|_| refuse(&self.name(name), value)),
        }
    }

    pub(crate) fn required_id<T: TryFrom<String>>(&self, kind: Kind, name: &str) -> Result<T, ApiError> {
        id(kind, self.required(name)?)
    }

    pub(crate) fn opt_id<T: TryFrom<String>>(&self, kind: Kind, name: &str) -> Result<Option<T>, ApiError> {
        self.opt(name).map(|text| id(kind, text)).transpose()
    }

    pub(crate) fn ids<T: TryFrom<String>>(&self, kind: Kind, name: &str) -> Result<Vec<T>, ApiError> {
        self.list(name)?.into_iter().map(|text| id(kind, text)).collect()
    }

    /// `Name.1`, `Name.2`, … in their order; gaps are allowed, as EC2 allows them.
    pub(crate) fn list(&self, name: &str) -> Result<Vec<&'a str>, ApiError> {
        Ok(self.indexed(name)?.into_iter().filter_map(|index| self.opt(&format!("{name}.{index}"))).collect())
    }

    pub(crate) fn addresses(&self, name: &str) -> Result<Vec<Ipv4Addr>, ApiError> {
        self.list(name)?.into_iter().map(|text| text.parse().map_err(|_| bad_address(text))).collect()
    }

    /// `Name.1.Field`, `Name.2.Field`, …: one reader per entry.
    pub(crate) fn structs(&self, name: &str) -> Result<Vec<Reader<'a>>, ApiError> {
        let entries = self.indexed(name)?;
        Ok(entries.into_iter().map(|index| self.at(&format!("{name}.{index}."))).collect())
    }

    /// The fields of a structure: `Name.Field`.
    pub(crate) fn at(&self, prefix: &str) -> Reader<'a> {
        Reader { params: self.params, prefix: self.name(prefix), used: Rc::clone(&self.used) }
    }

    fn indexed(&self, name: &str) -> Result<BTreeSet<u32>, ApiError> {
        let start = self.name(&format!("{name}."));
        let mut indices = BTreeSet::new();
        for key in self.params.0.keys().filter_map(|key| key.strip_prefix(&start)) {
            let index = key.split('.').next().unwrap_or("");
            if let Ok(index) = index.parse::<u32>() {
                indices.insert(index);
            }
        }
        if indices.len() > LIST_MAX {
            return Err(ApiError::value(format!("The parameter {start}N has more than {LIST_MAX} entries.")));
        }
        Ok(indices)
    }

    /// Parameters that have no meaning in the lab and do no harm when accepted.
    pub(crate) fn ignore(&self, names: &[&str]) {
        for key in self.params.0.keys() {
            let local = key.strip_prefix(&self.prefix);
            let first = local.map(|rest| rest.split('.').next().unwrap_or(""));
            if first.is_some_and(|first| names.contains(&first)) {
                self.used.borrow_mut().insert(key);
            }
        }
    }

    /// Refuses what nobody read: EC2 rejects unknown parameters rather than ignoring them.
    pub(crate) fn end(&self) -> Result<(), ApiError> {
        let used = self.used.borrow();
        let left = self.params.0.keys().find(|key| !used.contains(key.as_str()) && !PROTOCOL.contains(&key.as_str()));
        match left {
            None => Ok(()),
            Some(name) => Err(ApiError::new("UnknownParameter", format!("The parameter {name} is not recognized"))),
        }
    }

    /// `end` for an action that has `DryRun`: with it set, a request that may be made stops here.
    pub(crate) fn end_or_dry_run(&self) -> Result<(), ApiError> {
        let dry = self.bool("DryRun")?.unwrap_or(false);
        self.end()?;
        if dry { Err(ApiError::dry_run()) } else { Ok(()) }
    }
}

pub(crate) fn bad_address(text: &str) -> ApiError {
    ApiError::value(format!("invalid value for parameter address: {text}"))
}

fn id<T: TryFrom<String>>(kind: Kind, text: &str) -> Result<T, ApiError> {
    kind.check(text)?;
    T::try_from(text.to_owned()).map_err(|_| kind.not_found(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(pairs: &[(&str, &str)]) -> Params {
        Params::new(pairs.iter().copied())
    }

    #[test]
    fn lists_and_structures_come_in_order_and_nothing_is_left() {
        let given = params(&[
            ("Action", "X"),
            ("Filter.1.Name", "a"),
            ("Filter.1.Value.1", "x"),
            ("Filter.10.Name", "c"),
            ("Filter.2.Name", "b"),
            ("Id.2", "two"),
            ("Id.1", "one"),
        ]);
        let reader = Reader::new(&given);
        assert_eq!(reader.list("Id").unwrap(), ["one", "two"]);
        let filters = reader.structs("Filter").unwrap();
        let names: Vec<_> = filters.iter().map(|f| f.required("Name").unwrap()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(reader.end().unwrap_err().message, "The parameter Filter.1.Value.1 is not recognized");
        assert_eq!(filters[0].list("Value").unwrap(), ["x"]);
        reader.end().unwrap();
    }

    #[test]
    fn values_are_refused_in_ec2s_words() {
        let given = params(&[("Count", "-1"), ("Zero", "0"), ("Flag", "maybe"), ("Ip", "banana"), ("Empty", "")]);
        let reader = Reader::new(&given);
        let table = [
            (reader.count("Count").map(drop), "InvalidParameterValue"),
            (reader.count("Zero").map(drop), "InvalidParameterValue"),
            (reader.bool("Flag").map(drop), "InvalidParameterValue"),
            (reader.address("Ip").map(drop), "InvalidParameterValue"),
            (reader.required("Empty").map(drop), "MissingParameter"),
            (reader.required("Absent").map(drop), "MissingParameter"),
        ];
        for (result, code) in table {
            assert_eq!(result.unwrap_err().code, code);
        }
    }

    #[test]
    fn a_dry_run_stops_after_the_parameters_are_read() {
        let given = params(&[("DryRun", "true"), ("Odd", "1")]);
        let reader = Reader::new(&given);
        assert_eq!(reader.end_or_dry_run().unwrap_err().code, "UnknownParameter");
        reader.ignore(&["Odd"]);
        assert_eq!(reader.end_or_dry_run().unwrap_err().status, 412);
    }
}
