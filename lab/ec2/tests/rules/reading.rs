//! Describing: filters, pages, and what is not visible yet.

use std::collections::BTreeSet;

use lab_ec2::{Delays, Options};

use crate::World;

fn found(world: &World, filters: &[(&str, &str)]) -> Vec<String> {
    let names: Vec<(String, String)> =
        (1..=filters.len()).map(|n| (format!("Filter.{n}.Name"), format!("Filter.{n}.Value.1"))).collect();
    let mut pairs = Vec::new();
    for ((name, value), (filter, wanted)) in names.iter().zip(filters) {
        pairs.push((name.as_str(), *filter));
        pairs.push((value.as_str(), *wanted));
    }
    world.ok("DescribeNetworkInterfaces", &pairs).all("networkInterfaceId")
}

#[test]
fn filters_find_what_ec2s_filters_find() {
    let world = World::new();
    let instance = world.new_instance("m5.large");
    let eni = world
        .ok(
            "CreateNetworkInterface",
            &[
                ("SubnetId", &world.subnet),
                ("Description", "aws-K8S-i-1"),
                ("PrivateIpAddresses.1.PrivateIpAddress", "10.0.0.77"),
                ("PrivateIpAddresses.1.Primary", "true"),
                ("PrivateIpAddresses.2.PrivateIpAddress", "10.0.0.78"),
                ("PrivateIpAddresses.2.Primary", "false"),
                ("TagSpecification.1.ResourceType", "network-interface"),
                ("TagSpecification.1.Tag.1.Key", "owner"),
                ("TagSpecification.1.Tag.1.Value", "me"),
            ],
        )
        .one("networkInterfaceId");
    let other = world.new_eni(&world.elsewhere);
    let only = vec![eni.clone()];
    assert_eq!(found(&world, &[("status", "available"), ("addresses.private-ip-address", "10.0.0.78")]), only);
    assert!(found(&world, &[("private-ip-address", "10.0.0.78")]).is_empty());
    assert_eq!(found(&world, &[("private-ip-address", "10.0.0.77")]), only);
    assert_eq!(found(&world, &[("description", "aws-K8S-*")]), only);
    assert_eq!(found(&world, &[("tag:owner", "m?")]), only);
    assert_eq!(found(&world, &[("tag-key", "own*")]), only);
    assert_eq!(found(&world, &[("availability-zone", "us-east-1b")]), [other]);
    assert_eq!(found(&world, &[("vpc-id", &world.vpc)]).len(), 3);
    world.attach(&eni, &instance, "1").unwrap();
    for filter in [
        ("attachment.device-index", "1"),
        ("attachment.delete-on-termination", "false"),
        ("mac-address", world.eni(&eni).one("macAddress").as_str()),
    ] {
        assert_eq!(found(&world, &[("attachment.instance-id", &instance), filter]), only, "{filter:?}");
    }
    assert_eq!(found(&world, &[("attachment.instance-id", &instance), ("attachment.status", "attached")]).len(), 2);
    let unknown = [("Filter.1.Name", "colour"), ("Filter.1.Value.1", "red")];
    let refusal = world.refused("DescribeNetworkInterfaces", &unknown);
    assert_eq!(refusal.code, "InvalidParameterValue");
    assert_eq!(refusal.message, "The filter 'colour' is invalid");
}

#[test]
fn pages_show_everything_once() {
    let world = World::new();
    let all: BTreeSet<String> = (0..23).map(|_| world.new_eni(&world.subnet)).collect();
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let pairs = [("MaxResults", "10"), ("NextToken", token.as_str())];
        let answer = world.ok("DescribeNetworkInterfaces", &pairs);
        seen.extend(answer.all("networkInterfaceId"));
        token = answer.all("nextToken").pop().unwrap_or_default();
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), 23);
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), all);
    let eni = all.first().unwrap();
    let table: [(&[(&str, &str)], &str); 4] = [
        (&[("MaxResults", "4")], "InvalidParameterValue"),
        (&[("MaxResults", "1001")], "InvalidParameterValue"),
        (&[("MaxResults", "5"), ("NetworkInterfaceId.1", eni)], "InvalidParameterCombination"),
        (&[("NextToken", "abc")], "InvalidPaginationToken"),
    ];
    for (pairs, code) in table {
        assert_eq!(world.code("DescribeNetworkInterfaces", pairs), code, "{pairs:?}");
    }
}

