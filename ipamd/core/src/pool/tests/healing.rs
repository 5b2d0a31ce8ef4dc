//! What the pool does when the kernel changes under it.

use super::*;
use crate::contest::QUICK_REPAIRS;
use crate::ports::{Repair, RepairKind};

impl World {
    /// A step whose wishes to the kernel are returned and not carried out.
    fn wishes(&mut self, event: Event) -> Vec<(OpId, Arc<NodePlan>, Look)> {
        let commands = self.pool.step(event, self.now);
        let wish = |command| match command {
            Command::Kernel { op, plan, look } => Some((op, plan, look)),
            Command::Note(note) => {
                self.notes.push(note);
                None
            }
            _ => None,
        };
        commands.into_iter().filter_map(wish).collect()
    }

    /// The one look that is under way ends with this to tell.
    fn looked(&mut self, op: OpId, plan: &NodePlan, repaired: Vec<Repair>) {
        let report = KernelReport { repaired, ..self.kernel(plan) };
        let result = Ok((report, self.pods_seen()));
        self.wishes(Event::Kernel { op, result });
    }
}

fn repair(object: &str, undone: bool) -> Repair {
    Repair { kind: RepairKind::Rule, object: object.to_owned(), text: format!("{object} added"), undone }
}

fn up() -> World {
    let mut world = World::new("m5.large", &[], &["10.0.16.0/28"]);
    world.step(Event::Tick);
    world.run(1_000);
    world
}

#[test]
fn a_change_in_the_kernel_is_looked_at_at_once_and_again_only_when_something_changed_again() {
    let mut world = up();
    let (op, plan, _) = world.wishes(Event::KernelChanged).pop().expect("a look");
    // Told of twice more while it is under way: one more look, and a pause before it.
    for _ in 0..2 {
        assert!(world.wishes(Event::KernelChanged).is_empty());
    }
    world.looked(op, &plan, vec![repair("rule 512", true)]);
    let (at, _) = world.pool.poll_deadline().unwrap();
    assert_eq!(at, world.now.plus_ms(LOOK_SPACING_MS));
    world.now = at;
    let (op, plan, _) = world.wishes(Event::Tick).pop().expect("the second look");
    world.looked(op, &plan, Vec::new());
    assert!(world.wishes(Event::Tick).is_empty(), "nothing was found, nothing changed: no third one");
    assert_eq!(world.notes.iter().filter(|note| matches!(note, Note::Repaired { .. })).count(), 1);
}

#[test]
fn before_there_is_a_plan_a_change_in_the_kernel_is_no_reason_for_anything() {
    let mut world = World::new("m5.large", &[], &["10.0.16.0/28"]);
    assert!(world.wishes(Event::KernelChanged).is_empty());
    let deadline = world.pool.poll_deadline();
    assert!(deadline.is_none_or(|(at, _)| at > world.now), "nothing can be done, and it is due: {deadline:?}");
}

#[test]
fn only_what_somebody_undid_is_told_as_a_repair() {
    let mut world = up();
    let (op, plan, _) = world.wishes(Event::KernelChanged).pop().expect("a look");
    world.notes.clear();
    world.looked(op, &plan, vec![repair("rule 512", true), repair("rule 1536", false)]);
    let told: Vec<_> = world.notes.iter().map(ToString::to_string).collect();
    assert_eq!(told, ["put right in the kernel: rule 512 added"]);
}

#[test]
fn what_is_changed_back_again_and_again_is_let_be_for_longer_and_longer_and_reported() {
    let mut world = up();
    let mut repairs_at = Vec::new();
    let start = world.now;
    // Somebody who undoes every repair at once, for ten minutes.
    while world.now.since_ms(start) < 600_000 {
        let Some((op, plan, look)) = world.wishes(Event::KernelChanged).pop() else {
            world.now = world.pool.poll_deadline().map_or(world.now, |(at, _)| at.max(world.now.plus_ms(1)));
            continue;
        };
        let mut repaired = vec![];
        if !look.let_be.contains("rule 512") {
            repairs_at.push(world.now.since_ms(start) / 1_000);
            repaired.push(repair("rule 512", true));
        }
        world.looked(op, &plan, repaired);
        world.now = world.now.plus_ms(LOOK_SPACING_MS);
    }
    assert_eq!(repairs_at.len(), 12, "3 at once, then after 1, 2, 4, … 256 s: {repairs_at:?}");
    assert!(repairs_at[usize::try_from(QUICK_REPAIRS).unwrap() - 1] == 0, "{repairs_at:?}");
    assert!(world.notes.iter().any(|note| matches!(note, Note::Contested { pause_ms: 4_000, .. })));
    let status = world.pool.status(world.now);
    assert_eq!(status.contests.iter().map(|c| (c.object.as_str(), c.repairs)).collect::<Vec<_>>(), [("rule 512", 12)]);
    let findings = world.pool.audit().findings;
    assert!(findings.iter().any(|f| f.kind.as_str() == "kernel_contested" && f.object == "rule 512"), "{findings:#?}");

    // They give up; after a while it is forgotten.
    world.run(2 * crate::contest::LONGEST_PAUSE_MS);
    assert!(world.pool.status(world.now).contests.is_empty());
}

#[test]
fn a_look_knows_the_youngest_sandbox_of_each_pod_and_the_addresses_that_were_left() {
    let mut world = up();
    let pod = PodName { namespace: "default".into(), name: "web-0".into() };
    for n in [1, 2] {
        let request = world.request();
        world.step(Event::Add { request, sandbox: sandbox(n), pod: pod.clone(), patience_ms: None });
        world.now = world.now.plus_ms(1_000);
    }
    let look = |world: &mut World| {
        let (op, plan, seen) = world.wishes(Event::KernelChanged).pop().expect("a look");
        world.looked(op, &plan, Vec::new());
        world.now = world.now.plus_ms(LOOK_SPACING_MS);
        seen
    };
    let seen = look(&mut world);
    let second = world.pool.ledger().pods[&sandbox(2)].address;
    assert_eq!(seen.pods.iter().map(|pod| (pod.address, pod.settled)).collect::<Vec<_>>(), [(second, false)]);
    assert_eq!(seen.pods[0].link, crate::naming::host_if_name("eni", "default", "web-0", 0));
    assert_eq!(seen.pods[0].mac, crate::naming::mac("c2/eth0", "host"));

    let first = world.pool.ledger().pods[&sandbox(1)].address;
    world.del(1);
    world.now = world.now.plus_ms(1);
    assert!(look(&mut world).left.is_empty(), "a look for it was there just now");
    world.now = world.now.plus_ms(FORGET_SPACING_MS);
    assert_eq!(look(&mut world).left, BTreeSet::from([first]));
    world.now = world.now.plus_ms(FORGET_SPACING_MS);
    assert!(look(&mut world).left.is_empty(), "once is enough");
    world.now = world.now.plus_ms(super::super::pods::UNWIRED_GRACE_MS);
    assert!(look(&mut world).pods[0].settled);
}
