//! The settings of the daemon: the add-on's variables, parsed once at the edge and strictly.
//!
//! A value that is not what it should be is refused by name, with what is allowed; nothing is replaced in silence, and
//! nothing that asks for a feature which is not built is passed over. The table `SETTINGS` is the single list of what is
//! read here: the documentation is checked against it. Where the daemon's files and sockets are is `ipamd/src/config.rs`.

mod reader;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use reader::{Leniency, Reader, SettingError};

use crate::families::Families;
use crate::netplan::{Marks, PathMtus, PortChoice, Snat};
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
    ("AWS_EXTERNAL_SERVICE_CIDRS", "", "comma-separated IPv4 CIDRs that pods of every ENI reach by the main table"),
    (
        "AWS_VPC_K8S_CNI_CONNMARK",
        "0x80",
        "mark of what leaves by the primary ENI; bits of 0x10ff, of which 5 stay free",
    ),
    ("FLATWIRE_OUTSIDE_MTU", "1500", "largest packet on ways out of the VPC; TCP of pods is held to it (576 to 9001)"),
    ("FLATWIRE_PEERED_MTU", "8500", "the same for private CIDRs that are excluded from translation (576 to 9001)"),
    ("FLATWIRE_BLOCK_IMDS", "false", "keep pods away from the instance metadata; pods on the host's network reach it"),
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
    ("ENABLE_IPv4", "true", "pods have IPv4 addresses"),
    (
        "ENABLE_IPv6",
        "false",
        "pods have IPv6 addresses, beside IPv4 ones (dual stack) or, with ENABLE_IPv4=false, instead of them",
    ),
    ("ENABLE_V4_EGRESS", "true", "pods with IPv6 only reach IPv4 destinations, translated to the node's address"),
    ("ENABLE_V6_EGRESS", "false", "not supported yet: IPv6 to the outside from IPv4 pods; dual stack does more"),
    ("ENABLE_MULTI_NIC", "false", "not supported yet: network cards above 0"),
    ("POD_SECURITY_GROUP_ENFORCING_MODE", "strict", "not supported yet: security groups for pods"),
];

/// Variables of the add-on that are accepted with any value and change nothing, and why.
pub const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("VPC_CNI_VERSION", "the daemon calls AWS under its own name and version"),
    ("AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER", "the add-on does not read it any more; rp_filter of ENIs is always loose"),
    ("ENABLE_NFTABLES", "the add-on does not read it any more; there is nothing but nftables"),
];

/// What a node may have for itself, as a label or an annotation `flatwire.io/NAME`, and the variable it stands for.
pub const PER_NODE: &[(&str, &str)] = &[
    ("warm-eni-target", "WARM_ENI_TARGET"),
    ("warm-ip-target", "WARM_IP_TARGET"),
    ("minimum-ip-target", "MINIMUM_IP_TARGET"),
    ("warm-prefix-target", "WARM_PREFIX_TARGET"),
    ("max-eni", "MAX_ENI"),
    ("max-pods", "MAX_PODS"),
    ("ip-cooldown-period", "IP_COOLDOWN_PERIOD"),
];

/// The settings that a node may have for itself, as they came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizing {
    pub policy: Policy,
    pub max_eni: Option<u32>,
    pub max_pods: u32,
    pub cooldown_secs: u32,
}

/// What a node's own values have come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnSizing {
    pub sizing: Sizing,
    /// Variables whose own value is in force.
    pub held: BTreeSet<&'static str>,
    pub refused: Vec<SettingError>,
}

