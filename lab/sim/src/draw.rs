//! A scenario from a seed: which node, which settings, which pods, and which of all the things that go wrong go wrong here.

use flatwire_core::limits;
use flatwire_core::pool::Level;
use lab_ec2::{Delays, Fault, FaultRule, When};

use crate::dice::Dice;
use crate::node::Pace;
use crate::runtime::Habits;
use crate::scenario::{Act, Scenario, SubnetPlan};

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;

const TYPES: &[&str] = &[
    "t3.nano",
    "t3.small",
    "t3.medium",
    "m5.large",
    "m5.large",
    "m5.xlarge",
    "c5.2xlarge",
    "m5.4xlarge",
    "t2.medium",
    "m4.large",
];

/// Refusals of EC2 that come for no reason the node could see.
const REFUSALS: &[(&str, &str, &str)] = &[
    ("*", "RequestLimitExceeded", "Request limit exceeded."),
    ("*", "InternalError", "An internal error has occurred"),
    ("*", "Unavailable", "The server is overloaded"),
    ("*", "RequestExpired", "Request has expired."),
    ("Attach*", "InvalidNetworkInterfaceID.NotFound", "The networkInterface ID does not exist"),
    ("Modify*", "InvalidNetworkInterfaceID.NotFound", "The networkInterface ID does not exist"),
    ("Assign*", "InvalidNetworkInterfaceID.NotFound", "The networkInterface ID does not exist"),
    ("Assign*", "InsufficientFreeAddressesInSubnet", "The specified subnet does not have enough free addresses."),
    ("Assign*", "InsufficientCidrBlocks", "The specified subnet does not have enough free cidr blocks."),
    ("Assign*", "InvalidParameterValue", "There aren't sufficient free Ipv4 addresses or prefixes"),
    ("Create*", "InsufficientCidrBlocks", "The specified subnet does not have enough free cidr blocks."),
    ("Create*", "InsufficientFreeAddressesInSubnet", "The specified subnet does not have enough free addresses."),
    ("CreateNetworkInterface", "NetworkInterfaceLimitExceeded", "You have reached the maximum number of interfaces."),
    ("Attach*", "IncorrectState", "The instance is not 'running'"),
    ("Describe*", "OperationNotPermitted", "The result is too large to be described in one call"),
    ("Delete*", "InvalidNetworkInterface.InUse", "The interface is in use"),
    ("Detach*", "IncorrectState", "The attachment is detaching"),
    ("*", "SomethingNobodyHasSeen", "an error that is in no list"),
];

const MUTATIONS: &[&str] = &[
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "DeleteNetworkInterface",
    "DescribeNetworkInterfaces",
    "DetachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "UnassignPrivateIpAddresses",
];

impl Scenario {
    /// The world of this seed.
    pub fn from_seed(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x51_0a7e);
        let mut scenario = Self::new(seed);
        draw_node(&mut scenario, &mut dice);
        draw_families(&mut scenario, &mut Dice::new(seed ^ 0xfa_3111e5));
        let span_ms = match dice.below(10) {
            0..3 => dice.between(20 * MINUTE, HOUR),
            3..8 => dice.between(HOUR, 6 * HOUR),
            _ => dice.between(6 * HOUR, 24 * HOUR),
        };
        draw_pods(&mut scenario, span_ms, &mut dice);
        if !dice.percent(15) {
            scenario.habits = draw_habits(scenario.habits, &mut dice);
            // Trouble comes in a part of the time; nights are quiet.
            let span_ms = span_ms.min(dice.between(20 * MINUTE, 3 * HOUR));
            draw_trouble(&mut scenario, span_ms, &mut dice);
        }
        scenario.acts.push((span_ms, Act::Quiet));
        scenario.acts.sort_by_key(|(at, _)| *at);
        scenario.acts.retain(|(at, _)| *at <= span_ms);
        scenario
    }
}

