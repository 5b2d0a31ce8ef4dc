//! How many addresses does this node want? A pure function of counts and settings, never of history: computing it twice
//! changes nothing.
//!
//! Two policies. With any of WARM_ENI_TARGET, WARM_IP_TARGET, MINIMUM_IP_TARGET or WARM_PREFIX_TARGET set, the arithmetic
//! is the add-on's, to the letter, with one difference: a cooling address is not available. With none set the target is
//! demand plus a little head-room, in batches.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Addresses in a /28.
pub const PREFIX_SIZE: u32 = 16;
/// Free addresses the demand policy keeps ready beyond what is asked for.
pub const HEADROOM: u32 = 4;
/// The demand policy asks for single addresses in multiples of this.
pub const BATCH: u32 = 4;
/// Everything that is wanted is needed.
const ALL: u32 = u32::MAX;

/// What the pool holds, as the target sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Addresses in trusted slots, and those that calls under way will bring.
    pub total: u32,
    /// Addresses of sandboxes.
    pub assigned: u32,
    /// Freed too recently to be given again.
    pub cooling: u32,
    /// ADDs waiting for an address.
    pub waiting: u32,
    /// Addresses the kernel routes to a pod although no sandbox is known: in use until proven free.
    pub orphans: u32,
    /// Pods bound to the node that need an address, where that is known.
    pub scheduled: Option<u32>,
    pub prefixes: u32,
    /// Prefixes with no sandbox and no cooling address.
    pub free_prefixes: u32,
}

impl Counts {
    /// Addresses that could be given now, less those already promised to waiting ADDs; negative when ADDs outnumber them.
    pub fn available(&self) -> i64 {
        let busy = [self.assigned, self.cooling, self.waiting, self.orphans];
        i64::from(self.total) - busy.into_iter().map(i64::from).sum::<i64>()
    }
}

/// What an ENI slot is filled with when we take more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    Addresses,
    Prefixes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    AddOn(WarmTargets),
    Demand,
}

/// The add-on's variables after its own defaulting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmTargets {
    pub warm_eni: u32,
    pub warm_ip: u32,
    pub minimum_ip: u32,
    pub warm_prefix: u32,
}

impl WarmTargets {
    /// The two address targets overrule the ENI and prefix targets.
    pub fn by_address(&self) -> bool {
        self.warm_ip != 0 || self.minimum_ip != 0
    }
}

/// What the node is: the frame the counts stand in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    pub mode: Mode,
    /// Slots of an ENI beside its own address.
    pub slots_per_eni: u32,
    /// More addresses than this are never wanted.
    pub max_pods: u32,
}

impl Frame {
    /// Addresses in a slot.
    pub fn slot_size(&self) -> u32 {
        match self.mode {
            Mode::Addresses => 1,
            Mode::Prefixes => PREFIX_SIZE,
        }
    }

    pub fn addresses_per_eni(&self) -> u32 {
        self.slots_per_eni * self.slot_size()
    }
}

/// The answer, with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub wanted: Wanted,
    /// Of the addresses wanted: those that pods need. The rest is head-room. The add-on's targets tell no difference.
    pub needed: u32,
    /// Addresses beyond the target, and beyond a margin that keeps the pool from swinging: slots may be given back.
    pub surplus: u32,
    /// Addresses beyond the target: an ENI without pods that holds no more than these may be given back.
    pub spare: u32,
    pub why: Why,
}

impl Target {
    /// Where pods have IPv6 addresses only.
    pub fn one_prefix() -> Self {
        Self { wanted: Wanted::Enough, needed: 0, surplus: 0, spare: 0, why: Why::OnePrefix }
    }
}

/// What the target follows from. Looked at with every event and read seldom, so words are made of it only then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Addresses {
        warm_ip: u32,
        minimum_ip: u32,
        available: i64,
        total: u32,
        short: i64,
        over: i64,
    },
    Enis {
        warm_eni: u32,
        available: i64,
        goal: i64,
    },
    Prefixes {
        warm_prefix: u32,
        available: i64,
        free: u32,
        held: u32,
    },
    Demand {
        demand: u32,
        goal: u32,
        usable: u32,
    },
    /// IPv6 clusters: one /80 is enough for any number of pods.
    OnePrefix,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Addresses { warm_ip, minimum_ip, available, total, short, over } => write!(
                f,
                "WARM_IP_TARGET={warm_ip} MINIMUM_IP_TARGET={minimum_ip}: {available} available of {total}, \
                 short {short}, over {over}"
            ),
            Self::Enis { warm_eni, available, goal } => {
                write!(f, "WARM_ENI_TARGET={warm_eni}: {available} available, {goal} wanted free")
            }
            Self::Prefixes { warm_prefix, available, free, held } => {
                write!(f, "WARM_PREFIX_TARGET={warm_prefix}: {available} available, {free} of {held} prefixes free")
            }
            Self::OnePrefix => f.write_str("one IPv6 prefix serves every pod of the node"),
            Self::Demand { demand, goal, usable } => {
                write!(f, "demand: {demand} pods and {HEADROOM} spare make {goal}, {usable} usable")
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    Enough,
    /// This many more addresses, one slot each.
    Addresses(u32),
    /// This many more /28s.
    Prefixes(u32),
    /// Fill an ENI that has room, or take this many new ones, full.
    Enis(u32),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enough => f.write_str("nothing"),
            Self::Addresses(n) => write!(f, "{n} addresses"),
            Self::Prefixes(n) => write!(f, "{n} prefixes"),
            Self::Enis(n) => write!(f, "{n} full ENIs"),
        }
    }
}