impl Sizing {
    /// What follows from a node's own values, by variable, over the environment's. A value that is not allowed is as if it
    /// were not there; values that do not go together with the environment's all are. Each refusal is handed back.
    pub fn of_node(
        own: &BTreeMap<&'static str, String>,
        environment: impl Fn(&str) -> Option<String>,
        lenient: bool,
    ) -> OwnSizing {
        let mut refused = Vec::new();
        let mut allowed = own.clone();
        allowed.retain(|variable, value| match Settings::parse(|name| (name == *variable).then(|| value.clone())) {
            Ok(_) => true,
            Err(errors) => {
                refused.extend(errors);
                false
            }
        });
        let over = |own: &BTreeMap<&'static str, String>| {
            let mut reader = Reader::new(|name: &str| own.get(name).cloned().or_else(|| environment(name)));
            reader = reader.lenient(lenient);
            let sizing = Settings::read(&mut reader).sizing();
            reader.finish().map(|_| sizing)
        };
        let sizing = over(&allowed).or_else(|errors| {
            refused.extend(errors);
            allowed.clear();
            over(&allowed)
        });
        let sizing = sizing.expect("invariant: the daemon does not start with an environment that is refused");
        OwnSizing { sizing, held: allowed.into_keys().collect(), refused }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub policy: Policy,
    pub mode: Mode,
    pub families: Families,
    pub max_eni: Option<u32>,
    pub max_pods: u32,
    pub cooldown_secs: u32,
    pub snat: Snat,
    pub exclude_snat: Vec<Ipv4Net>,
    pub external_services: Vec<Ipv4Net>,
    pub marks: Marks,
    pub path_mtus: PathMtus,
    pub block_imds: bool,
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

impl Settings {
    /// Reads every setting through `lookup`, the environment or a test's map, strictly. Collects all refusals.
    pub fn parse(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, Vec<SettingError>> {
        let mut reader = Reader::new(lookup);
        let settings = Self::read(&mut reader);
        reader.finish().map(|_| settings)
    }

    /// The settings as the reader gives them; they count only if it then finishes without a refusal.
    pub fn read<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> Self {
        not_supported(r);
        let custom_networking = r.flag("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", false);
        let families = families(r, custom_networking);
        // What the add-on uses where it cannot read the value.
        let warm_eni = r.number("WARM_ENI_TARGET", 0, 1_000, Some(1));
        let warm_ip = r.number("WARM_IP_TARGET", 0, 100_000, Some(0));
        let minimum_ip = r.number("MINIMUM_IP_TARGET", 0, 100_000, Some(0));
        let warm_prefix = r.number("WARM_PREFIX_TARGET", 0, 10_000, Some(0));
        let prefixes = r.flag("ENABLE_PREFIX_DELEGATION", false);
        let targets = [warm_ip, minimum_ip, warm_prefix];
        if prefixes && targets.iter().any(Option::is_some) && targets.iter().flatten().all(|target| *target == 0) {
            let allowed = "with prefix delegation WARM_PREFIX_TARGET, WARM_IP_TARGET or MINIMUM_IP_TARGET must be above 0, \
                           or all three unset";
            r.refuse_always("ENABLE_PREFIX_DELEGATION", "true", allowed);
        }
        let policy = if warm_eni.or(warm_ip).or(minimum_ip).or(warm_prefix).is_some() {
            Policy::AddOn(WarmTargets {
                warm_eni: warm_eni.unwrap_or(1),
                warm_ip: warm_ip.unwrap_or(0),
                minimum_ip: minimum_ip.unwrap_or(0),
                warm_prefix: warm_prefix.unwrap_or(0),
            })
        } else {
            Policy::Demand
        };
        let port_choice = r.choice(
            "AWS_VPC_K8S_CNI_RANDOMIZESNAT",
            &[("prng", PortChoice::FullyRandom), ("hashrandom", PortChoice::Random), ("none", PortChoice::Keep)],
        );
        let imds_only = r.flag("ENABLE_IMDS_ONLY_MODE", false);
        let external = r.flag("AWS_VPC_K8S_CNI_EXTERNALSNAT", false);
        Self {
            policy,
            mode: if prefixes { Mode::Prefixes } else { Mode::Addresses },
            families,
            max_eni: r.number("MAX_ENI", 1, 100, None),
            max_pods: r.number("MAX_PODS", 1, 10_000, None).unwrap_or(110),
            cooldown_secs: r.strict_number("IP_COOLDOWN_PERIOD", 0, 86_400, 30),
            snat: if external { Snat::External } else { Snat::ToPrimary(port_choice) },
            exclude_snat: cidrs(r, "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS"),
            external_services: cidrs(r, "AWS_EXTERNAL_SERVICE_CIDRS"),
            marks: marks(r),
            path_mtus: PathMtus {
                outside: r.strict_number("FLATWIRE_OUTSIDE_MTU", 576, 9001, PathMtus::default().outside),
                peered: r.strict_number("FLATWIRE_PEERED_MTU", 576, 9001, PathMtus::default().peered),
            },
            block_imds: r.flag("FLATWIRE_BLOCK_IMDS", false),
            node_port: r.flag("AWS_VPC_CNI_NODE_PORT_SUPPORT", true),
            mtu: r.strict_number("AWS_VPC_ENI_MTU", 576, 9001, 9001),
            veth_prefix: veth_prefix(r),
            eni_tags: tags(r),
            cluster_name: r.text("CLUSTER_NAME"),
            provisioning: !r.flag("DISABLE_NETWORK_RESOURCE_PROVISIONING", false) && !imds_only,
            imds_only,
            custom_networking,
            subnet_discovery: r.flag("ENABLE_SUBNET_DISCOVERY", true),
            manage_untagged: r.flag("MANAGE_UNTAGGED_ENI", true),
            manage_unschedulable: r.flag("AWS_MANAGE_ENIS_NON_SCHEDULABLE", false),
            leaked_cleanup: !r.flag("DISABLE_LEAKED_ENI_CLEANUP", false) && !imds_only,
            trunk_reserve: r.flag("ENABLE_POD_ENI", false),
        }
    }

    pub fn sizing(&self) -> Sizing {
        let Self { policy, max_eni, max_pods, cooldown_secs, .. } = *self;
        Sizing { policy, max_eni, max_pods, cooldown_secs }
    }

    pub fn resize(&mut self, sizing: Sizing) {
        self.policy = sizing.policy;
        self.max_eni = sizing.max_eni;
        self.max_pods = sizing.max_pods;
        self.cooldown_secs = sizing.cooldown_secs;
    }

    pub fn cooldown_ms(&self) -> u64 {
        u64::from(self.cooldown_secs) * 1_000
    }
}

/// Wrong families would give pods addresses that the rest of the cluster does not speak: never leniently.
fn families<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>, custom_networking: bool) -> Families {
    let (v4, v6) = (r.flag("ENABLE_IPv4", true), r.flag("ENABLE_IPv6", false));
    let egress = r.flag("ENABLE_V4_EGRESS", true);
    match (v4, v6) {
        (true, false) => Families::V4,
        (true, true) => Families::Dual,
        (false, true) => {
            if custom_networking {
                let allowed = "false where pods have IPv6 only: they all live on the primary ENI";
                r.refuse_always("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true", allowed);
            }
            Families::V6 { egress }
        }
        (false, false) => {
            r.refuse_always("ENABLE_IPv4", "false", "ENABLE_IPv4, ENABLE_IPv6 or both must be true");
            Families::V4
        }
    }
}

/// Features of the add-on that are not built.
fn not_supported<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) {
    r.unsupported_flag(
        "ENABLE_V6_EGRESS",
        "pods of IPv4 clusters reach IPv6 with addresses of their own: set ENABLE_IPv6=true beside ENABLE_IPv4=true",
    );
    r.unsupported_flag("ENABLE_MULTI_NIC", "only network card 0 is used");
    r.unsupported(
        "POD_SECURITY_GROUP_ENFORCING_MODE",
        "strict",
        "security groups for pods are not wired; the trunk's slot is kept free, no more",
        |value| value == "strict",
    );
}

