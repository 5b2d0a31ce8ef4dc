//! Where do the wanted addresses come from? An ENI with room, else a new one; prefixes or single addresses. Pure: the same
//! pool gives the same plan, and what cannot be had is said with its reason.

use crate::ids::{EniId, SubnetId};
use crate::ports::Want;
use crate::target::{Mode, PREFIX_SIZE, Wanted};

/// An ENI as the planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EniRoom {
    pub eni: EniId,
    /// Slots that could still be filled.
    pub free_slots: u32,
    /// A call on it is under way, or EC2 refused one a moment ago: leave it alone for now.
    pub resting: bool,
    /// EC2 had no free /28 for it a moment ago: take single addresses.
    pub singles_only: bool,
    pub at_most: AtMost,
}

/// How much one call may ask for in a subnet: less than wanted, once the subnet could not give as much as was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtMost {
    pub addresses: u32,
    pub prefixes: u32,
}

impl AtMost {
    pub const ANY: Self = Self { addresses: u32::MAX, prefixes: u32::MAX };

    /// What is not asked for now comes from the same place later: a further ENI would only cost a short subnet one more.
    fn of(self, want: Want) -> Want {
        match want {
            Want::Addresses(n) => Want::Addresses(n.min(self.addresses)),
            Want::Prefixes(n) => Want::Prefixes(n.min(self.prefixes)),
        }
    }
}

/// What the plan may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Means {
    pub mode: Mode,
    /// By device number.
    pub enis: Vec<EniRoom>,
    /// Further ENIs the instance may carry.
    pub new_enis: u32,
    /// Slots of a new ENI beside its own address.
    pub slots_per_eni: u32,
    /// Subnets that a new ENI may be made in now, best first.
    pub subnets: Vec<SubnetRoom>,
    /// Addresses that ENIs on their way, or with a call under way, have room for after that: worth waiting for.
    pub later: u32,
    /// A new ENI may be made for head-room alone.
    pub spare_enis: bool,
}

/// A subnet as the planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetRoom {
    pub subnet: SubnetId,
    /// EC2 had no free /28 in it a moment ago: take single addresses.
    pub singles_only: bool,
    pub at_most: AtMost,
}

