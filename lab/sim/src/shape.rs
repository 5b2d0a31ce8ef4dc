//! Kinds of fresh nodes, and the least that EC2 must be asked so that all their pods are served.

use std::collections::BTreeMap;

use flatwire_core::limits;
use flatwire_core::settings::Settings;
use flatwire_core::target::PREFIX_SIZE;

/// A fresh node: its type, what it is launched with, and the pods it is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub instance_type: &'static str,
    pub prefixes: bool,
    /// /28s that the primary ENI holds from birth.
    pub at_launch: u32,
    pub pods: u32,
}

/// EC2 calls by action.
pub type Tariff = BTreeMap<String, u64>;

impl Shape {
    pub const fn singles(instance_type: &'static str, pods: u32) -> Self {
        Self { instance_type, prefixes: false, at_launch: 0, pods }
    }

    pub const fn prefixes(instance_type: &'static str, at_launch: u32, pods: u32) -> Self {
        Self { instance_type, prefixes: true, at_launch, pods }
    }

    pub fn settings(&self) -> Settings {
        let delegation = |name: &str| (name == "ENABLE_PREFIX_DELEGATION").then(|| self.prefixes.to_string());
        Settings::parse(delegation).expect("invariant: true and false are allowed")
    }

    /// What the limits of the type leave no way around: one call fills the primary ENI as far as it is wanted, every further
    /// ENI is created full, attached, and told to go with its instance; where it may be made is asked once.
    pub fn minimum(&self) -> Tariff {
        let kind = limits::lookup(self.instance_type).expect("invariant: a shape is of a known type");
        let size = if self.prefixes { PREFIX_SIZE } else { 1 };
        let slots = kind.ipv4_per_eni - 1;
        let missing = self.pods.saturating_sub(self.at_launch * PREFIX_SIZE);
        if missing == 0 {
            return Tariff::new();
        }
        let on_primary = (slots - self.at_launch) * size;
        let enis = missing.saturating_sub(on_primary).div_ceil(slots * size);
        let calls = [
            ("AssignPrivateIpAddresses", u32::from(on_primary > 0)),
            ("AttachNetworkInterface", enis),
            ("CreateNetworkInterface", enis),
            ("DescribeSubnets", 1),
            ("ModifyNetworkInterfaceAttribute", enis),
        ];
        calls
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(action, count)| (action.to_owned(), u64::from(count)))
            .collect()
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mode = if self.prefixes { "prefixes" } else { "singles" };
        write!(f, "{}, {mode}, {} pods", self.instance_type, self.pods)?;
        if self.at_launch > 0 { write!(f, ", {} at launch", self.at_launch) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(shape: &Shape) -> String {
        shape.minimum().iter().map(|(action, count)| format!("{}{count}", &action[..2])).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_minimum_follows_from_the_limits() {
        assert_eq!(text(&Shape::singles("m5.large", 9)), "As1 De1");
        assert_eq!(text(&Shape::singles("m5.large", 10)), "As1 At1 Cr1 De1 Mo1");
        assert_eq!(text(&Shape::singles("m5.4xlarge", 110)), "As1 At3 Cr3 De1 Mo3");
        assert_eq!(text(&Shape::prefixes("m5.large", 0, 110)), "As1 De1");
        assert_eq!(text(&Shape::prefixes("m5.large", 7, 110)), "");
        assert_eq!(text(&Shape::prefixes("m5.large", 1, 110)), "As1 De1");
    }
}