/// A number that cannot be read, or is no mark, is 0x80 to the add-on; bits that belong to others it does not look at.
fn marks<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> Marks {
    let variable = "AWS_VPC_K8S_CNI_CONNMARK";
    let Some(value) = r.text(variable) else { return Marks::default() };
    match number_of_any_base(&value).filter(|mark| *mark != 0) {
        None => r.refuse(variable, &value, "a number above 0 and below 2^32, such as 0x80", "0x80"),
        Some(mark) => match Marks::new(mark) {
            Some(marks) => return marks,
            None => r.refuse_always(
                variable,
                &value,
                "bits of 0x10ff, of which 5 must stay free for the ENIs; 0x4000 and 0x8000 are kube-proxy's, 0x2000 \
                 portmap's, 0xffff0000 Calico's and 0x0f00 Cilium's",
            ),
        },
    }
    Marks::default()
}

/// As Go's `strconv.ParseInt(value, 0, …)`: 128, 0x80, 0o200, 0200, 0b10000000.
fn number_of_any_base(text: &str) -> Option<u32> {
    let lower = text.to_ascii_lowercase();
    let (digits, base) = match lower.get(..2) {
        Some("0x") => (&lower[2..], 16),
        Some("0b") => (&lower[2..], 2),
        Some("0o") => (&lower[2..], 8),
        _ if lower.len() > 1 && lower.starts_with('0') => (&lower[1..], 8),
        _ => (lower.as_str(), 10),
    };
    u32::from_str_radix(digits, base).ok()
}

fn cidrs<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>, variable: &'static str) -> Vec<Ipv4Net> {
    let Some(value) = r.text(variable) else { return Vec::new() };
    let mut cidrs = Vec::new();
    for item in value.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        match item.parse::<Ipv4Net>() {
            Ok(cidr) => cidrs.push(cidr.trunc()),
            Err(_) => {
                r.refuse(variable, item, "IPv4 CIDRs such as 10.0.0.0/8, separated by commas", "the list without it");
            }
        }
    }
    cidrs
}

