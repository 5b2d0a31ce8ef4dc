//! The settings of the daemon: the add-on's variables, parsed once at the edge and strictly.
//!
//! A value that is not what it should be is refused by name, with what is allowed; nothing is replaced in silence. The
//! table `SETTINGS` is the single list of what is read: the documentation is checked against it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::netplan::{PortChoice, Snat};
use crate::target::{Mode, Policy, WarmTargets};

/// Name, default as text, and meaning of every variable that is read.
pub const SETTINGS: &[(&str, &str, &str)] = &[
    ("WARM_ENI_TARGET", "unset (demand); 1 when another target is set", "whole ENIs of free addresses to keep"),
    ("WARM_IP_TARGET", "unset (0)", "free addresses to keep; overrules the ENI and prefix targets"),
    ("MINIMUM_IP_TARGET", "unset (0)", "addresses to hold at least, used or free"),
    ("WARM_PREFIX_TARGET", "unset (0)", "/28 prefixes without a pod to keep, with prefix delegation"),
    ("MAX_ENI", "the instance type's limit", "ENIs to use at most, the primary included (1 or more)"),
    ("ENABLE_PREFIX_DELEGATION", "false", "fill ENI slots with /28 prefixes instead of single addresses"),
    ("IP_COOLDOWN_PERIOD", "30", "seconds a freed address rests before it is given again"),
    ("AWS_VPC_K8S_CNI_EXTERNALSNAT", "false", "leave source translation to a NAT gateway"),
    ("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "", "comma-separated IPv4 CIDRs whose traffic is never translated"),
    ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "prng", "port choice of source translation: prng, hashrandom or none"),
    ("AWS_VPC_CNI_NODE_PORT_SUPPORT", "true", "keep replies to node ports on the ENI they came in by"),
    ("AWS_VPC_ENI_MTU", "9001", "MTU of the ENIs in bytes (576 to 9001)"),
    ("AWS_VPC_K8S_CNI_VETHPREFIX", "eni", "host veth prefix, 1 to 4 characters that no link of the node begins with"),
    ("ADDITIONAL_ENI_TAGS", "{}", "JSON object of further tags on ENIs we create"),
    ("CLUSTER_NAME", "", "adds the cluster's tags to ENIs we create"),
    ("DISABLE_NETWORK_RESOURCE_PROVISIONING", "false", "never change anything in EC2; serve what the node has"),
    ("ENABLE_IMDS_ONLY_MODE", "false", "never call EC2, not even to read; trust the instance metadata"),
    ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "false", "ENIs in the ENIConfig's subnet; none of the primary's addresses"),
    ("ENABLE_SUBNET_DISCOVERY", "true", "new ENIs in any subnet of the zone tagged kubernetes.io/role/cni"),
    ("MANAGE_UNTAGGED_ENI", "true", "use ENIs that nobody tagged as this node's"),
    ("AWS_MANAGE_ENIS_NON_SCHEDULABLE", "false", "take and give back in EC2 while the node is unschedulable"),
    ("DISABLE_LEAKED_ENI_CLEANUP", "false", "leave unattached ENIs of this cluster alone"),
    ("ENABLE_POD_ENI", "false", "keep one ENI slot free for the trunk of security groups for pods"),
    ("MAX_PODS", "110", "addresses beyond this many are never wanted"),
];

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub policy: Policy,
    pub mode: Mode,
    pub max_eni: Option<u32>,
    pub max_pods: u32,
    pub cooldown_secs: u32,
    pub snat: Snat,
    pub exclude_snat: Vec<Ipv4Net>,
    pub node_port: bool,
    pub mtu: u32,
    pub veth_prefix: String,
    pub eni_tags: BTreeMap<String, String>,
    pub cluster_name: Option<String>,
    pub provisioning: bool,
    /// EC2 is never called; implies no provisioning.
    pub imds_only: bool,
    pub custom_networking: bool,
    pub subnet_discovery: bool,
    pub manage_untagged: bool,
    pub manage_unschedulable: bool,
    pub leaked_cleanup: bool,
    /// Keep a slot free for the trunk ENI.
    pub trunk_reserve: bool,
}

/// A variable with a value that is not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={value:?} is not allowed: {allowed}")]
pub struct SettingError {
    pub variable: &'static str,
    pub value: String,
    pub allowed: String,
}

