//! Identities as types, parsed at the edge. A value that exists is well formed; nothing here decides anything.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text at the edge that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not {expected}")]
pub struct IdError {
    pub value: String,
    pub expected: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn new(value: impl Into<String>) -> Result<Self, IdError> {
                let value = value.into();
                let rest = value.strip_prefix($prefix).unwrap_or("");
                if rest.is_empty() || !rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                    return Err(IdError { value, expected: $expected });
                }
                Ok(Self(value))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                Self::new(s)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(s: String) -> Result<Self, IdError> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

text_id!(
    /// An elastic network interface.
    EniId, "eni-", "an ENI id (eni-…)"
);
text_id!(
    /// The tie between an ENI and an instance.
    AttachmentId, "eni-attach-", "an attachment id (eni-attach-…)"
);
text_id!(InstanceId, "i-", "an instance id (i-…)");
text_id!(SubnetId, "subnet-", "a subnet id (subnet-…)");
text_id!(VpcId, "vpc-", "a VPC id (vpc-…)");
text_id!(SecurityGroupId, "sg-", "a security group id (sg-…)");

/// A hardware address, printed as EC2 and the kernel print it: lower case, colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for MacAddress {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        let bad = || IdError { value: s.to_owned(), expected: "a MAC address (six hex pairs with colons)" };
        let mut bytes = [0u8; 6];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = IdError;
    fn try_from(s: String) -> Result<Self, IdError> {
        s.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

/// One interface of one sandbox: what CNI calls an attachment, and the add-on its IPAM key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SandboxId {
    pub network: String,
    pub container_id: String,
    pub if_name: String,
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container_id, self.if_name)
    }
}

/// The pod a sandbox belongs to; empty texts where the runtime did not say.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Position of an ENI on its network card; 0 on card 0 is the primary ENI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceIndex(pub u32);

impl DeviceIndex {
    pub const PRIMARY: Self = Self(0);
}

impl fmt::Display for DeviceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A kernel routing table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RouteTable(pub u32);

impl RouteTable {
    pub const MAIN: Self = Self(254);

    /// The table of an ENI, by the add-on's rule: the primary uses main, card 0 device d uses d + 1, other cards
    /// 10000 + d + 100 per card.
    pub fn of_eni(card: u32, device: DeviceIndex) -> Self {
        match (card, device.0) {
            (0, 0) => Self::MAIN,
            (0, d) => Self(d + 1),
            (c, d) => Self(10_000 + d + 100 * c),
        }
    }
}

impl fmt::Display for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MAIN => f.write_str("main"),
            Self(n) => write!(f, "{n}"),
        }
    }
}

/// Wall-clock time in milliseconds since the Unix epoch. Core gets it as a value and never asks for it; wall time and not
/// a monotonic clock, because cool-downs must survive a restart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to `self`; 0 if the clock went backwards.
    pub fn since_ms(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// UTC as RFC 3339 writes it, to the second: `2026-01-31T12:00:00Z`.
    pub fn rfc3339(self) -> String {
        format!("{}Z", self.civil())
    }

    /// The same to the millisecond.
    pub fn rfc3339_ms(self) -> String {
        format!("{}.{:03}Z", self.civil(), self.0 % 1_000)
    }

    /// Days to a civil date, after Howard Hinnant: years begin in March, so that the leap day is the last. A date library
    /// would be a dependency for these lines alone.
    fn civil(self) -> String {
        let seconds = self.0 / 1_000;
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_parsed_at_the_edge() {
        assert!(EniId::new("eni-0a1b").is_ok());
        assert!(EniId::new("eni-").is_err());
        assert!(EniId::new("i-0a1b").is_err());
        assert!(InstanceId::new("i-0 1").is_err());
        assert_eq!("0A:00:00:00:00:ff".parse::<MacAddress>().unwrap().to_string(), "0a:00:00:00:00:ff");
        for bad in ["", "0a:00:00:00:00", "0a:00:00:00:00:00:00", "0a-00-00-00-00-00", "+a:00:00:00:00:00x"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn dates_are_civil() {
        assert_eq!(Time(0).rfc3339(), "1970-01-01T00:00:00Z");
        assert_eq!(Time(1_709_210_096_000).rfc3339(), "2024-02-29T12:34:56Z");
        assert_eq!(Time(1_795_305_599_999).rfc3339(), "2026-11-21T23:59:59Z");
        assert_eq!(Time(1_795_305_599_999).rfc3339_ms(), "2026-11-21T23:59:59.999Z");
    }

    #[test]
    fn route_tables_follow_the_add_on() {
        assert_eq!(RouteTable::of_eni(0, DeviceIndex(0)), RouteTable::MAIN);
        assert_eq!(RouteTable::of_eni(0, DeviceIndex(1)), RouteTable(2));
        assert_eq!(RouteTable::of_eni(2, DeviceIndex(1)), RouteTable(10_201));
    }
}