fn draw_node(scenario: &mut Scenario, dice: &mut Dice) {
    scenario.instance_type = *dice.pick::<&'static str>(TYPES);
    scenario.page_size = *dice.pick(&[1, 2, 3, 100]);
    let mut var = |name, value: String| scenario.vars.push((name, value));
    match dice.below(8) {
        0 => var("WARM_ENI_TARGET", dice.between(0, 2).to_string()),
        1 => var("WARM_IP_TARGET", dice.between(1, 8).to_string()),
        2 => {
            var("WARM_IP_TARGET", dice.between(1, 4).to_string());
            var("MINIMUM_IP_TARGET", dice.between(2, 20).to_string());
        }
        3 => var("WARM_PREFIX_TARGET", dice.between(1, 2).to_string()),
        _ => {}
    }
    let prefixes = dice.percent(35);
    if prefixes {
        var("ENABLE_PREFIX_DELEGATION", "true".to_owned());
    }
    if dice.percent(25) {
        var("MAX_ENI", dice.between(1, 4).to_string());
    }
    if dice.percent(50) {
        var("IP_COOLDOWN_PERIOD", dice.pick(&["0", "5", "60", "300"]).to_string());
    }
    if dice.percent(10) {
        var("ENABLE_POD_ENI", "true".to_owned());
    }
    if dice.percent(15) {
        var("MANAGE_UNTAGGED_ENI", "false".to_owned());
    }
    if dice.percent(20) {
        var("ENABLE_SUBNET_DISCOVERY", "false".to_owned());
    }
    if dice.percent(5) {
        var("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true".to_owned());
    }
    if dice.percent(50) {
        var("CLUSTER_NAME", "sim".to_owned());
    }
    let custom = dice.percent(10);
    if custom {
        var("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true".to_owned());
    }
    let own = *dice.pick(&["10.0.0.0/22", "10.0.0.0/24", "10.0.0.0/25", "10.0.0.0/26", "10.0.0.0/27"]);
    scenario.subnets = vec![SubnetPlan { cidr: own, tagged: dice.percent(50) }];
    if dice.percent(40) || custom {
        scenario.subnets.push(SubnetPlan { cidr: "10.0.64.0/24", tagged: dice.percent(70) });
        scenario.subnets.push(SubnetPlan { cidr: "10.0.128.0/26", tagged: dice.percent(70) });
    }
    scenario.eni_config = custom.then_some(1);
    let kind = limits::lookup(scenario.instance_type).expect("invariant: the drawn types are in the table");
    let slots = u64::from(kind.ipv4_per_eni - 1);
    if dice.percent(25) && kind.takes_prefixes() && !matches!(own, "10.0.0.0/26" | "10.0.0.0/27") {
        scenario.prefixes_at_launch = u32::try_from(dice.between(1, slots.min(2))).unwrap_or(1);
    } else if dice.percent(15) {
        scenario.addresses_at_launch = u32::try_from(dice.between(1, slots.min(9))).unwrap_or(1);
    }
    scenario.habits.patience_ms = *dice.pick(&[0, 5_000, 15_000, 60_000]);
    scenario.habits.tell_scheduled = dice.percent(50);
}

/// Some nodes have pods of both families, and some of IPv6 only.
fn draw_families(scenario: &mut Scenario, dice: &mut Dice) {
    let kind = limits::lookup(scenario.instance_type).expect("invariant: the drawn types are in the table");
    let custom = scenario.vars.iter().any(|(name, _)| *name == "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG");
    let drawn = dice.below(100);
    if !kind.takes_prefixes() || drawn >= 25 {
        return;
    }
    scenario.vars.push(("ENABLE_IPv6", "true".to_owned()));
    if drawn < 8 && !custom {
        scenario.vars.push(("ENABLE_IPv4", "false".to_owned()));
    }
    scenario.ipv6_prefixes_at_launch = u32::from(dice.percent(50));
}

/// Pods come as they do: steadily, in bursts, by the clock, or not at all for a night.
fn draw_pods(scenario: &mut Scenario, span_ms: u64, dice: &mut Dice) {
    let kind = limits::lookup(scenario.instance_type).expect("invariant: the drawn types are in the table");
    let room = u64::from(kind.max_enis * (kind.ipv4_per_eni - 1)).min(60);
    let few = |dice: &mut Dice, share: u64| u32::try_from(dice.between(1, (room / share).max(1))).unwrap_or(1);
    let mut act = |at, act| scenario.acts.push((at, act));
    act(dice.between(0, 5_000), Act::Pods { count: few(dice, 3), life_ms: None });
    let mut at = dice.between(0, MINUTE);
    match dice.below(5) {
        // Churn for a while.
        0 => {
            let life_ms = dice.between(20_000, 10 * MINUTE);
            let end = span_ms.min(dice.between(10 * MINUTE, 90 * MINUTE));
            while at < end {
                act(at, Act::Pods { count: few(dice, 8), life_ms: Some(life_ms) });
                at += dice.between(life_ms / 8, life_ms);
            }
        }
        // Bursts.
        1 => {
            for _ in 0..dice.between(2, 8) {
                act(at, Act::Pods { count: few(dice, 1), life_ms: Some(dice.between(MINUTE, 30 * MINUTE)) });
                at += dice.between(5 * MINUTE, HOUR);
            }
        }
        // By the clock.
        2 => {
            let every = dice.between(MINUTE, 10 * MINUTE);
            let (count, life_ms) = (few(dice, 4), dice.between(5_000, 90_000));
            while at < span_ms.min(3 * HOUR) {
                act(at, Act::Pods { count, life_ms: Some(life_ms) });
                at += every;
            }
        }
        // Drained and filled again.
        3 => {
            for _ in 0..dice.between(1, 4) {
                act(at, Act::Pods { count: few(dice, 2), life_ms: None });
                at += dice.between(2 * MINUTE, HOUR);
                act(at, Act::EndPods { count: 200 });
                at += dice.between(10_000, HOUR);
            }
        }
        _ => act(at, Act::Pods { count: few(dice, 4), life_ms: None }),
    }
    if dice.percent(30) {
        for _ in 0..dice.between(1, 10) {
            act(dice.between(0, span_ms), Act::Gc);
        }
    }
}

