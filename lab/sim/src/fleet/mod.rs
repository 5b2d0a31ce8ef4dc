//! A thousand nodes that start at once, all on one EC2 whose buckets they share with strangers: how long until every pod has
//! its address, beside the least time that the buckets leave room for, and beside the add-on's policy in the same account.
//!
//! The floor of an action is (n − b) / r: n calls that the limits of the instance type leave no way around, b the bucket's
//! burst, r what strangers leave of its refill. The slowest action decides.

mod addon;
mod calls;
mod table;

use std::collections::{BTreeMap, BTreeSet};

use flatwire_core::ids::{InstanceId, SubnetId, Time};
use flatwire_core::pool::{NodeState, Pool};
use lab_ec2::{Bucket, Buckets, CallCount, Caller, Ec2, Options, RunInstance};

pub use calls::{Bill, bill};
pub use table::{SHAPES, Verdict, race_both};

use crate::cloud::Cloud;
use crate::dice::Dice;
use crate::node::{Node, Pace, Scene};
use crate::runtime::Habits;
use crate::shape::Shape;
use crate::story::{Story, Telling};
use crate::tally::Tally;
use addon::AddOnNode;

const BEGIN: Time = Time(1_800_000_000_000);
const KEY: &str = "AKIANODE";
/// One way to EC2 or back takes so long at most.
const ONE_WAY_MS: u64 = 300;
/// The kubelet's pause before it tries a pod again, and half as long again at most.
const AGAIN_MS: u64 = 10_000;
/// Who is not served by then never is.
const GIVE_UP_MS: u64 = 24 * 3_600_000;
const WHOLE: u64 = 1_000;
const NODES_PER_VPC: u32 = 250;

/// What is launched where.
#[derive(Debug, Clone)]
pub struct Fleet {
    pub nodes: u32,
    pub shape: Shape,
    pub buckets: Buckets,
    /// Thousandths of every bucket's refill that other tenants use up steadily.
    pub others: u32,
    pub seed: u64,
}

/// Who decides on the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Brain {
    /// The pool of this repository.
    Ours,
    /// The add-on, as its own sources have it.
    AddOn,
}

/// What became of a fleet.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Until the last pod had its address; `None` if that never came.
    pub took_ms: Option<u64>,
    /// From the pod's binding to its address, sorted.
    pub waits_ms: Vec<u64>,
    pub calls: BTreeMap<String, CallCount>,
    pub floor_ms: u64,
}

impl Outcome {
    /// Times the floor; `None` where there is no floor, or no end.
    pub fn over_floor(&self) -> Option<f64> {
        let took = u32::try_from(self.took_ms?).ok()?;
        let floor = u32::try_from(self.floor_ms).ok().filter(|floor| *floor > 0)?;
        Some(f64::from(took) / f64::from(floor))
    }

    /// So many of a hundred pods waited no longer.
    pub fn percentile_ms(&self, percent: usize) -> u64 {
        let at = (self.waits_ms.len() * percent).div_ceil(100).saturating_sub(1);
        self.waits_ms.get(at).copied().unwrap_or(0)
    }

    pub fn counts(&self) -> CallCount {
        let sum = |sum: CallCount, one: &CallCount| CallCount { ok: sum.ok + one.ok, errors: sum.errors + one.errors };
        self.calls.values().fold(CallCount::default(), sum)
    }
}

/// A node of either kind.
trait Member {
    fn next(&self) -> Option<Time>;
    fn advance(&mut self, now: Time);
    /// When each of its pods was given its address, as far as they were.
    fn served(&self) -> &[Time];
}

impl Fleet {
    /// On the published buckets, a third of which others use up.
    pub fn new(nodes: u32, shape: Shape) -> Self {
        Self { nodes, shape, buckets: Buckets::published(), others: 334, seed: 1 }
    }

    /// The least time that the buckets leave room for.
    pub fn floor_ms(&self) -> u64 {
        let time = |(action, calls): (String, u64)| {
            let class = if action.starts_with("Describe") { self.buckets.non_mutating } else { self.buckets.mutating };
            let Bucket { burst, per_second } = self.buckets.actions.get(&action).copied().unwrap_or(class);
            let beyond = (calls * u64::from(self.nodes)).saturating_sub(u64::from(burst));
            let left_per_ms = u64::from(per_second) * (WHOLE - u64::from(self.others).min(WHOLE));
            (beyond * 1_000 * WHOLE).div_ceil(left_per_ms.max(1))
        };
        self.shape.minimum().into_iter().map(time).max().unwrap_or(0)
    }

