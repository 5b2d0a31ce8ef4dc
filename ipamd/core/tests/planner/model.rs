//! What the planner should say, found the slow way: one address and one slot at a time.

use flatwire_core::ids::{EniId, SubnetId};
use flatwire_core::plan::{AtMost, Means};
use flatwire_core::target::{BATCH, Counts, Frame, HEADROOM, Mode, PREFIX_SIZE, Policy, Wanted, WarmTargets};

/// What is free to be given, waiting ADDs served first.
fn available(c: &Counts) -> i64 {
    i64::from(c.total) - [c.assigned, c.cooling, c.waiting, c.orphans].map(i64::from).iter().sum::<i64>()
}

/// The first number for which `enough` holds.
fn count_up(enough: impl Fn(i64) -> bool) -> u32 {
    u32::try_from((0..).find(|n| enough(*n)).unwrap()).unwrap()
}

/// How far one may go down while `still` holds.
fn count_down(still: impl Fn(i64) -> bool) -> u32 {
    count_up(|n| !still(n + 1))
}

/// (wanted, surplus, spare)
pub fn target(policy: Policy, frame: &Frame, c: &Counts) -> (Wanted, u32, u32) {
    let full = c.total >= frame.max_pods && c.waiting == 0;
    match policy {
        Policy::Demand => demand(frame, c),
        Policy::AddOn(warm) if warm.warm_ip > 0 || warm.minimum_ip > 0 => addresses(&warm, frame, c, full),
        Policy::AddOn(warm) if frame.mode == Mode::Addresses => enis(warm.warm_eni, frame, c, full),
        Policy::AddOn(warm) => prefixes(warm.warm_prefix, c, full),
    }
}

fn addresses(warm: &WarmTargets, frame: &Frame, c: &Counts, full: bool) -> (Wanted, u32, u32) {
    let (ip, minimum) = (i64::from(warm.warm_ip), i64::from(warm.minimum_ip));
    let content = |more: i64| available(c) + more >= ip && i64::from(c.total) + more >= minimum;
    let short = if full { 0 } else { count_up(content) };
    if frame.mode == Mode::Addresses {
        let over = count_down(|less| content(-less));
        return (if short == 0 { Wanted::Enough } else { Wanted::Addresses(short) }, over, over);
    }
    let blocks = count_up(|blocks| blocks * 16 >= i64::from(short));
    let pods = i64::from(c.assigned) + ip;
    let over = 16
        * count_down(|less| {
            let left = (i64::from(c.prefixes) - less) * 16;
            less <= i64::from(c.free_prefixes) && left >= pods && left >= minimum
        });
    (if blocks == 0 { Wanted::Enough } else { Wanted::Prefixes(blocks) }, over, over)
}

fn enis(warm: u32, frame: &Frame, c: &Counts, full: bool) -> (Wanted, u32, u32) {
    let unit = i64::from(frame.slots_per_eni.max(1));
    let goal = i64::from(warm) * unit;
    // With no warm ENI wanted the next one comes with the last free address.
    let dry = warm == 0 && available(c) <= 0;
    let count = count_up(|n| available(c) + n * unit >= goal && (n > 0 || !dry));
    let keep = if warm == 0 { 1 } else { goal };
    let spare = count_down(|less| available(c) - less >= keep);
    (if full || count == 0 { Wanted::Enough } else { Wanted::Enis(count) }, 0, spare)
}

fn prefixes(warm: u32, c: &Counts, full: bool) -> (Wanted, u32, u32) {
    let free = available(c);
    let enough = |less: i64| warm > 0 || less == 0 || free - 16 * less > 0;
    let over = 16 * count_down(|less| i64::from(c.free_prefixes) - less >= i64::from(warm) && enough(less));
    let dry = warm == 0 && free <= 0;
    if full || (free >= 16 * i64::from(warm) && !dry) {
        return (Wanted::Enough, over, over);
    }
    // New prefixes go to those who wait first, then to the warm ones, of which those that nobody claims count.
    let whole = count_down(|n| n <= i64::from(c.free_prefixes) && n * 16 <= free);
    let waiting = count_up(|n| free + n * 16 >= 0);
    let missing = count_up(|n| i64::from(whole) + n >= i64::from(warm));
    (Wanted::Prefixes((waiting + missing).max(1)), over, over)
}

