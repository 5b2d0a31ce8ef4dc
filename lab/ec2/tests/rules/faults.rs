//! Injected faults: refusals, lost replies, broken connections, delays.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lab_ec2::{Fault, FaultRule, Faults, Params, When};

use crate::World;

fn one(action: &str, fault: Fault) -> Faults {
    let rule = FaultRule { action: action.into(), access_key: None, when: When::Next(1), fault };
    Faults { calls: vec![rule], imds: Vec::new() }
}

#[test]
fn a_lost_reply_has_taken_effect() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let assign = [("NetworkInterfaceId", eni.as_str()), ("SecondaryPrivateIpAddressCount", "2")];
    world.ec2.set_faults(one("AssignPrivateIpAddresses", Fault::LostReply));
    let refusal = world.refused("AssignPrivateIpAddresses", &assign);
    assert_eq!((refusal.status, refusal.code.as_str()), (500, "InternalError"));
    assert_eq!(world.ec2.view(world.now).enis[0].secondary.len(), 2);
    world.ok("AssignPrivateIpAddresses", &assign);
}

#[test]
fn an_injected_refusal_has_not() {
    let world = World::new();
    let error = Fault::Error { code: "RequestLimitExceeded".into(), message: "Request limit exceeded.".into() };
    world.ec2.set_faults(one("Create*", error));
    let refusal = world.refused("CreateNetworkInterface", &[("SubnetId", &world.subnet)]);
    assert_eq!((refusal.status, refusal.code.as_str()), (503, "RequestLimitExceeded"));
    assert_eq!(world.free(&world.subnet), 251);
    world.new_eni(&world.subnet);
}

#[test]
fn delays_and_broken_connections_are_for_the_transport_to_carry_out() {
    let world = World::new();
    let params = Params::new([("Action", "DescribeVpcs")]);
    world.ec2.set_faults(one("*", Fault::Delay { ms: 70 }));
    assert_eq!(world.ec2.query(world.now, &world.caller, &params).delay_ms, 70);
    world.ec2.set_faults(one("*", Fault::BrokenConnection));
    assert!(world.ec2.query(world.now, &world.caller, &params).broken);
    assert!(!world.ec2.query(world.now, &world.caller, &params).broken);
}

#[test]
fn watchers_hear_of_changes_and_of_nothing_else() {
    let world = World::new();
    let heard = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&heard);
    world.ec2.on_change(Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    let version = world.ec2.version();
    world.ok("DescribeVpcs", &[]);
    assert_eq!((heard.load(Ordering::SeqCst), world.ec2.version()), (0, version));
    world.new_eni(&world.subnet);
    assert_eq!(heard.load(Ordering::SeqCst), 1);
    assert!(world.ec2.version() > version);
}
