//! What a world is made of and what happens in it, as data: written by hand for a named scenario, or drawn from a seed.

use flatwire_core::pool::Level;
use lab_ec2::{Delays, FaultRule};

use crate::node::Pace;
use crate::runtime::Habits;

/// Something that is done to the world at one moment.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// So many pods are bound to the node; each ends by itself after about so long, if that is given.
    Pods {
        count: u32,
        life_ms: Option<u64>,
    },
    /// So many pods are deleted, whichever.
    EndPods {
        count: u32,
    },
    /// The runtime calls GC.
    Gc,
    /// The daemon dies after so many further effects, and is away so long.
    Crash {
        effects: u32,
        down_ms: u64,
    },
    /// The daemon dies now, and is away so long.
    Kill {
        down_ms: u64,
    },
    /// The runtime takes so many running pods for gone: their DEL reaches the daemon, and they run on.
    StrayDels {
        count: u32,
    },
    /// The journal cannot be written, or can again.
    DiskFull(bool),
    /// What EC2 and IMDS do wrong from now on; no rules, no faults. Rules for EC2 meet this node's calls only.
    Faults(Vec<FaultRule>),
    /// Of a million readings of IMDS so many fail.
    ImdsFails(u32),
    /// IMDS leaves things out.
    ImdsPartial(bool),
    /// IMDS goes on showing what it shows now, or catches up.
    ImdsStands(bool),
    /// Actions the node's role may not call.
    Deny(Vec<&'static str>),
    Delays(Delays),
    /// How far `Describe*` is behind.
    DescribeLag(u64),
    /// Others in the account use up so many calls of an action.
    Drain {
        action: &'static str,
        calls: u32,
    },
    /// Others take addresses or /28s of the subnets.
    Take {
        count: u32,
        prefixes: bool,
    },
    Give {
        count: u32,
    },
    /// Others take at once what the node gives back.
    Greedy(bool),
    /// Another program flushes the table of one ENI.
    FlushTable,
    /// Another program flushes the ruleset.
    FlushRuleset,
    /// Another program removes a pod's route.
    FlushPodRoute,
    /// Another program removes a pod's link.
    DropLink,
    /// The kernel refuses to be programmed, or takes it again.
    KernelBroken(bool),
    /// An operator attaches an ENI of his own.
    OperatorAttaches {
        no_manage: bool,
    },
    /// An operator detaches what he attached.
    OperatorDetaches,
    /// A node of the cluster has died and left so many ENIs that it had detached and not deleted.
    DeadNode {
        enis: u32,
    },
    /// Somebody takes one of the node's slots away.
    StealSlot,
    /// Somebody detaches one of the node's secondary ENIs.
    StealEni,
    Level(Level),
    Unschedulable(bool),
    Pace(Pace),
    /// Faults end, neighbours leave, nobody deletes pods; what is broken beyond the node's power is cleared away.
    Quiet,
}

/// A subnet of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetPlan {
    pub cidr: &'static str,
    /// Tagged for discovery.
    pub tagged: bool,
}

/// A world, as data.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub seed: u64,
    pub instance_type: &'static str,
    /// The daemon's variables.
    pub vars: Vec<(&'static str, String)>,
    /// The first is the node's own.
    pub subnets: Vec<SubnetPlan>,
    /// The ENIConfig names this subnet.
    pub eni_config: Option<usize>,
    pub prefixes_at_launch: u32,
    pub addresses_at_launch: u32,
    pub ipv6_prefixes_at_launch: u32,
    pub habits: Habits,
    pub pace: Pace,
    pub page_size: u32,
    pub throttle: bool,
    /// What happens when, in milliseconds from the beginning.
    pub acts: Vec<(u64, Act)>,
}

impl Scenario {
    /// The same world with pods of IPv4 only.
    pub fn with_ipv4_alone(mut self) -> Self {
        self.vars.retain(|(name, _)| !matches!(*name, "ENABLE_IPv4" | "ENABLE_IPv6"));
        self.ipv6_prefixes_at_launch = 0;
        self
    }

    /// A healthy node of a common type, with nothing happening.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            instance_type: "m5.large",
            vars: Vec::new(),
            subnets: vec![SubnetPlan { cidr: "10.0.0.0/22", tagged: false }],
            eni_config: None,
            prefixes_at_launch: 0,
            addresses_at_launch: 0,
            ipv6_prefixes_at_launch: 0,
            habits: Habits::default(),
            pace: Pace { cloud_ms: 300, kernel_ms: 20, slow_percent: 0 },
            page_size: 100,
            throttle: true,
            acts: Vec::new(),
        }
    }

    pub fn instance_type(mut self, name: &'static str) -> Self {
        self.instance_type = name;
        self
    }

    pub fn var(mut self, name: &'static str, value: impl ToString) -> Self {
        self.vars.push((name, value.to_string()));
        self
    }

    pub fn subnets(mut self, subnets: impl IntoIterator<Item = (&'static str, bool)>) -> Self {
        self.subnets = subnets.into_iter().map(|(cidr, tagged)| SubnetPlan { cidr, tagged }).collect();
        self
    }

    pub fn habits(mut self, habits: Habits) -> Self {
        self.habits = habits;
        self
    }

    pub fn at(mut self, ms: u64, act: Act) -> Self {
        self.acts.push((ms, act));
        self
    }
}