fn draw_habits(habits: Habits, dice: &mut Dice) -> Habits {
    let mut rare = |percent| if dice.percent(35) { u32::try_from(dice.between(1, percent)).unwrap_or(1) } else { 0 };
    Habits {
        answer_lost: rare(8),
        plugin_dies: rare(5),
        wiring_fails: rare(8),
        del_lost: rare(5),
        del_again: rare(40),
        route_stays: rare(15),
        cut_short: rare(60),
        name_again: rare(10),
        ..habits
    }
}

fn draw_trouble(scenario: &mut Scenario, span_ms: u64, dice: &mut Dice) {
    let troubles: &[fn(&mut Trouble<'_>)] = &[
        crashes,
        crashes,
        disk,
        refusals,
        refusals,
        lost_replies,
        throttling,
        imds,
        denials,
        slowness,
        lags,
        shortage,
        shortage,
        kernel,
        links,
        operators,
        thefts,
        levels,
        strays,
    ];
    for trouble in troubles {
        if dice.percent(30) {
            trouble(&mut Trouble { scenario, span_ms, dice });
        }
    }
}

/// One kind of trouble, being drawn.
struct Trouble<'t> {
    scenario: &'t mut Scenario,
    span_ms: u64,
    dice: &'t mut Dice,
}

impl Trouble<'_> {
    fn some_time(&mut self) -> u64 {
        self.dice.between(0, self.span_ms)
    }

    fn act(&mut self, at: u64, act: Act) {
        self.scenario.acts.push((at, act));
    }

    /// Begins at some time and ends a while later.
    fn window(&mut self, begin: Act, end: Act, longest_ms: u64) {
        let (at, long) = (self.some_time(), self.dice.between(1_000, longest_ms));
        self.act(at, begin);
        self.act(at + long, end);
    }

    fn times(&mut self, most: u64) -> std::ops::Range<u64> {
        0..self.dice.between(1, most)
    }
}

fn crashes(t: &mut Trouble<'_>) {
    for _ in t.times(25) {
        let at = t.some_time();
        let effects = t.dice.below(8);
        let down_ms = *t.dice.pick(&[50, 500, 2_000, 10_000, 120_000]);
        let down_ms = t.dice.between(down_ms / 2, down_ms);
        t.act(at, Act::Crash { effects, down_ms });
    }
}

fn disk(t: &mut Trouble<'_>) {
    for _ in t.times(4) {
        t.window(Act::DiskFull(true), Act::DiskFull(false), 2 * MINUTE);
    }
}

fn refusals(t: &mut Trouble<'_>) {
    for _ in t.times(6) {
        let (action, code, message) = *t.dice.pick(REFUSALS);
        let share = u32::try_from(t.dice.between(50_000, 1_000_000)).unwrap_or(500_000);
        let fault = Fault::Error { code: code.to_owned(), message: message.to_owned() };
        t.window(Act::Faults(vec![rule(action, When::PerMillion(share), fault)]), Act::Faults(Vec::new()), 10 * MINUTE);
    }
}

fn lost_replies(t: &mut Trouble<'_>) {
    for _ in t.times(8) {
        let fault = match t.dice.below(3) {
            0 => Fault::LostReply,
            1 => Fault::BrokenConnection,
            _ => Fault::Delay { ms: t.dice.between(500, 40_000) },
        };
        let share = u32::try_from(t.dice.between(100_000, 900_000)).unwrap_or(500_000);
        t.window(Act::Faults(vec![rule("*", When::PerMillion(share), fault)]), Act::Faults(Vec::new()), 10 * MINUTE);
    }
}

fn rule(action: &str, when: When, fault: Fault) -> FaultRule {
    FaultRule { action: action.to_owned(), access_key: None, when, fault }
}

fn throttling(t: &mut Trouble<'_>) {
    for _ in t.times(5) {
        let (action, mut at) = (*t.dice.pick(MUTATIONS), t.some_time());
        for _ in 0..t.dice.between(5, 60) {
            t.act(at, Act::Drain { action, calls: 200 });
            at += t.dice.between(200, 3_000);
        }
    }
}

