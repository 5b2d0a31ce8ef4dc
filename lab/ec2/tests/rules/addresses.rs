//! Addresses and prefixes: unique, aligned, counted, limited, and refused in EC2's words.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use lab_ec2::{Delays, Options};

use crate::World;

#[test]
fn addresses_are_unique_and_never_reserved_until_the_subnet_is_full() {
    let world = World::new();
    let mut seen = BTreeSet::new();
    for _ in 0..59 {
        let address: Ipv4Addr =
            world.ok("CreateNetworkInterface", &[("SubnetId", &world.small)]).one("privateIpAddress").parse().unwrap();
        assert!(seen.insert(address), "{address} twice");
    }
    let reserved = ["10.0.1.0", "10.0.1.1", "10.0.1.2", "10.0.1.3", "10.0.1.63"];
    assert!(reserved.iter().all(|a| !seen.contains(&a.parse::<Ipv4Addr>().unwrap())));
    assert_eq!(world.free(&world.small), 0);
    let refusal = world.refused("CreateNetworkInterface", &[("SubnetId", &world.small)]);
    assert_eq!(refusal.code, "InsufficientFreeAddressesInSubnet");
    assert_eq!(refusal.message, "The specified subnet does not have enough free addresses to satisfy the request.");
}

#[test]
fn a_create_that_asks_for_too_much_takes_nothing() {
    let world = World::new();
    let before = world.free(&world.small);
    let pairs = [("SubnetId", world.small.as_str()), ("SecondaryPrivateIpAddressCount", "59")];
    assert_eq!(world.code("CreateNetworkInterface", &pairs), "InsufficientFreeAddressesInSubnet");
    assert_eq!(world.free(&world.small), before);
}

#[test]
fn named_addresses_are_refused_with_the_reason() {
    let world = World::new();
    let create = |address: &str| {
        world.call("CreateNetworkInterface", &[("SubnetId", &world.subnet), ("PrivateIpAddress", address)])
    };
    create("10.0.0.50").unwrap();
    let table = [
        ("10.0.0.50", "InvalidIPAddress.InUse", "Address 10.0.0.50 is already in use"),
        ("10.0.1.50", "InvalidParameterValue", "Address 10.0.1.50 does not fall within the subnet's address range"),
        ("10.0.0.3", "InvalidParameterValue", "Address 10.0.0.3 is in subnet's reserved address range"),
        ("10.0.0.255", "InvalidParameterValue", "Address 10.0.0.255 is in subnet's reserved address range"),
        ("banana", "InvalidParameterValue", "invalid value for parameter address: banana"),
    ];
    for (address, code, message) in table {
        let refusal = create(address).err().unwrap();
        assert_eq!((refusal.status, refusal.code.as_str(), refusal.message.as_str()), (400, code, message));
    }
}