pub fn target(policy: Policy, frame: &Frame, counts: &Counts) -> Target {
    match policy {
        Policy::AddOn(warm) if warm.by_address() => by_address(&warm, frame, counts),
        Policy::AddOn(warm) => match frame.mode {
            Mode::Addresses => by_eni(warm.warm_eni, frame, counts),
            Mode::Prefixes => by_prefix(warm.warm_prefix, frame, counts),
        },
        Policy::Demand => by_demand(frame, counts),
    }
}

/// WARM_IP_TARGET and MINIMUM_IP_TARGET.
fn by_address(warm: &WarmTargets, frame: &Frame, counts: &Counts) -> Target {
    let available = counts.available();
    let total = i64::from(counts.total);
    let (warm_free, minimum) = (i64::from(warm.warm_ip), i64::from(warm.minimum_ip));
    let short = (warm_free - available).max(0).max(minimum - total);
    let over = (available - warm_free).max(0).min(total - minimum).max(0);
    let WarmTargets { warm_ip, minimum_ip, .. } = *warm;
    let why = Why::Addresses { warm_ip, minimum_ip, available, total: counts.total, short, over };
    let full = counts.total >= frame.max_pods && counts.waiting == 0;
    match frame.mode {
        Mode::Addresses => {
            let wanted = if full || short <= 0 { Wanted::Enough } else { Wanted::Addresses(clamp(short)) };
            Target { wanted, needed: ALL, surplus: clamp(over), spare: clamp(over), why }
        }
        Mode::Prefixes => {
            let wanted =
                if full || short <= 0 { Wanted::Enough } else { Wanted::Prefixes(clamp(short).div_ceil(PREFIX_SIZE)) };
            let needed = (counts.assigned + warm.warm_ip).div_ceil(PREFIX_SIZE);
            let floor = warm.minimum_ip.div_ceil(PREFIX_SIZE);
            let over = counts
                .free_prefixes
                .min(counts.prefixes.saturating_sub(needed))
                .min(counts.prefixes.saturating_sub(floor));
            Target { wanted, needed: ALL, surplus: over * PREFIX_SIZE, spare: over * PREFIX_SIZE, why }
        }
    }
}

/// WARM_ENI_TARGET: whole ENIs of free addresses. Single addresses are never given back under this target.
fn by_eni(warm_eni: u32, frame: &Frame, counts: &Counts) -> Target {
    let unit = i64::from(frame.addresses_per_eni().max(1));
    let available = counts.available();
    let goal = unit * i64::from(warm_eni);
    let why = Why::Enis { warm_eni, available, goal };
    let low = available < goal || (warm_eni == 0 && available <= 0);
    let full = counts.total >= frame.max_pods && counts.waiting == 0;
    let wanted = if low && !full {
        let missing = (goal - available).max(1);
        Wanted::Enis(clamp((missing + unit - 1) / unit))
    } else {
        Wanted::Enough
    };
    // Whole ENIs come and whole ENIs go: one goes when the target is met without it, and one pod more would not bring it back.
    let spare = if warm_eni == 0 { available - 1 } else { available - goal };
    Target { wanted, needed: ALL, surplus: 0, spare: clamp(spare), why }
}