fn imds(t: &mut Trouble<'_>) {
    for _ in t.times(4) {
        t.window(Act::ImdsFails(700_000), Act::ImdsFails(0), 5 * MINUTE);
        t.window(Act::ImdsPartial(true), Act::ImdsPartial(false), 10 * MINUTE);
    }
}

fn denials(t: &mut Trouble<'_>) {
    for _ in t.times(3) {
        let denied = if t.dice.percent(20) { MUTATIONS.to_vec() } else { vec![*t.dice.pick(MUTATIONS)] };
        t.window(Act::Deny(denied), Act::Deny(Vec::new()), 20 * MINUTE);
    }
}

fn slowness(t: &mut Trouble<'_>) {
    let slow = Pace {
        cloud_ms: t.dice.between(300, 4_000),
        kernel_ms: t.dice.between(20, 3_000),
        slow_percent: t.dice.below(10),
    };
    t.act(0, Act::Pace(slow));
}

fn lags(t: &mut Trouble<'_>) {
    for _ in t.times(4) {
        let lag = t.dice.between(1_000, 60_000);
        t.window(Act::DescribeLag(lag), Act::DescribeLag(0), 20 * MINUTE);
    }
    for _ in t.times(3) {
        let imds_lag_ms = t.dice.between(5_000, 120_000);
        let lagging = Delays { imds_lag_ms, ..Delays::default() };
        t.window(Act::Delays(lagging), Act::Delays(Delays::default()), 20 * MINUTE);
    }
}

fn links(t: &mut Trouble<'_>) {
    for _ in t.times(5) {
        let delays = Delays {
            attach_ms: t.dice.between(100, 8_000),
            link_ms: *t.dice.pick(&[300, 3_000, 15_000, 70_000, 300_000]),
            detach_ms: t.dice.between(300, 20_000),
            eni_pending_ms: t.dice.between(0, 3_000),
            ..Delays::default()
        };
        let at = t.some_time();
        t.act(at, Act::Delays(delays));
    }
}

fn shortage(t: &mut Trouble<'_>) {
    if t.dice.percent(50) {
        t.act(0, Act::Greedy(true));
    }
    for _ in t.times(5) {
        let (count, prefixes) = (u32::try_from(t.dice.between(5, 250)).unwrap_or(50), t.dice.percent(25));
        let (at, long) = (t.some_time(), t.dice.between(MINUTE, 30 * MINUTE));
        t.act(at, Act::Take { count, prefixes });
        let count = t.dice.below(count + 1);
        t.act(at + long, Act::Give { count });
    }
}

fn kernel(t: &mut Trouble<'_>) {
    for _ in t.times(10) {
        let at = t.some_time();
        let act = match t.dice.below(6) {
            0 => Act::FlushRuleset,
            1 | 2 => Act::FlushTable,
            3 | 4 => Act::FlushPodRoute,
            _ => Act::DropLink,
        };
        t.act(at, act);
    }
    if t.dice.percent(40) {
        t.window(Act::KernelBroken(true), Act::KernelBroken(false), 2 * MINUTE);
    }
}

fn operators(t: &mut Trouble<'_>) {
    for _ in t.times(2) {
        let no_manage = t.dice.percent(60);
        t.window(Act::OperatorAttaches { no_manage }, Act::OperatorDetaches, HOUR);
    }
}

fn thefts(t: &mut Trouble<'_>) {
    for _ in t.times(3) {
        let at = t.some_time();
        let act = if t.dice.percent(75) { Act::StealSlot } else { Act::StealEni };
        t.act(at, act);
    }
}

fn levels(t: &mut Trouble<'_>) {
    for _ in t.times(3) {
        let level = *t.dice.pick(&[Level::NoRelease, Level::NoCloud]);
        t.window(Act::Level(level), Act::Level(Level::Normal), 20 * MINUTE);
        if t.dice.percent(50) {
            t.window(Act::Unschedulable(true), Act::Unschedulable(false), 20 * MINUTE);
        }
    }
}

/// Pods that have hardly begun and are taken for gone: no look at the kernel lies between.
fn strays(t: &mut Trouble<'_>) {
    for _ in t.times(12) {
        let (at, count) = (t.some_time(), u32::try_from(t.dice.between(1, 8)).unwrap_or(1));
        t.act(at, Act::Pods { count, life_ms: None });
        let soon = t.dice.between(1_000, 8_000);
        t.act(at + soon, Act::StrayDels { count });
        let later = t.dice.between(MINUTE, 20 * MINUTE);
        t.act(at + soon + later, Act::EndPods { count });
    }
}
