//! IPv6 beside IPv4: blocks of VPCs and subnets, addresses and /80 prefixes of ENIs.

use std::collections::BTreeSet;

use ipnet::Ipv6Net;

use crate::World;

/// A world whose first subnet has IPv6.
fn world() -> (World, Ipv6Net) {
    let world = World::new();
    let associated =
        world.ok("AssociateVpcCidrBlock", &[("VpcId", &world.vpc), ("AmazonProvidedIpv6CidrBlock", "true")]);
    let block: Ipv6Net = associated.one("ipv6CidrBlock").parse().unwrap();
    assert_eq!(block.prefix_len(), 56);
    let net = block.subnets(64).unwrap().nth(3).unwrap();
    let pairs = [("SubnetId", world.subnet.as_str()), ("Ipv6CidrBlock", &net.to_string())];
    world.ok("AssociateSubnetCidrBlock", &pairs);
    (world, net)
}

#[test]
fn a_vpc_and_a_subnet_have_one_block_each_and_show_it() {
    let (world, net) = world();
    let shown = world.ok("DescribeSubnets", &[("SubnetId.1", &world.subnet)]);
    assert_eq!(shown.one("ipv6CidrBlock"), net.to_string());
    let block: Ipv6Net = world.ok("DescribeVpcs", &[("VpcId.1", &world.vpc)]).one("ipv6CidrBlock").parse().unwrap();
    assert!(block.contains(&net));
    let again = [("VpcId", world.vpc.as_str()), ("AmazonProvidedIpv6CidrBlock", "true")];
    assert_eq!(world.refused("AssociateVpcCidrBlock", &again).status, 400);
    for bad in [net.to_string(), "2001:db8:ffff::/64".to_owned(), format!("{}/72", net.network())] {
        let pairs = [("SubnetId", world.small.as_str()), ("Ipv6CidrBlock", bad.as_str())];
        assert_eq!(world.refused("AssociateSubnetCidrBlock", &pairs).status, 400, "{bad}");
    }
    let other = world.ok("CreateVpc", &[("CidrBlock", "10.9.0.0/16"), ("AmazonProvidedIpv6CidrBlock", "true")]);
    assert_ne!(other.one("ipv6CidrBlock"), block.to_string());
}

#[test]
fn a_prefix_of_eighty_bits_is_given_shown_and_given_back() {
    let (world, net) = world();
    let eni = world.attached_eni("m5.large");
    let answer = world.ok("AssignIpv6Addresses", &[("NetworkInterfaceId", &eni), ("Ipv6PrefixCount", "2")]);
    let given: BTreeSet<Ipv6Net> = answer.all("item").iter().map(|prefix| prefix.parse().unwrap()).collect();
    assert_eq!(given.len(), 2);
    assert!(given.iter().all(|prefix| prefix.prefix_len() == 80 && net.contains(prefix)), "{given:?}");
    let shown: BTreeSet<Ipv6Net> =
        world.eni(&eni).all("ipv6Prefix").iter().map(|prefix| prefix.parse().unwrap()).collect();
    assert_eq!(shown, given);
    let first = given.first().unwrap().to_string();
    world.ok("UnassignIpv6Addresses", &[("NetworkInterfaceId", &eni), ("Ipv6Prefix.1", &first)]);
    assert_eq!(world.eni(&eni).all("ipv6Prefix").len(), 1);
    let again = [("NetworkInterfaceId", eni.as_str()), ("Ipv6Prefix.1", first.as_str())];
    assert_eq!(world.refused("UnassignIpv6Addresses", &again).status, 400, "it is not there any more");
    world.ok("AssignIpv6Addresses", &again);
    assert_eq!(world.eni(&eni).all("ipv6Prefix").len(), 2, "by name");
}