impl Means {
    /// Where a new ENI is made: the first subnet with prefixes to give where prefixes are wanted, else the first.
    fn new_eni(&self, mode: Mode) -> Option<&SubnetRoom> {
        let with_prefixes = self.subnets.iter().find(|room| mode == Mode::Addresses || !room.singles_only);
        with_prefixes.or(self.subnets.first())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Assign { eni: EniId, want: Want },
    Create { subnet: SubnetId, want: Want },
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Addresses that are needed and that no step brings: the instance is full, or what could bring them rests.
    pub unmet: u32,
}

/// Of what is wanted pods need so many addresses now; the rest is head-room.
pub fn plan(wanted: Wanted, needed: u32, means: &Means) -> Plan {
    match wanted {
        Wanted::Enough => Plan::default(),
        Wanted::Addresses(n) => spread(n, needed, Mode::Addresses, means),
        Wanted::Prefixes(n) => spread(n * PREFIX_SIZE, needed, Mode::Prefixes, means),
        Wanted::Enis(n) => fill(n, means),
    }
}

/// Takes `addresses` from ENIs with room in order, then from new ENIs. A new ENI is three calls and a wait of seconds: it is
/// made for what no ENI will have room for in a moment, and filled with head-room when it is made anyway.
fn spread(addresses: u32, needed: u32, mode: Mode, means: &Means) -> Plan {
    let head_room = addresses.saturating_sub(needed);
    let mut missing = addresses;
    let mut plan = Plan::default();
    for room in means.enis.iter().filter(|room| !room.resting) {
        if missing == 0 {
            break;
        }
        if let Some((want, brings)) = take(missing, mode, room.singles_only, room.free_slots) {
            plan.steps.push(Step::Assign { eni: room.eni.clone(), want: room.at_most.of(want) });
            missing = missing.saturating_sub(brings);
        }
    }
    missing = missing.saturating_sub(means.later);
    let bearable = if means.spare_enis { 0 } else { head_room };
    for _ in 0..means.new_enis {
        let Some(room) = means.new_eni(mode).filter(|_| missing > bearable) else { break };
        let Some((want, brings)) = take(missing, mode, room.singles_only, means.slots_per_eni) else { break };
        plan.steps.push(Step::Create { subnet: room.subnet.clone(), want: room.at_most.of(want) });
        missing = missing.saturating_sub(brings);
    }
    plan.unmet = missing.saturating_sub(head_room);
    plan
}

/// Fills one ENI that has room, or takes `count` new ones, full.
fn fill(count: u32, means: &Means) -> Plan {
    let full = |slots: u32, singles: bool| if singles { slots } else { slots * per_slot(means.mode) };
    if let Some(room) = means.enis.iter().find(|room| !room.resting && room.free_slots > 0) {
        let want = room.at_most.of(want_of(means.mode, room.singles_only, room.free_slots));
        return Plan { steps: vec![Step::Assign { eni: room.eni.clone(), want }], unmet: 0 };
    }
    let Some(room) = means.new_eni(means.mode) else {
        return Plan { steps: Vec::new(), unmet: count * full(means.slots_per_eni, false) };
    };
    // An ENI that holds nothing but its own address brings nothing.
    let new_enis = if means.slots_per_eni == 0 { 0 } else { means.new_enis.min(count) };
    let want = room.at_most.of(want_of(means.mode, room.singles_only, means.slots_per_eni));
    let steps = (0..new_enis).map(|_| Step::Create { subnet: room.subnet.clone(), want }).collect();
    Plan { steps, unmet: (count - new_enis) * full(means.slots_per_eni, room.singles_only) }
}

/// A node that fell back to single addresses goes back to prefixes: one is asked for where one may be had again. Once it is
/// there the single addresses are surplus, and are given back first. `singles` is how many single addresses are held.
pub fn upgrade(singles: u32, means: &Means) -> Option<Step> {
    if means.mode != Mode::Prefixes || singles == 0 {
        return None;
    }
    let room = means.enis.iter().find(|room| !room.resting && !room.singles_only && room.free_slots > 0)?;
    Some(Step::Assign { eni: room.eni.clone(), want: Want::Prefixes(1) })
}

/// What to ask of one ENI, and how many addresses that brings.
fn take(missing: u32, mode: Mode, singles_only: bool, free_slots: u32) -> Option<(Want, u32)> {
    let slots = match mode {
        Mode::Prefixes if !singles_only => missing.div_ceil(PREFIX_SIZE).min(free_slots),
        _ => missing.min(free_slots),
    };
    let want = want_of(mode, singles_only, slots);
    let brings = match want {
        Want::Addresses(n) => n,
        Want::Prefixes(n) => n * PREFIX_SIZE,
    };
    (slots > 0).then_some((want, brings))
}

fn want_of(mode: Mode, singles_only: bool, slots: u32) -> Want {
    match mode {
        Mode::Prefixes if !singles_only => Want::Prefixes(slots),
        _ => Want::Addresses(slots),
    }
}

fn per_slot(mode: Mode) -> u32 {
    match mode {
        Mode::Addresses => 1,
        Mode::Prefixes => PREFIX_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that is wanted is needed.
    const ALL: u32 = u32::MAX;

    fn subnet(id: &str, singles_only: bool) -> SubnetRoom {
        SubnetRoom { subnet: SubnetId::new(id).unwrap(), singles_only, at_most: AtMost::ANY }
    }

    fn means(mode: Mode, free: &[u32], new_enis: u32) -> Means {
        let room = |(i, free_slots): (usize, &u32)| EniRoom {
            eni: EniId::new(format!("eni-{i}")).unwrap(),
            free_slots: *free_slots,
            resting: false,
            singles_only: false,
            at_most: AtMost::ANY,
        };
        Means {
            mode,
            enis: free.iter().enumerate().map(room).collect(),
            new_enis,
            slots_per_eni: 9,
            subnets: vec![subnet("subnet-1", false)],
            later: 0,
            spare_enis: true,
        }
    }

    fn text(plan: &Plan) -> String {
        let step = |s: &Step| match s {
            Step::Assign { eni, want } => format!("{eni}:{want}"),
            Step::Create { subnet, want } => format!("{}:{want}", subnet.as_str().replace("subnet", "new")),
        };
        let steps: Vec<String> = plan.steps.iter().map(step).collect();
        format!("{} unmet={}", steps.join(" | "), plan.unmet)
    }

    #[test]
    fn existing_enis_first_in_order_then_new_ones() {
        let p = plan(Wanted::Addresses(15), ALL, &means(Mode::Addresses, &[2, 0, 3], 2));
        assert_eq!(text(&p), "eni-0:2 addresses | eni-2:3 addresses | new-1:9 addresses | new-1:1 address unmet=0");
    }

    #[test]
    fn what_the_instance_cannot_carry_is_said() {
        let p = plan(Wanted::Addresses(50), ALL, &means(Mode::Addresses, &[2], 1));
        assert_eq!(text(&p), "eni-0:2 addresses | new-1:9 addresses unmet=39");
    }

    #[test]
    fn prefixes_on_the_primary_alone_serve_a_whole_node() {
        let p = plan(Wanted::Prefixes(7), ALL, &means(Mode::Prefixes, &[9], 2));
        assert_eq!(text(&p), "eni-0:7 prefixes unmet=0");
    }

    #[test]
    fn head_room_fills_what_is_made_and_makes_nothing_while_others_need_it() {
        let mut m = means(Mode::Addresses, &[9], 2);
        assert_eq!(
            text(&plan(Wanted::Addresses(20), 16, &m)),
            "eni-0:9 addresses | new-1:9 addresses | new-1:2 addresses unmet=0"
        );
        m.spare_enis = false;
        assert_eq!(text(&plan(Wanted::Addresses(20), 16, &m)), "eni-0:9 addresses | new-1:9 addresses unmet=0");
        assert_eq!(text(&plan(Wanted::Addresses(11), 7, &m)), "eni-0:9 addresses unmet=0");
        m.new_enis = 0;
        assert_eq!(text(&plan(Wanted::Addresses(20), 16, &m)), "eni-0:9 addresses unmet=7");
    }

    #[test]
    fn room_that_comes_in_a_moment_is_waited_for() {
        let mut m = means(Mode::Addresses, &[], 2);
        m.later = 5;
        assert_eq!(text(&plan(Wanted::Addresses(5), ALL, &m)), " unmet=0");
        assert_eq!(text(&plan(Wanted::Addresses(12), ALL, &m)), "new-1:7 addresses unmet=0");
    }

    #[test]
    fn a_fragmented_eni_takes_singles_and_the_others_prefixes() {
        let mut m = means(Mode::Prefixes, &[9, 9], 0);
        m.enis[0].singles_only = true;
        assert_eq!(text(&plan(Wanted::Prefixes(2), ALL, &m)), "eni-0:9 addresses | eni-1:2 prefixes unmet=0");
    }

    #[test]
    fn a_resting_eni_is_left_alone() {
        let mut m = means(Mode::Addresses, &[9, 9], 1);
        m.enis[0].resting = true;
        m.subnets.clear();
        assert_eq!(text(&plan(Wanted::Addresses(12), ALL, &m)), "eni-1:9 addresses unmet=3");
    }

    #[test]
    fn a_short_subnet_is_asked_for_less_and_not_for_further_enis() {
        let mut m = means(Mode::Addresses, &[9], 1);
        m.enis[0].at_most = AtMost { addresses: 2, prefixes: 1 };
        assert_eq!(text(&plan(Wanted::Addresses(8), ALL, &m)), "eni-0:2 addresses unmet=0");
        assert_eq!(text(&plan(Wanted::Enis(1), ALL, &m)), "eni-0:2 addresses unmet=0");
    }

    #[test]
    fn a_fragmented_subnet_gives_way_to_its_sibling_and_to_singles_last() {
        let mut m = means(Mode::Prefixes, &[0], 2);
        m.subnets = vec![subnet("subnet-1", true), subnet("subnet-2", false)];
        assert_eq!(text(&plan(Wanted::Prefixes(2), ALL, &m)), "new-2:2 prefixes unmet=0");
        m.subnets.pop();
        assert_eq!(text(&plan(Wanted::Prefixes(1), ALL, &m)), "new-1:9 addresses | new-1:7 addresses unmet=0");
    }

    #[test]
    fn a_subnet_that_could_not_give_as_much_is_asked_for_less() {
        let mut m = means(Mode::Addresses, &[9], 1);
        m.enis[0].at_most = AtMost { addresses: 4, prefixes: 1 };
        assert_eq!(text(&plan(Wanted::Enis(1), ALL, &m)), "eni-0:4 addresses unmet=0");
        m.mode = Mode::Prefixes;
        assert_eq!(text(&plan(Wanted::Prefixes(3), ALL, &m)), "eni-0:1 prefix unmet=0");
    }

    #[test]
    fn a_node_on_singles_asks_for_a_prefix_again() {
        let mut m = means(Mode::Prefixes, &[0, 3], 0);
        let step = Step::Assign { eni: EniId::new("eni-1").unwrap(), want: Want::Prefixes(1) };
        assert_eq!(upgrade(4, &m), Some(step));
        assert_eq!(upgrade(0, &m), None, "nothing to go back from");
        m.enis[1].singles_only = true;
        assert_eq!(upgrade(4, &m), None, "EC2 had no /28 a moment ago");
    }

    #[test]
    fn whole_enis_fill_what_has_room_before_taking_new_ones() {
        assert_eq!(text(&plan(Wanted::Enis(2), ALL, &means(Mode::Addresses, &[0, 4], 2))), "eni-1:4 addresses unmet=0");
        let p = plan(Wanted::Enis(3), ALL, &means(Mode::Addresses, &[0], 2));
        assert_eq!(text(&p), "new-1:9 addresses | new-1:9 addresses unmet=9");
    }
}