    pub fn run(&self, brain: Brain) -> Outcome {
        let (ec2, instances) = self.launch();
        let mut dice = Dice::new(self.seed);
        let begin = BEGIN.plus_ms(2_000);
        let (last, waits_ms) = match brain {
            Brain::Ours => {
                let nodes = instances.map(|id| OurNode::new(&ec2, id, &self.shape, dice.split(), begin));
                race(begin, self.shape.pods, nodes)
            }
            Brain::AddOn => {
                let nodes = instances.map(|id| AddOnNode::new(&ec2, id, &self.shape, dice.split(), begin));
                race(begin, self.shape.pods, nodes)
            }
        };
        let took_ms = last.map(|at| at.since_ms(begin));
        Outcome { took_ms, waits_ms, calls: ec2.calls(), floor_ms: self.floor_ms() }
    }

    /// The account, with every instance running.
    fn launch(&self) -> (Ec2, impl Iterator<Item = InstanceId>) {
        let fits = "invariant: the account of a fleet can be set up";
        let max_enis = self.nodes.saturating_mul(16).max(5_000);
        let options = Options { seed: self.seed, throttle: Some(self.buckets.clone()), max_enis, ..Options::default() };
        let ec2 = Ec2::new(options);
        ec2.share_buckets(self.others);
        let cidr = "10.0.0.0/16".parse().expect(fits);
        let mut subnet: Option<SubnetId> = None;
        let mut launched = Vec::new();
        for number in 0..self.nodes {
            // The buckets are the account's, so it matters to nobody how many VPCs there are; addresses must not run out.
            let here = subnet.take().filter(|_| number % NODES_PER_VPC != 0).unwrap_or_else(|| {
                let vpc = ec2.create_vpc(BEGIN, cidr, "fleet").expect(fits);
                ec2.create_subnet(BEGIN, &vpc, cidr, None, Default::default()).expect(fits)
            });
            let run = RunInstance {
                ipv4_prefix_count: self.shape.at_launch,
                ..RunInstance::new(self.shape.instance_type, here.clone())
            };
            launched.push(ec2.run_instance(BEGIN, &run).expect(fits));
            subnet = Some(here);
        }
        (ec2, launched.into_iter())
    }
}

fn caller() -> Caller {
    Caller { access_key: KEY.to_owned(), ..Caller::lab("123456789012") }
}

/// Lets all of them run until the last pod has its address: when that was, and how long each waited.
fn race<M: Member>(begin: Time, pods: u32, members: impl Iterator<Item = Box<M>>) -> (Option<Time>, Vec<u64>) {
    let mut members: Vec<Box<M>> = members.collect();
    let mut agenda: BTreeSet<(Time, usize)> =
        members.iter().enumerate().filter_map(|(i, member)| Some((member.next()?, i))).collect();
    let wanted = usize::try_from(pods).unwrap_or(usize::MAX);
    let mut unserved = members.len();
    let mut last = None;
    while let Some((now, i)) = agenda.pop_first().filter(|(at, _)| unserved > 0 && at.since_ms(begin) <= GIVE_UP_MS) {
        let Some(member) = members.get_mut(i) else { continue };
        let waited = member.served().len() < wanted;
        member.advance(now);
        if waited && member.served().len() >= wanted {
            unserved -= 1;
            last = Some(now);
        }
        agenda.extend(member.next().map(|at| (at.max(now), i)));
    }
    let mut waits_ms: Vec<u64> =
        members.iter().flat_map(|member| member.served()).map(|at| at.since_ms(begin)).collect();
    waits_ms.sort_unstable();
    (last.filter(|_| unserved == 0), waits_ms)
}

/// The simulator's node with the real pool.
struct OurNode<'e> {
    ec2: &'e Ec2,
    node: Node<Pool>,
    served: Vec<Time>,
    story: Story,
    tally: Tally,
}

