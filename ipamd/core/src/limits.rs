//! What each EC2 instance type can carry, as data: the table behind `DescribeInstanceTypes`.
//!
//! Source: `ipamd/core/data/instance-types.tsv`, whose heading names its origin. The table ages as AWS adds types, so
//! a type that is not in it is no error here: the caller asks EC2 instead.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use crate::ports::InstanceLimits;

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceType {
    pub name: &'static str,
    pub hypervisor: Hypervisor,
    pub bare_metal: bool,
    pub current_generation: bool,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// ENIs on the default network card, the primary included.
    pub max_enis: u32,
    /// IPv4 slots of an ENI, its own primary address included.
    pub ipv4_per_eni: u32,
    pub ipv6_per_eni: u32,
    pub ipv6: bool,
    /// ENIs on each network card, by card index; never empty.
    pub cards: Vec<u32>,
    /// As EC2 names them: `x86_64`, `arm64`, …
    pub architectures: Vec<&'static str>,
}

/// What runs beneath the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hypervisor {
    Nitro,
    Xen,
    /// Bare metal.
    None,
}

impl InstanceType {
    pub fn limits(&self) -> InstanceLimits {
        InstanceLimits {
            instance_type: self.name.to_owned(),
            max_enis: self.max_enis,
            ipv4_per_eni: self.ipv4_per_eni,
            ipv6_per_eni: self.ipv6_per_eni,
            prefixes: self.takes_prefixes(),
        }
    }

    /// Prefix delegation needs Nitro or bare metal.
    pub fn takes_prefixes(&self) -> bool {
        self.hypervisor == Hypervisor::Nitro || self.bare_metal
    }
}

/// The row of one type, `None` if the table does not know it.
pub fn lookup(instance_type: &str) -> Option<&'static InstanceType> {
    TABLE.get(instance_type)
}

/// Every row, by name.
pub fn all() -> impl Iterator<Item = &'static InstanceType> {
    TABLE.values()
}

static TABLE: LazyLock<BTreeMap<&'static str, InstanceType>> = LazyLock::new(|| {
    let text = include_str!("../data/instance-types.tsv");
    let rows = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    rows.map(|line| {
        let row = parse(line).expect("invariant: the embedded table is well formed; a test reads every row");
        (row.name, row)
    })
    .collect()
});

fn parse(line: &'static str) -> Option<InstanceType> {
    let mut fields = line.split('\t');
    let row = InstanceType {
        name: fields.next()?,
        hypervisor: match fields.next()? {
            "nitro" => Hypervisor::Nitro,
            "xen" => Hypervisor::Xen,
            "none" => Hypervisor::None,
            _ => return None,
        },
        bare_metal: yes(fields.next()?)?,
        current_generation: yes(fields.next()?)?,
        vcpus: fields.next()?.parse().ok()?,
        memory_mib: fields.next()?.parse().ok()?,
        max_enis: fields.next()?.parse().ok()?,
        ipv4_per_eni: fields.next()?.parse().ok()?,
        ipv6_per_eni: fields.next()?.parse().ok()?,
        ipv6: yes(fields.next()?)?,
        cards: fields.next()?.split(',').map(|count| count.parse().ok()).collect::<Option<_>>()?,
        architectures: fields.next()?.split(',').collect(),
    };
    fields.next().is_none().then_some(row)
}

fn yes(field: &str) -> Option<bool> {
    match field {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_types_have_the_published_limits() {
        let table = [
            ("t3.nano", 2, 2),
            ("t3.small", 3, 4),
            ("m5.large", 3, 10),
            ("m5.4xlarge", 8, 30),
            ("m5.24xlarge", 15, 50),
            ("p5.48xlarge", 2, 50),
            ("c8a.48xlarge", 24, 64),
        ];
        for (name, enis, ipv4) in table {
            let limits = lookup(name).unwrap().limits();
            assert_eq!((limits.max_enis, limits.ipv4_per_eni), (enis, ipv4), "{name}");
            assert!(limits.prefixes, "{name}");
        }
        assert_eq!(lookup("m5.huge"), None);
        assert_eq!(lookup("# type"), None);
    }

    #[test]
    fn prefixes_need_nitro_or_bare_metal() {
        assert!(!lookup("t2.micro").unwrap().limits().prefixes);
        assert!(lookup("m5.metal").unwrap().limits().prefixes);
    }

    #[test]
    fn every_row_is_whole_and_in_order() {
        let text = include_str!("../data/instance-types.tsv");
        let names: Vec<_> = text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split('\t').next()).collect();
        assert!(names.is_sorted());
        assert_eq!(all().count(), names.len());
        for row in all() {
            assert!(row.max_enis >= 1 && row.ipv4_per_eni >= 1, "{row:?}");
            assert!(row.cards.contains(&row.max_enis), "{row:?}");
        }
        assert_eq!(lookup("p4d.24xlarge").unwrap().cards, [15, 15, 15, 15]);
    }
}