fn veth_prefix<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> String {
    let variable = "AWS_VPC_K8S_CNI_VETHPREFIX";
    let Some(value) = r.text(variable) else { return "eni".to_owned() };
    let well_formed = value.len() <= 4 && value.bytes().all(|b| b.is_ascii_alphanumeric());
    // The prefix tells pods' links from the node's own, whose names begin so.
    let of_the_node = ["eth", "ens", "enp", "eno", "enx", "lo", "vlan"].iter().any(|name| name.starts_with(&value));
    if !well_formed || of_the_node {
        let allowed = "1 to 4 letters or digits that no link of the node begins with (eth, ens, lo…)";
        r.refuse_always(variable, &value, allowed);
    }
    value
}

fn tags<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> BTreeMap<String, String> {
    let variable = "ADDITIONAL_ENI_TAGS";
    let Some(value) = r.text(variable) else { return BTreeMap::new() };
    let mut tags: BTreeMap<String, String> = match serde_json::from_str(&value) {
        Ok(tags) => tags,
        Err(e) => {
            let allowed = format!("a JSON object of texts such as {{\"team\":\"net\"}} ({e})");
            r.refuse(variable, &value, allowed, "no tag");
            BTreeMap::new()
        }
    };
    // Our own ownership tags decide what may be deleted.
    let reserved = |key: &str| key.contains("k8s.amazonaws.com") || key.starts_with("aws:");
    if let Some(key) = tags.keys().find(|key| reserved(key)) {
        r.refuse(variable, &value, format!("tags without reserved keys (found {key:?})"), "the rest");
    }
    tags.retain(|key, _| !reserved(key));
    tags
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(vars: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
    }

    fn parse(vars: &[(&str, &str)]) -> Result<Settings, Vec<SettingError>> {
        Settings::parse(lookup(vars))
    }

    fn leniently(vars: &[(&str, &str)]) -> Result<(Settings, Vec<String>), Vec<SettingError>> {
        let mut reader = Reader::new(lookup(vars)).lenient(true);
        let settings = Settings::read(&mut reader);
        reader.finish().map(|put_up| (settings, put_up.iter().map(ToString::to_string).collect()))
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

    /// Column "Invalid" of the add-on: what it uses where it cannot read a value.
    #[test]
    fn a_lenient_reading_does_as_the_add_on_and_says_so() {
        let bad = [
            ("WARM_ENI_TARGET", "-1"),
            ("WARM_IP_TARGET", "many"),
            ("MAX_ENI", "0"),
            ("ENABLE_SUBNET_DISCOVERY", "yes"),
            ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "dice"),
            ("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.0.0.0/33,192.168.0.0/16"),
            ("ADDITIONAL_ENI_TAGS", r#"{"a":"1","cluster.k8s.amazonaws.com/name":"x"}"#),
            ("ENABLE_MULTI_NIC", "true"),
        ];
        assert_eq!(parse(&bad).unwrap_err().len(), bad.len());
        let (s, said) = leniently(&bad).unwrap();
        assert_eq!(said.len(), bad.len());
        assert_eq!(s.policy, Policy::AddOn(WarmTargets { warm_eni: 1, warm_ip: 0, minimum_ip: 0, warm_prefix: 0 }));
        assert_eq!((s.max_eni, s.subnet_discovery), (None, true));
        assert_eq!(s.snat, Snat::ToPrimary(PortChoice::FullyRandom));
        assert_eq!(s.exclude_snat, ["192.168.0.0/16".parse().unwrap()]);
        assert_eq!(s.eni_tags.keys().collect::<Vec<_>>(), ["a"]);
        for ((variable, _), text) in bad.iter().zip(&said).take(3) {
            assert!(said.iter().any(|t| t.starts_with(variable)) && text.contains("is used instead"), "{text}");
        }
    }

    #[test]
    fn what_the_add_on_does_not_start_with_is_refused_leniently_too() {
        let never = [
            [("IP_COOLDOWN_PERIOD", "soon"), ("MAX_PODS", "10")],
            [("AWS_VPC_ENI_MTU", "100"), ("MAX_PODS", "10")],
            [("AWS_VPC_K8S_CNI_VETHPREFIX", "toolong"), ("MAX_PODS", "10")],
            [("ENABLE_IPv4", "false"), ("MAX_PODS", "10")],
            [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "false")],
            [("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "0")],
        ];
        for vars in never {
            assert_eq!(leniently(&vars).unwrap_err().len(), 1, "{vars:?}");
        }
        let only = [("ENABLE_IPv6", "true"), ("ENABLE_IPv4", "false"), ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true")];
        assert!(leniently(&only).is_err());
        assert!(parse(&[("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")]).is_ok());
        assert!(parse(&[("ENABLE_PREFIX_DELEGATION", "true")]).is_ok());
    }

    /// The manifest of the add-on sets most variables to their defaults: those ask for nothing.
    #[test]
    fn a_feature_that_is_not_built_is_refused_only_when_asked_for() {
        for (variable, default, asked) in [
            ("ENABLE_V6_EGRESS", "false", "true"),
            ("ENABLE_MULTI_NIC", "false", "1"),
            ("POD_SECURITY_GROUP_ENFORCING_MODE", "strict", "standard"),
        ] {
            assert!(parse(&[(variable, default)]).is_ok(), "{variable}={default}");
            let text = parse(&[(variable, asked)]).unwrap_err()[0].to_string();
            assert!(text.starts_with(variable) && text.contains("not supported by this version"), "{text}");
            let (_, said) = leniently(&[(variable, asked)]).unwrap();
            assert!(said.len() == 1 && said[0].contains("is used instead"), "{said:?}");
        }
    }

    #[test]
    fn a_mark_is_honoured_as_written_and_refused_where_it_is_somebody_elses() {
        for (value, mark) in [("", 0x80), ("0x80", 0x80), ("128", 0x80), ("0o200", 0x80), ("1", 1), ("0x1000", 0x1000)]
        {
            let s = parse(&[("AWS_VPC_K8S_CNI_CONNMARK", value)]).unwrap();
            assert_eq!((s.marks.primary, s.marks.eni_mask & mark), (mark, 0), "{value}");
        }
        for unreadable in ["eighty", "0", "-1", "0x100000000"] {
            assert!(parse(&[("AWS_VPC_K8S_CNI_CONNMARK", unreadable)]).is_err(), "{unreadable}");
            let (s, said) = leniently(&[("AWS_VPC_K8S_CNI_CONNMARK", unreadable)]).unwrap();
            assert_eq!((s.marks.primary, said.len()), (0x80, 1), "{unreadable}");
        }
        for others in ["0x4000", "0x8000", "0x10000", "0x100", "0xffffffff"] {
            let errors = leniently(&[("AWS_VPC_K8S_CNI_CONNMARK", others)]).unwrap_err();
            assert!(errors[0].to_string().contains("kube-proxy's"), "{others}: {}", errors[0]);
        }
    }

    #[test]
    fn a_nodes_own_values_lie_over_the_environment_and_a_bad_one_changes_nothing() {
        let environment = [("WARM_IP_TARGET", "2"), ("MINIMUM_IP_TARGET", "8"), ("MAX_PODS", "58")];
        let sized = |own: &[(&'static str, &str)]| {
            let own = own.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
            Sizing::of_node(&own, lookup(&environment), false)
        };
        let OwnSizing { sizing: plain, refused, .. } = sized(&[]);
        assert_eq!((plain, refused.len()), (parse(&environment).unwrap().sizing(), 0));
        let OwnSizing { sizing: own, held, refused } =
            sized(&[("WARM_IP_TARGET", "9"), ("MAX_PODS", "20"), ("MAX_ENI", "none")]);
        assert!(refused.len() == 1 && refused[0].to_string().contains("MAX_ENI=\"none\""), "{refused:?}");
        assert_eq!((own.max_eni, own.max_pods), (None, 20));
        assert_eq!(held.into_iter().collect::<Vec<_>>(), ["MAX_PODS", "WARM_IP_TARGET"]);
        assert!(matches!(own.policy, Policy::AddOn(WarmTargets { warm_ip: 9, minimum_ip: 8, .. })), "{own:?}");
        // Each is allowed by itself; beside the environment they ask for no warm pool at all.
        let environment = [("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
        let own = [("WARM_PREFIX_TARGET", "0".to_owned())].into();
        let OwnSizing { sizing: kept, held, refused } = Sizing::of_node(&own, lookup(&environment), false);
        assert_eq!((kept, held.len(), refused.len()), (parse(&environment).unwrap().sizing(), 0, 1));
    }

    #[test]
    fn every_setting_of_a_node_is_one_of_the_environment() {
        for (key, variable) in PER_NODE {
            assert!(SETTINGS.iter().any(|(name, _, _)| name == variable), "{variable}");
            assert_eq!(key.replace('-', "_").to_ascii_uppercase(), *variable);
        }
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