#[test]
fn large_accounts_must_paginate_where_that_is_set() {
    let options = Options { throttle: None, delays: Delays::NONE, max_unpaginated: Some(3), ..Options::default() };
    let world = World::with(options);
    for _ in 0..4 {
        world.new_eni(&world.subnet);
    }
    assert_eq!(world.code("DescribeNetworkInterfaces", &[]), "OperationNotPermitted");
    world.ok("DescribeNetworkInterfaces", &[("MaxResults", "5")]);
}

#[test]
fn describes_lag_where_that_is_set() {
    let options = Options { throttle: None, delays: Delays::NONE, describe_lag_ms: 1_000, ..Options::default() };
    let mut world = World::with(options);
    let eni = world.new_eni(&world.subnet);
    let describe = [("NetworkInterfaceId.1", eni.as_str())];
    assert_eq!(world.code("DescribeNetworkInterfaces", &describe), "InvalidNetworkInterfaceID.NotFound");
    world.pass(1_000);
    assert!(world.eni(&eni).all("ipv4Prefix").is_empty());
    world.ok("AssignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), ("Ipv4PrefixCount", "1")]);
    assert!(world.eni(&eni).all("ipv4Prefix").is_empty());
    world.pass(500);
    world.ok("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]);
    world.pass(500);
    assert_eq!(world.eni(&eni).all("ipv4Prefix").len(), 1, "deleted, but still listed");
    world.pass(500);
    assert_eq!(world.code("DescribeNetworkInterfaces", &describe), "InvalidNetworkInterfaceID.NotFound");
}

#[test]
fn instance_types_show_their_limits() {
    let world = World::new();
    let one = world.ok("DescribeInstanceTypes", &[("InstanceType.1", "p4d.24xlarge")]);
    assert_eq!(one.all("networkCardIndex").len(), 4);
    assert_eq!(one.one("ipv4AddressesPerInterface"), "50");
    assert_eq!(one.one("hypervisor"), "nitro");
    assert_eq!(world.code("DescribeInstanceTypes", &[("InstanceType.1", "m5.huge")]), "InvalidInstanceType");
    let page = world.ok("DescribeInstanceTypes", &[]);
    assert_eq!((page.all("instanceType").len(), page.all("nextToken").len()), (100, 1));
    let some = [("Filter.1.Name", "instance-type"), ("Filter.1.Value.1", "m5.*large")];
    assert!(world.ok("DescribeInstanceTypes", &some).all("instanceType").len() > 5);
}

#[test]
fn zones_regions_and_identity_are_shown() {
    let world = World::new();
    let zones = world.ok("DescribeAvailabilityZones", &[]);
    assert_eq!(zones.all("zoneName")[..2], ["us-east-1a", "us-east-1b"]);
    assert_eq!(zones.all("zoneId")[..2], ["use1-az1", "use1-az2"]);
    assert_eq!(world.ok("DescribeRegions", &[]).all("regionName"), ["us-east-1"]);
    let id = world.ok("GetCallerIdentity", &[]);
    assert_eq!(id.one("Account"), "123456789012");
}

#[test]
fn instances_are_found_by_state_and_tag() {
    let mut world = World::with(Options { throttle: None, ..Options::default() });
    let answer = world.run(&[
        ("InstanceType", "m5.large"),
        ("SubnetId", &world.subnet),
        ("TagSpecification.1.ResourceType", "instance"),
        ("TagSpecification.1.Tag.1.Key", "Name"),
        ("TagSpecification.1.Tag.1.Value", "n1"),
    ]);
    assert!(answer.one("instanceState").contains("pending"));
    let named = |state: &str| {
        let pairs = [
            ("Filter.1.Name", "tag:Name"),
            ("Filter.1.Value.1", "n1"),
            ("Filter.2.Name", "instance-state-name"),
            ("Filter.2.Value.1", state),
        ];
        world.ok("DescribeInstances", &pairs).all("instanceId").len()
    };
    assert_eq!((named("pending"), named("running")), (1, 0));
    world.pass(500);
    let named = |state: &str| {
        let pairs = [("Filter.1.Name", "instance-state-name"), ("Filter.1.Value.1", state)];
        world.ok("DescribeInstances", &pairs).all("instanceId").len()
    };
    assert_eq!((named("pending"), named("running")), (0, 1));
}