#[test]
fn addresses_are_of_the_subnet_and_never_inside_a_prefix_of_another() {
    let (world, net) = world();
    let eni = world.attached_eni("m5.large");
    let taken = world.ok("AssignIpv6Addresses", &[("NetworkInterfaceId", &eni), ("Ipv6PrefixCount", "1")]).one("item");
    let inside = taken.parse::<Ipv6Net>().unwrap().hosts().nth(7).unwrap().to_string();
    let other = world.attached_eni("m5.large");
    let assign = |address: &str| {
        world.call("AssignIpv6Addresses", &[("NetworkInterfaceId", &other), ("Ipv6Addresses.1", address)])
    };
    assert_eq!(assign(&inside).err().unwrap().code, "InvalidParameterValue");
    assert_eq!(assign("2001:db8:ffff::9").err().unwrap().code, "InvalidParameterValue");
    assert_eq!(assign(&net.network().to_string()).err().unwrap().code, "InvalidParameterValue", "AWS's own");
    let answer = world.ok("AssignIpv6Addresses", &[("NetworkInterfaceId", &other), ("Ipv6AddressCount", "3")]);
    let addresses = answer.set("item");
    assert_eq!(addresses.len(), 3);
    assert!(addresses.iter().all(|address| net.contains(&address.parse::<std::net::Ipv6Addr>().unwrap())));
    assert_eq!(world.eni(&other).set("ipv6Address"), addresses);
}

#[test]
fn the_limit_of_the_type_counts_addresses_and_prefixes_alike() {
    let (world, _) = world();
    let eni = world.attached_eni("m5.large");
    world.ok("AssignIpv6Addresses", &[("NetworkInterfaceId", &eni), ("Ipv6AddressCount", "9")]);
    world.ok("AssignIpv6Addresses", &[("NetworkInterfaceId", &eni), ("Ipv6PrefixCount", "1")]);
    let one_more = [("NetworkInterfaceId", eni.as_str()), ("Ipv6PrefixCount", "1")];
    assert_eq!(world.code("AssignIpv6Addresses", &one_more), "PrivateIpAddressLimitExceeded");
}

#[test]
fn an_eni_is_born_with_ipv6_where_its_subnet_has_any() {
    let (world, net) = world();
    let pairs = [("SubnetId", world.subnet.as_str()), ("Ipv6PrefixCount", "1"), ("Ipv4PrefixCount", "1")];
    let eni = world.ok("CreateNetworkInterface", &pairs);
    assert!(net.contains(&eni.one("ipv6Prefix").parse::<Ipv6Net>().unwrap()));
    assert_eq!(eni.all("ipv4Prefix").len(), 1);
    let without = [("SubnetId", world.small.as_str()), ("Ipv6PrefixCount", "1")];
    assert_eq!(world.refused("CreateNetworkInterface", &without).status, 400);
    let both = [("SubnetId", world.subnet.as_str()), ("Ipv6AddressCount", "1"), ("Ipv6Addresses.1.Ipv6Address", "::1")];
    assert_eq!(world.code("CreateNetworkInterface", &both), "InvalidParameterCombination");
}

#[test]
fn groups_let_ipv6_out_once_the_vpc_has_any_unless_they_were_changed() {
    let world = World::new();
    let create = |name: &str| {
        let pairs = [("GroupName", name), ("GroupDescription", "d"), ("VpcId", world.vpc.as_str())];
        world.ok("CreateSecurityGroup", &pairs).one("groupId")
    };
    let out = |group: &str| world.ok("DescribeSecurityGroups", &[("GroupId.1", group)]).all("cidrIpv6");
    let (as_born, changed) = (create("as-born"), create("changed"));
    let everything = [("IpPermissions.1.IpProtocol", "-1"), ("IpPermissions.1.IpRanges.1.CidrIp", "0.0.0.0/0")];
    let revoke: Vec<_> = [("GroupId", changed.as_str())].into_iter().chain(everything).collect();
    world.ok("RevokeSecurityGroupEgress", &revoke);
    assert_eq!(out(&as_born).len(), 0);

    world.ok("AssociateVpcCidrBlock", &[("VpcId", &world.vpc), ("AmazonProvidedIpv6CidrBlock", "true")]);
    assert_eq!(out(&as_born), ["::/0"]);
    assert_eq!(out(&changed).len(), 0);
    assert_eq!(out(&create("later")), ["::/0"]);
}