/// WARM_PREFIX_TARGET: whole prefixes without a pod.
fn by_prefix(warm_prefix: u32, frame: &Frame, counts: &Counts) -> Target {
    let size = i64::from(PREFIX_SIZE);
    let available = counts.available();
    let goal = size * i64::from(warm_prefix);
    let why = Why::Prefixes { warm_prefix, available, free: counts.free_prefixes, held: counts.prefixes };
    let low = available < goal || (warm_prefix == 0 && available <= 0);
    let full = counts.total >= frame.max_pods && counts.waiting == 0;
    let wanted = if low && !full {
        // Waiting ADDs have already claimed what is free: only what is left after them counts towards the warm prefixes.
        let unclaimed = if available > 0 { counts.free_prefixes.min(clamp(available / size)) } else { 0 };
        let for_waiting = clamp((-available).max(0)).div_ceil(PREFIX_SIZE);
        Wanted::Prefixes((for_waiting + warm_prefix.saturating_sub(unclaimed)).max(1))
    } else {
        Wanted::Enough
    };
    // With no warm prefix wanted one address must still be free, or the next look would take back what this one gave.
    let over = match warm_prefix {
        0 => counts.free_prefixes.min(clamp((available - 1) / size)),
        _ => counts.free_prefixes.saturating_sub(warm_prefix),
    };
    let surplus = over * PREFIX_SIZE;
    Target { wanted, needed: ALL, surplus, spare: surplus, why }
}

/// Demand plus head-room, rounded up to a batch.
fn by_demand(frame: &Frame, counts: &Counts) -> Target {
    let known = counts.assigned + counts.orphans + counts.waiting;
    let demand = known.max(counts.scheduled.unwrap_or(0));
    let batch = match frame.mode {
        Mode::Addresses => BATCH,
        Mode::Prefixes => PREFIX_SIZE,
    };
    let goal = (demand + HEADROOM).div_ceil(batch) * batch;
    let goal = goal.min(frame.max_pods.max(demand));
    // Cooling addresses are held but cannot be given: the goal must be met without them.
    let usable = counts.total.saturating_sub(counts.cooling);
    let why = Why::Demand { demand, goal, usable };
    let short = goal.saturating_sub(usable);
    let wanted = match frame.mode {
        _ if short == 0 => Wanted::Enough,
        Mode::Addresses => Wanted::Addresses(short),
        Mode::Prefixes => Wanted::Prefixes(short.div_ceil(PREFIX_SIZE)),
    };
    // A batch more than the goal may stay: the next pod that leaves or comes changes nothing in EC2.
    let spare = usable.saturating_sub(goal);
    let needed = demand.saturating_sub(usable);
    Target { wanted, needed, surplus: spare.saturating_sub(batch), spare, why }
}