impl Settings {
    /// Reads every setting through `lookup`, the environment or a test's map. Collects all refusals, so that one start
    /// shows them all.
    pub fn parse(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, Vec<SettingError>> {
        let mut p = Parser { lookup: &lookup, errors: Vec::new() };
        let warm_eni = p.number("WARM_ENI_TARGET", 0, 1_000);
        let warm_ip = p.number("WARM_IP_TARGET", 0, 100_000);
        let minimum_ip = p.number("MINIMUM_IP_TARGET", 0, 100_000);
        let warm_prefix = p.number("WARM_PREFIX_TARGET", 0, 10_000);
        let any = warm_eni.is_some() || warm_ip.is_some() || minimum_ip.is_some() || warm_prefix.is_some();
        let policy = if any {
            Policy::AddOn(WarmTargets {
                warm_eni: warm_eni.unwrap_or(1),
                warm_ip: warm_ip.unwrap_or(0),
                minimum_ip: minimum_ip.unwrap_or(0),
                warm_prefix: warm_prefix.unwrap_or(0),
            })
        } else {
            Policy::Demand
        };
        let prefixes = p.flag("ENABLE_PREFIX_DELEGATION", false);
        let port_choice = p.choice(
            "AWS_VPC_K8S_CNI_RANDOMIZESNAT",
            &[("prng", PortChoice::FullyRandom), ("hashrandom", PortChoice::Random), ("none", PortChoice::Keep)],
        );
        let imds_only = p.flag("ENABLE_IMDS_ONLY_MODE", false);
        let external = p.flag("AWS_VPC_K8S_CNI_EXTERNALSNAT", false);
        let settings = Self {
            policy,
            mode: if prefixes { Mode::Prefixes } else { Mode::Addresses },
            max_eni: p.number("MAX_ENI", 1, 100),
            max_pods: p.number("MAX_PODS", 1, 10_000).unwrap_or(110),
            cooldown_secs: p.number("IP_COOLDOWN_PERIOD", 0, 86_400).unwrap_or(30),
            snat: if external { Snat::External } else { Snat::ToPrimary(port_choice) },
            exclude_snat: p.cidrs("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS"),
            node_port: p.flag("AWS_VPC_CNI_NODE_PORT_SUPPORT", true),
            mtu: p.number("AWS_VPC_ENI_MTU", 576, 9001).unwrap_or(9001),
            veth_prefix: p.veth_prefix(),
            eni_tags: p.tags(),
            cluster_name: p.text("CLUSTER_NAME"),
            provisioning: !p.flag("DISABLE_NETWORK_RESOURCE_PROVISIONING", false) && !imds_only,
            imds_only,
            custom_networking: p.flag("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", false),
            subnet_discovery: p.flag("ENABLE_SUBNET_DISCOVERY", true),
            manage_untagged: p.flag("MANAGE_UNTAGGED_ENI", true),
            manage_unschedulable: p.flag("AWS_MANAGE_ENIS_NON_SCHEDULABLE", false),
            leaked_cleanup: !p.flag("DISABLE_LEAKED_ENI_CLEANUP", false) && !imds_only,
            trunk_reserve: p.flag("ENABLE_POD_ENI", false),
        };
        if p.errors.is_empty() { Ok(settings) } else { Err(p.errors) }
    }

    pub fn cooldown_ms(&self) -> u64 {
        u64::from(self.cooldown_secs) * 1_000
    }
}

struct Parser<'l, L> {
    lookup: &'l L,
    errors: Vec<SettingError>,
}

impl<L: Fn(&str) -> Option<String>> Parser<'_, L> {
    /// Present and not blank; the manifest sets some variables to the empty text to mean "unset".
    fn text(&self, variable: &'static str) -> Option<String> {
        (self.lookup)(variable).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    fn refuse(&mut self, variable: &'static str, value: &str, allowed: impl Display) {
        self.errors.push(SettingError { variable, value: value.to_owned(), allowed: allowed.to_string() });
    }

    fn number(&mut self, variable: &'static str, least: u32, most: u32) -> Option<u32> {
        let value = self.text(variable)?;
        match u32::from_str(&value) {
            Ok(n) if (least..=most).contains(&n) => Some(n),
            _ => {
                self.refuse(variable, &value, format!("a whole number from {least} to {most}"));
                None
            }
        }
    }

    fn flag(&mut self, variable: &'static str, default: bool) -> bool {
        let Some(value) = self.text(variable) else { return default };
        match value.as_str() {
            "1" | "t" | "T" | "TRUE" | "true" | "True" => true,
            "0" | "f" | "F" | "FALSE" | "false" | "False" => false,
            _ => {
                self.refuse(variable, &value, "true or false");
                default
            }
        }
    }

    /// The first choice is the default.
    fn choice<T: Copy>(&mut self, variable: &'static str, choices: &[(&str, T)]) -> T {
        let (_, default) = choices.first().copied().expect("invariant: a choice has a default");
        let Some(value) = self.text(variable) else { return default };
        if let Some((_, chosen)) = choices.iter().find(|(name, _)| *name == value) {
            return *chosen;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.refuse(variable, &value, format!("one of {}", names.join(", ")));
        default
    }

    fn cidrs(&mut self, variable: &'static str) -> Vec<Ipv4Net> {
        let Some(value) = self.text(variable) else { return Vec::new() };
        let mut cidrs = Vec::new();
        for item in value.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            match item.parse::<Ipv4Net>() {
                Ok(cidr) => cidrs.push(cidr.trunc()),
                Err(_) => self.refuse(variable, item, "IPv4 CIDRs such as 10.0.0.0/8, separated by commas"),
            }
        }
        cidrs
    }

    fn veth_prefix(&mut self) -> String {
        let variable = "AWS_VPC_K8S_CNI_VETHPREFIX";
        let Some(value) = self.text(variable) else { return "eni".to_owned() };
        let well_formed = value.len() <= 4 && value.bytes().all(|b| b.is_ascii_alphanumeric());
        // The prefix tells pods' links from the node's own, whose names begin so.
        let of_the_node = ["eth", "ens", "enp", "eno", "enx", "lo", "vlan"].iter().any(|name| name.starts_with(&value));
        if !well_formed || of_the_node {
            self.refuse(
                variable,
                &value,
                "1 to 4 letters or digits that no link of the node begins with (eth, ens, lo…)",
            );
        }
        value
    }

    fn tags(&mut self) -> BTreeMap<String, String> {
        let variable = "ADDITIONAL_ENI_TAGS";
        let Some(value) = self.text(variable) else { return BTreeMap::new() };
        match parse_tags(&value) {
            Ok(tags) => tags,
            Err(allowed) => {
                self.refuse(variable, &value, allowed);
                BTreeMap::new()
            }
        }
    }
}