fn demand(frame: &Frame, c: &Counts) -> (Wanted, u32, u32) {
    let pods = (c.assigned + c.orphans + c.waiting).max(c.scheduled.unwrap_or(0));
    let batch = if frame.mode == Mode::Addresses { BATCH } else { PREFIX_SIZE };
    let mut goal = 0;
    while goal < pods + HEADROOM {
        goal += batch;
    }
    goal = goal.min(frame.max_pods.max(pods));
    let usable = i64::from(c.total.max(c.cooling) - c.cooling);
    let short = count_up(|n| usable + n >= i64::from(goal));
    let spare = count_down(|less| usable - less >= i64::from(goal));
    let surplus = count_down(|less| usable - less >= i64::from(goal + batch));
    let wanted = match (short, frame.mode) {
        (0, _) => Wanted::Enough,
        (n, Mode::Addresses) => Wanted::Addresses(n),
        (n, Mode::Prefixes) => Wanted::Prefixes(count_up(|blocks| blocks * 16 >= i64::from(n))),
    };
    (wanted, surplus, spare)
}

/// Where a slot may come from: an ENI that is here, or a new one by number in its subnet.
pub type Place = Result<EniId, (u32, SubnetId)>;

/// Slots taken, as prefixes or not, and how many needed addresses nothing brings.
pub fn plan(wanted: Wanted, needed: u32, means: &Means) -> (Vec<(Place, bool, u32)>, i64) {
    let (mut missing, prefixes) = match wanted {
        Wanted::Enough => (0, false),
        Wanted::Addresses(n) => (i64::from(n), false),
        Wanted::Prefixes(n) => (i64::from(n) * 16, true),
        Wanted::Enis(_) => (i64::MAX, means.mode == Mode::Prefixes),
    };
    let brings = |singles: bool| if prefixes && !singles { 16 } else { 1 };
    let most = |most: AtMost, singles: bool| if brings(singles) > 1 { most.prefixes } else { most.addresses };
    let here = means.enis.iter().filter(|room| !room.resting);
    let here = here.map(|room| (Ok(room.eni.clone()), room.singles_only, room.free_slots, room.at_most));
    let mut places: Vec<(Place, bool, u32, AtMost)> = here.collect();
    // All new ENIs are made in the first subnet, or the first that gives prefixes where they are wanted.
    let best = means.subnets.iter().min_by_key(|room| prefixes && room.singles_only);
    if let Some(room) = best {
        let new = |n| (Err((n, room.subnet.clone())), room.singles_only, means.slots_per_eni, room.at_most);
        places.extend((0..means.new_enis).map(new));
    }
    places.retain(|(_, _, slots, _)| *slots > 0);
    let mut unmade = 0;
    if let Wanted::Enis(count) = wanted {
        // The first ENI with room, to the brim; else so many new ones, each to the brim.
        let here = places.first().is_some_and(|(place, _, _, _)| place.is_ok());
        places.truncate(if here { 1 } else { usize::try_from(count).unwrap() });
        let full = i64::from(means.slots_per_eni) * brings(best.is_some_and(|room| room.singles_only));
        unmade = if here { 0 } else { (i64::from(count) - i64::try_from(places.len()).unwrap()) * full };
    }
    let whole_enis = matches!(wanted, Wanted::Enis(_));
    let head_room = if whole_enis { 0 } else { (missing - i64::from(needed)).max(0) };
    let mut later = if whole_enis { 0 } else { i64::from(means.later) };
    let mut taken = Vec::new();
    for (place, singles, slots, at_most) in places {
        if place.is_err() {
            // What comes by and by needs no new ENI; nor does head-room, where none may be made for it.
            missing -= std::mem::take(&mut later);
        }
        if place.is_err() && !means.spare_enis && missing <= head_room {
            break;
        }
        let mut asked = 0;
        while asked < slots && missing > 0 {
            missing -= brings(singles);
            asked += 1;
        }
        // What is not asked for at once comes from there later, and from nowhere else.
        let asked = most(at_most, singles).min(asked);
        taken.extend((asked > 0).then_some((place, brings(singles) > 1, asked)));
    }
    (taken, if whole_enis { unmade } else { (missing - later - head_room).max(0) })
}