fn clamp(n: i64) -> u32 {
    u32::try_from(n.max(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warm(warm_eni: u32, warm_ip: u32, minimum_ip: u32, warm_prefix: u32) -> Policy {
        Policy::AddOn(WarmTargets { warm_eni, warm_ip, minimum_ip, warm_prefix })
    }

    fn frame(mode: Mode, slots_per_eni: u32) -> Frame {
        Frame { mode, slots_per_eni, max_pods: 110 }
    }

    fn pool(total: u32, assigned: u32) -> Counts {
        Counts { total, assigned, ..Counts::default() }
    }

    fn prefixes(prefixes: u32, free_prefixes: u32, assigned: u32) -> Counts {
        Counts { total: prefixes * PREFIX_SIZE, assigned, prefixes, free_prefixes, ..Counts::default() }
    }

    /// The add-on's own vectors for WARM_IP_TARGET=5.
    #[test]
    fn warm_ip_target_vectors() {
        let f = frame(Mode::Addresses, 14);
        let t = |c| target(warm(1, 5, 0, 0), &f, &c);
        assert_eq!(t(pool(0, 0)).wanted, Wanted::Addresses(5));
        assert_eq!(t(pool(2, 0)).wanted, Wanted::Addresses(3));
        assert_eq!((t(pool(5, 0)).wanted, t(pool(5, 0)).surplus), (Wanted::Enough, 0));
        assert_eq!(t(pool(8, 0)).surplus, 3);
    }

    #[test]
    fn minimum_ip_target_is_a_floor_for_the_total() {
        let f = frame(Mode::Addresses, 14);
        let t = |c| target(warm(1, 2, 10, 0), &f, &c);
        assert_eq!(t(pool(0, 0)).wanted, Wanted::Addresses(10));
        assert_eq!(t(pool(10, 8)).wanted, Wanted::Enough);
        assert_eq!(t(pool(10, 9)).wanted, Wanted::Addresses(1));
        assert_eq!(t(pool(12, 2)).surplus, 2, "never below the minimum");
    }

    /// The add-on's own vectors for prefixes with WARM_IP_TARGET=5.
    #[test]
    fn warm_ip_target_with_prefixes_vectors() {
        let f = frame(Mode::Prefixes, 14);
        let t = |c| target(warm(1, 5, 0, 0), &f, &c);
        assert_eq!(t(prefixes(0, 0, 0)).wanted, Wanted::Prefixes(1));
        assert_eq!((t(prefixes(2, 2, 0)).wanted, t(prefixes(2, 2, 0)).surplus), (Wanted::Enough, PREFIX_SIZE));
        assert_eq!((t(prefixes(1, 1, 0)).wanted, t(prefixes(1, 1, 0)).surplus), (Wanted::Enough, 0));
    }

    /// The add-on's LOW table: three addresses an ENI.
    #[test]
    fn warm_eni_target_vectors() {
        let f = frame(Mode::Addresses, 3);
        let low = |eni, c| target(warm(eni, 0, 0, 0), &f, &c).wanted != Wanted::Enough;
        assert!(low(1, pool(3, 1)), "3 held, 1 used, one ENI wanted free");
        assert!(!low(0, pool(3, 1)));
        assert!(low(0, pool(3, 3)));
        assert!(!low(5, pool(110, 110)), "never above max pods");
        // An idle m4.4xlarge keeps one ENI; the second comes with the first pod.
        let big = frame(Mode::Addresses, 29);
        assert_eq!(target(warm(1, 0, 0, 0), &big, &pool(29, 0)).wanted, Wanted::Enough);
        assert_eq!(target(warm(1, 0, 0, 0), &big, &pool(29, 1)).wanted, Wanted::Enis(1));
    }

    #[test]
    fn warm_prefix_target_vectors() {
        let f = frame(Mode::Prefixes, 9);
        let t = |n, c| target(warm(1, 0, 0, n), &f, &c);
        assert_eq!(t(1, prefixes(0, 0, 0)).wanted, Wanted::Prefixes(1));
        assert_eq!(t(1, prefixes(1, 1, 0)).wanted, Wanted::Enough);
        assert_eq!(t(1, prefixes(1, 0, 1)).wanted, Wanted::Prefixes(1));
        assert_eq!(t(2, prefixes(2, 2, 0)).wanted, Wanted::Enough);
        assert_eq!(t(1, prefixes(3, 2, 16)).surplus, PREFIX_SIZE);
    }

    #[test]
    fn no_warm_prefix_does_not_swing_between_none_and_one() {
        let f = frame(Mode::Prefixes, 9);
        let t = target(warm(1, 0, 0, 0), &f, &prefixes(1, 1, 0));
        assert_eq!((t.wanted, t.surplus), (Wanted::Enough, 0));
        assert_eq!(target(warm(1, 0, 0, 0), &f, &prefixes(2, 1, 3)).surplus, PREFIX_SIZE, "the other has room");
    }

    #[test]
    fn waiting_pods_are_demand_under_every_policy() {
        let singles = frame(Mode::Addresses, 29);
        let burst = |total| Counts { total, waiting: 100, ..Counts::default() };
        assert_eq!(target(warm(1, 0, 0, 0), &singles, &burst(29)).wanted, Wanted::Enis(4));
        assert_eq!(target(warm(1, 2, 0, 0), &singles, &burst(0)).wanted, Wanted::Addresses(102));
        let packed = frame(Mode::Prefixes, 9);
        assert_eq!(target(warm(1, 0, 0, 1), &packed, &burst(0)).wanted, Wanted::Prefixes(8));
        assert_eq!(target(Policy::Demand, &packed, &burst(0)).wanted, Wanted::Prefixes(7));
    }

    #[test]
    fn a_cooling_address_is_never_available() {
        let f = frame(Mode::Addresses, 29);
        let c = Counts { total: 8, assigned: 4, cooling: 4, ..Counts::default() };
        assert_eq!(target(Policy::Demand, &f, &c).wanted, Wanted::Addresses(4));
        assert_eq!(target(warm(1, 2, 0, 0), &f, &c).wanted, Wanted::Addresses(2));
    }

    #[test]
    fn demand_is_needed_and_the_rest_is_head_room() {
        let f = frame(Mode::Addresses, 9);
        let c = Counts { total: 9, assigned: 9, scheduled: Some(16), ..Counts::default() };
        let t = target(Policy::Demand, &f, &c);
        assert_eq!((t.wanted, t.needed), (Wanted::Addresses(11), 7));
    }

    #[test]
    fn demand_rounds_up_to_batches_and_stops_at_max_pods() {
        let f = frame(Mode::Addresses, 29);
        let t = |c| target(Policy::Demand, &f, &c).wanted;
        assert_eq!(t(pool(0, 0)), Wanted::Addresses(4));
        assert_eq!(t(pool(4, 1)), Wanted::Addresses(4));
        assert_eq!(t(pool(8, 4)), Wanted::Enough);
        assert_eq!(t(pool(110, 110)), Wanted::Enough);
    }
}