/// A flat JSON object of texts; keys that name our own ownership tags are refused, since they decide what may be deleted.
fn parse_tags(text: &str) -> Result<BTreeMap<String, String>, String> {
    let tags: BTreeMap<String, String> =
        serde_json::from_str(text).map_err(|e| format!("a JSON object of texts such as {{\"team\":\"net\"}} ({e})"))?;
    match tags.keys().find(|key| key.contains("k8s.amazonaws.com") || key.starts_with("aws:")) {
        Some(key) => Err(format!("tags without reserved keys (found {key:?})")),
        None => Ok(tags),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vars: &[(&str, &str)]) -> Result<Settings, Vec<SettingError>> {
        Settings::parse(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn nothing_set_means_demand_and_the_add_ons_other_defaults() {
        let s = parse(&[]).unwrap();
        assert_eq!(s.policy, Policy::Demand);
        assert_eq!((s.cooldown_secs, s.mtu, s.veth_prefix.as_str()), (30, 9001, "eni"));
        assert_eq!(s.snat, Snat::ToPrimary(PortChoice::FullyRandom));
    }

    #[test]
    fn any_warm_variable_switches_to_the_add_ons_arithmetic() {
        let s = parse(&[("WARM_IP_TARGET", "5")]).unwrap();
        let expected = WarmTargets { warm_eni: 1, warm_ip: 5, minimum_ip: 0, warm_prefix: 0 };
        assert_eq!(s.policy, Policy::AddOn(expected));
        assert_eq!(parse(&[("WARM_IP_TARGET", "")]).unwrap().policy, Policy::Demand, "empty is unset");
    }

    #[test]
    fn every_bad_value_is_named_with_what_is_allowed() {
        let bad = [
            ("WARM_IP_TARGET", "-5"),
            ("MAX_ENI", "0"),
            ("ENABLE_PREFIX_DELEGATION", "yes"),
            ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "dice"),
            ("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.0.0.0/33"),
            ("AWS_VPC_ENI_MTU", "9002"),
            ("AWS_VPC_K8S_CNI_VETHPREFIX", "en"),
            ("ADDITIONAL_ENI_TAGS", "{\"a\":1}"),
            ("IP_COOLDOWN_PERIOD", "soon"),
        ];
        for (variable, value) in bad {
            let errors = parse(&[(variable, value)]).unwrap_err();
            assert_eq!(errors.len(), 1, "{variable}");
            let text = errors[0].to_string();
            assert!(text.contains(variable) && text.contains("not allowed: "), "{text}");
        }
        assert_eq!(parse(&bad).unwrap_err().len(), bad.len(), "one start shows them all");
    }

    #[test]
    fn the_table_lists_every_variable_that_is_read() {
        let asked = std::cell::RefCell::new(std::collections::BTreeSet::new());
        let _ = Settings::parse(|name| {
            asked.borrow_mut().insert(name.to_owned());
            None
        });
        let listed: std::collections::BTreeSet<String> = SETTINGS.iter().map(|(n, _, _)| (*n).to_owned()).collect();
        assert_eq!(*asked.borrow(), listed);
    }
}