#[test]
fn assign_answers_with_what_is_new_and_nothing_else() {
    let world = World::new();
    let eni = world.attached_eni("m5.large");
    let before = world.free(&world.subnet);
    let assign =
        |key: &str, value: &str| world.ok("AssignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), (key, value)]);
    let first = assign("SecondaryPrivateIpAddressCount", "3").set("privateIpAddress");
    let second = assign("SecondaryPrivateIpAddressCount", "2").set("privateIpAddress");
    let prefixes = assign("Ipv4PrefixCount", "2");
    assert_eq!((first.len(), second.len()), (3, 2));
    assert!(first.is_disjoint(&second));
    assert_eq!(prefixes.all("privateIpAddress").len(), 0);
    let prefixes = prefixes.set("ipv4Prefix");
    assert_eq!(prefixes.len(), 2);
    assert!(prefixes.iter().all(|prefix| prefix.ends_with("/28")));
    assert_eq!(world.free(&world.subnet), before - 5 - 32);
    let shown = world.eni(&eni);
    assert_eq!(shown.set("ipv4Prefix"), prefixes);
    assert!(shown.set("privateIpAddress").is_superset(&first));
    // Primary, five addresses and two prefixes are eight slots of ten.
    let refusal = world
        .refused("AssignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), ("SecondaryPrivateIpAddressCount", "3")]);
    assert_eq!(refusal.code, "PrivateIpAddressLimitExceeded");
    assert_eq!(refusal.message, "Number of private addresses will exceed limit.");
    assign("Ipv4PrefixCount", "2");
}

#[test]
fn an_address_of_another_eni_moves_only_when_that_is_allowed() {
    let world = World::new();
    let (a, b) = (world.new_eni(&world.subnet), world.new_eni(&world.subnet));
    let assign = |eni: &str, address: &str, allow: bool| {
        let allow = if allow { "true" } else { "false" };
        let pairs = [("NetworkInterfaceId", eni), ("PrivateIpAddress.1", address), ("AllowReassignment", allow)];
        world.call("AssignPrivateIpAddresses", &pairs)
    };
    assign(&a, "10.0.0.210", false).unwrap();
    let before = world.free(&world.subnet);
    let refusal = assign(&b, "10.0.0.210", false).err().unwrap();
    assert_eq!(refusal.code, "InvalidParameterValue");
    assert_eq!(refusal.message, "[10.0.0.210] assigned, but move is not allowed.");
    assert_eq!(assign(&b, "10.0.0.210", true).unwrap().all("privateIpAddress"), ["10.0.0.210"]);
    assert!(!world.eni(&a).set("privateIpAddress").contains("10.0.0.210"));
    assert!(world.eni(&b).set("privateIpAddress").contains("10.0.0.210"));
    assert_eq!(world.free(&world.subnet), before);
    let primary = world.eni(&a).one("privateIpAddress");
    assert_eq!(assign(&b, &primary, true).err().unwrap().message, "secondary-addresses");
    assert_eq!(assign(&b, "10.0.1.9", false).err().unwrap().code, "InvalidParameterValue");
    // Again on the ENI that has it: allowed and without effect, or refused plainly.
    assert!(assign(&b, "10.0.0.210", true).unwrap().all("privateIpAddress").is_empty());
    assert!(assign(&b, "10.0.0.210", false).is_err());
}

#[test]
fn count_list_prefix_count_and_prefixes_exclude_each_other() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let table: [(&[(&str, &str)], &str); 6] = [
        (&[], "MissingParameter"),
        (&[("SecondaryPrivateIpAddressCount", "0")], "InvalidParameterValue"),
        (&[("SecondaryPrivateIpAddressCount", "-1")], "InvalidParameterValue"),
        (&[("SecondaryPrivateIpAddressCount", "1"), ("PrivateIpAddress.1", "10.0.0.9")], "InvalidParameterCombination"),
        (&[("SecondaryPrivateIpAddressCount", "1"), ("Ipv4PrefixCount", "1")], "InvalidParameterCombination"),
        (&[("Ipv4PrefixCount", "1"), ("Ipv4Prefix.1", "10.0.0.16/28")], "InvalidParameterCombination"),
    ];
    for (pairs, code) in table {
        let pairs: Vec<_> = [("NetworkInterfaceId", eni.as_str())].into_iter().chain(pairs.iter().copied()).collect();
        assert_eq!(world.code("AssignPrivateIpAddresses", &pairs), code, "{pairs:?}");
    }
}

#[test]
fn prefixes_are_aligned_and_do_not_overlap_addresses() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let assign = |prefix: &str| {
        world.call("AssignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), ("Ipv4Prefix.1", prefix)])
    };
    world.ok("CreateNetworkInterface", &[("SubnetId", &world.subnet), ("PrivateIpAddress", "10.0.0.40")]);
    for bad in ["10.0.0.33/28", "10.0.0.32/27", "10.0.0.32/28", "10.0.0.0/28", "10.0.0.240/28", "10.0.9.0/28", "x"] {
        assert_eq!(assign(bad).err().unwrap().code, "InvalidParameterValue", "{bad}");
    }
    assert_eq!(assign("10.0.0.48/28").unwrap().all("ipv4Prefix"), ["10.0.0.48/28"]);
    let inside = [("SubnetId", world.subnet.as_str()), ("PrivateIpAddress", "10.0.0.50")];
    assert_eq!(world.code("CreateNetworkInterface", &inside), "InvalidIPAddress.InUse");
}

#[test]
fn a_subnet_without_a_free_block_is_fragmented_not_empty() {
    let world = World::new();
    // 10.0.1.0/26 has two blocks that could be prefixes; one address in each spoils both.
    for address in ["10.0.1.20", "10.0.1.40"] {
        world.ok("CreateNetworkInterface", &[("SubnetId", &world.small), ("PrivateIpAddress", address)]);
    }
    let create = [("SubnetId", world.small.as_str()), ("Ipv4PrefixCount", "1")];
    let refusal = world.refused("CreateNetworkInterface", &create);
    assert_eq!(refusal.code, "InsufficientCidrBlocks");
    assert!(refusal.message.contains("does not have enough free cidr blocks"));
    let eni = world.new_eni(&world.small);
    let assign = |count| {
        let pairs = [("NetworkInterfaceId", eni.as_str()), ("Ipv4PrefixCount", count)];
        world.refused("AssignPrivateIpAddresses", &pairs)
    };
    assert_eq!(assign("1").code, "InsufficientCidrBlocks");
    let short = assign("4");
    assert_eq!(short.code, "InvalidParameterValue");
    assert_eq!(short.message, "There aren't sufficient free Ipv4 addresses or prefixes");
}

#[test]
fn prefixes_come_from_their_reservation_and_addresses_keep_out_of_it() {
    let world = World::new();
    let reserve = |cidr: &str, kind: &str| {
        let pairs = [("SubnetId", world.subnet.as_str()), ("Cidr", cidr), ("ReservationType", kind)];
        world.call("CreateSubnetCidrReservation", &pairs)
    };
    let id = reserve("10.0.0.128/26", "prefix").unwrap().one("subnetCidrReservationId");
    assert_eq!(reserve("10.0.0.160/28", "explicit").err().unwrap().code, "InvalidParameterValue");
    assert_eq!(reserve("10.0.9.0/28", "explicit").err().unwrap().code, "InvalidParameterValue");
    assert_eq!(world.free(&world.subnet), 251 - 64);
    let pairs = [("SubnetId", world.subnet.as_str()), ("Ipv4PrefixCount", "4")];
    let prefixes = world.ok("CreateNetworkInterface", &pairs).set("ipv4Prefix");
    let reserved: ipnet::Ipv4Net = "10.0.0.128/26".parse().unwrap();
    assert!(prefixes.iter().all(|prefix| reserved.contains(&prefix.parse::<ipnet::Ipv4Net>().unwrap())));
    let pairs = [("SubnetId", world.subnet.as_str()), ("SecondaryPrivateIpAddressCount", "40")];
    let singles = world.ok("CreateNetworkInterface", &pairs).set("privateIpAddress");
    assert!(singles.iter().all(|address| !reserved.contains(&address.parse::<Ipv4Addr>().unwrap())));
    let listed = world.ok("GetSubnetCidrReservations", &[("SubnetId", &world.subnet)]);
    assert_eq!(listed.all("reservationType"), ["prefix"]);
    world.ok("DeleteSubnetCidrReservation", &[("SubnetCidrReservationId", &id)]);
    assert_eq!(
        world.code("DeleteSubnetCidrReservation", &[("SubnetCidrReservationId", &id)]),
        "InvalidSubnetCidrReservationID.NotFound"
    );
}

#[test]
fn unassign_is_all_or_nothing_and_never_the_primary() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let assigned = world
        .ok("AssignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), ("SecondaryPrivateIpAddressCount", "2")])
        .all("privateIpAddress");
    let before = world.free(&world.subnet);
    let unassign = |addresses: &[&str]| {
        let names: Vec<String> = (1..=addresses.len()).map(|n| format!("PrivateIpAddress.{n}")).collect();
        let mut pairs = vec![("NetworkInterfaceId", eni.as_str())];
        pairs.extend(names.iter().map(String::as_str).zip(addresses.iter().copied()));
        world.call("UnassignPrivateIpAddresses", &pairs)
    };
    let refusal = unassign(&[&assigned[0], "10.0.0.250"]).err().unwrap();
    assert_eq!(refusal.code, "InvalidParameterValue");
    assert_eq!(refusal.message, format!("Some of the specified addresses are not assigned to interface {eni}"));
    assert_eq!(world.free(&world.subnet), before);
    let primary = world.eni(&eni).one("privateIpAddress");
    assert_eq!(unassign(&[&primary]).err().unwrap().code, "InvalidParameterValue");
    unassign(&[&assigned[0], &assigned[1]]).unwrap();
    assert_eq!(world.free(&world.subnet), before + 2);
    assert_eq!(unassign(&[&assigned[0]]).err().unwrap().code, "InvalidParameterValue");
    assert_eq!(world.code("UnassignPrivateIpAddresses", &[("NetworkInterfaceId", &eni)]), "MissingParameter");
    // A freed address may be had by anybody at once.
    world.ok("CreateNetworkInterface", &[("SubnetId", &world.subnet), ("PrivateIpAddress", &assigned[0])]);
}

#[test]
fn a_prefix_is_given_back_whole() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let before = world.free(&world.subnet);
    let pairs = [("NetworkInterfaceId", eni.as_str()), ("Ipv4PrefixCount", "1")];
    let prefix = world.ok("AssignPrivateIpAddresses", &pairs).one("ipv4Prefix");
    world.ok("UnassignPrivateIpAddresses", &[("NetworkInterfaceId", &eni), ("Ipv4Prefix.1", &prefix)]);
    assert_eq!(world.free(&world.subnet), before);
    assert!(world.eni(&eni).all("ipv4Prefix").is_empty());
    world.ok("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]);
    assert_eq!(world.free(&world.subnet), before + 1);
}

#[test]
fn types_without_nitro_take_no_prefixes_and_subnets_without_a_block_no_ipv6() {
    let world = World::new();
    let eni = world.attached_eni("t2.medium");
    let prefix = [("NetworkInterfaceId", eni.as_str()), ("Ipv4PrefixCount", "1")];
    assert_eq!(world.refused("AssignPrivateIpAddresses", &prefix).status, 400);
    let ipv6 = [("NetworkInterfaceId", eni.as_str()), ("Ipv6AddressCount", "1")];
    assert_eq!(world.refused("AssignIpv6Addresses", &ipv6).status, 400);
    let ipv6 = [("SubnetId", world.subnet.as_str()), ("Ipv6PrefixCount", "1")];
    assert_eq!(world.refused("CreateNetworkInterface", &ipv6).status, 400);
}

#[test]
fn a_client_token_gives_the_same_eni_again() {
    let world = World::new();
    let create = |description: &str, token: &str| {
        let pairs = [("SubnetId", world.subnet.as_str()), ("Description", description), ("ClientToken", token)];
        world.call("CreateNetworkInterface", &pairs).map(|answer| answer.one("networkInterfaceId"))
    };
    let first = create("a", "t1").unwrap();
    assert_eq!(create("a", "t1").unwrap(), first);
    assert_ne!(create("a", "t2").unwrap(), first);
    assert_eq!(create("b", "t1").err().unwrap().code, "IdempotentParameterMismatch");
    assert_eq!(world.free(&world.subnet), 251 - 2);
}

#[test]
fn the_accounts_quota_of_enis_holds() {
    let world = World::with(Options { throttle: None, delays: Delays::NONE, max_enis: 2, ..Options::default() });
    world.new_eni(&world.subnet);
    world.new_eni(&world.subnet);
    let refusal = world.refused("CreateNetworkInterface", &[("SubnetId", &world.subnet)]);
    assert_eq!(refusal.code, "NetworkInterfaceLimitExceeded");
}

#[test]
fn concurrent_calls_never_share_an_address() {
    let world = World::new();
    let enis: Vec<String> = (0..8).map(|_| world.new_eni(&world.subnet)).collect();
    let assigned: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = enis
            .iter()
            .map(|eni| {
                let world = &world;
                scope.spawn(move || {
                    let pairs = [("NetworkInterfaceId", eni.as_str()), ("SecondaryPrivateIpAddressCount", "4")];
                    let calls = (0..6).map(|_| world.ok("AssignPrivateIpAddresses", &pairs));
                    calls.flat_map(|answer| answer.all("privateIpAddress")).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(assigned.len(), 8 * 24);
    assert_eq!(assigned.iter().collect::<BTreeSet<_>>().len(), 8 * 24);
    assert_eq!(world.free(&world.subnet), 251 - 8 * 25);
}