impl<'e> OurNode<'e> {
    fn new(ec2: &'e Ec2, instance: InstanceId, shape: &Shape, dice: Dice, now: Time) -> Box<Self> {
        let cloud = Cloud {
            caller: caller(),
            instance,
            page_size: 100,
            describe_lag_ms: 0,
            imds_partial: false,
            imds_stands: None,
        };
        let habits = Habits { again_ms: AGAIN_MS, ..Habits::default() };
        let pace = Pace { cloud_ms: ONE_WAY_MS, kernel_ms: 20, slow_percent: 0 };
        let node = Node::new(shape.settings(), cloud, habits, pace, dice, now);
        let (story, tally) = (Story::new(Telling::Nothing, now), Tally::default());
        let mut new = Self { ec2, node, served: Vec::new(), story, tally };
        new.advance(now);
        new.node.hear_state(NodeState { scheduled_pods: Some(shape.pods), ..NodeState::default() });
        new.node.start_pods(shape.pods, None, now);
        Box::new(new)
    }
}

impl Member for OurNode<'_> {
    fn next(&self) -> Option<Time> {
        self.node.next()
    }

    fn advance(&mut self, now: Time) {
        let mut scene = Scene { ec2: self.ec2, story: &mut self.story, tally: &mut self.tally };
        self.node.advance(now, &mut scene);
        let Some(pool) = self.node.daemon() else { return };
        if pool.ledger().pods.len() > self.served.len() {
            self.served = pool.ledger().pods.values().map(|pod| pod.at).collect();
        }
    }

    fn served(&self) -> &[Time] {
        &self.served
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixty nodes in an account with six hundredths of the published buckets, a third of which others use up.
    fn sixty(shape: Shape) -> Fleet {
        let hundredths = |bucket: Bucket| Bucket { burst: bucket.burst * 6 / 100, per_second: bucket.per_second / 5 };
        let mut buckets = Buckets::published();
        buckets.non_mutating = hundredths(buckets.non_mutating);
        buckets.mutating = hundredths(buckets.mutating);
        buckets.actions.values_mut().for_each(|bucket| *bucket = hundredths(*bucket));
        // Six hundredths of two thirds are a fifth of a fifth.
        Fleet { buckets, others: 800, ..Fleet::new(60, shape) }
    }

    #[test]
    fn the_floor_is_what_the_slowest_bucket_leaves_room_for() {
        let fleet = Fleet { others: 0, ..Fleet::new(1_000, Shape::singles("m5.large", 16)) };
        assert_eq!(fleet.floor_ms(), 190_000, "AttachNetworkInterface");
        let fleet = Fleet { others: 0, ..Fleet::new(1_000, Shape::singles("m5.large", 27)) };
        assert_eq!(fleet.floor_ms(), 390_000, "two each");
        let fleet = Fleet { others: 0, ..Fleet::new(1_000, Shape::prefixes("m5.large", 0, 12)) };
        assert_eq!(fleet.floor_ms(), 180_000, "AssignPrivateIpAddresses");
        assert_eq!(Fleet::new(1_000, Shape::prefixes("m5.large", 7, 110)).floor_ms(), 0);
    }

    #[test]
    fn a_fleet_that_starts_at_once_is_served_within_a_fifth_over_the_floor() {
        let fleet = sixty(Shape::singles("m5.large", 16));
        let (ours, addon) = (fleet.run(Brain::Ours), fleet.run(Brain::AddOn));
        assert_eq!((ours.floor_ms, ours.waits_ms.len()), (285_000, 60 * 16));
        let ratio = ours.over_floor().unwrap();
        assert!((1.0..=1.2).contains(&ratio), "{ratio}\n{ours:?}");
        assert!(addon.over_floor().is_none_or(|addon| addon > ratio), "{addon:?}");
    }

    #[test]
    fn a_fleet_launched_with_prefixes_asks_ec2_for_nothing() {
        let ours = sixty(Shape::prefixes("m5.large", 7, 110)).run(Brain::Ours);
        assert_eq!((ours.waits_ms.len(), ours.calls.len()), (60 * 110, 0), "{:?}", ours.calls);
        assert!(ours.took_ms.unwrap() < 2_000);
    }
}
