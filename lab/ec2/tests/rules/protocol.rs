//! The protocol: malformed requests, dry runs, permissions, throttling.

use std::collections::BTreeSet;

use lab_ec2::{Buckets, Caller, Delays, Options};

use crate::World;

type Pairs<'a> = &'a [(&'a str, &'a str)];

#[test]
fn malformed_requests_get_ec2s_codes() {
    let world = World::new();
    let table: [(&str, Pairs<'_>, &str); 14] = [
        ("DescribeNothing", &[], "InvalidAction"),
        ("", &[], "MissingAction"),
        ("AttachNetworkInterface", &[], "MissingParameter"),
        ("CreateNetworkInterface", &[], "MissingParameter"),
        ("CreateNetworkInterface", &[("SubnetId", &world.subnet), ("Colour", "red")], "UnknownParameter"),
        (
            "AssignPrivateIpAddresses",
            &[("NetworkInterfaceId", "eni-0123456789abcdef0"), ("DryRun", "true")],
            "UnknownParameter",
        ),
        ("DeleteNetworkInterface", &[("NetworkInterfaceId", "eni-x")], "InvalidNetworkInterfaceId.Malformed"),
        ("DescribeInstances", &[("InstanceId.1", "i-x")], "InvalidInstanceID.Malformed"),
        ("CreateSubnet", &[("VpcId", "vpc"), ("CidrBlock", "10.0.9.0/24")], "InvalidVpcID.Malformed"),
        ("DescribeSubnets", &[("SubnetId.1", "subnet-x")], "InvalidSubnetID.Malformed"),
        ("DetachNetworkInterface", &[("AttachmentId", "eni-attach-")], "InvalidNetworkInterfaceAttachmentId.Malformed"),
        ("DeleteSecurityGroup", &[("GroupId", "web")], "InvalidGroupId.Malformed"),
        ("DescribeVpcs", &[("VpcId.1", "vpc-0123456789abcdef0")], "InvalidVpcID.NotFound"),
        ("CreateNetworkInterface", &[("SubnetId", "subnet-0123456789abcdef0")], "InvalidSubnetID.NotFound"),
    ];
    for (action, pairs, code) in table {
        let refusal = world.refused(action, pairs);
        assert_eq!((refusal.status, refusal.code.as_str()), (400, code), "{action} {pairs:?}");
    }
}

#[test]
fn only_the_first_missing_id_is_named() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let (a, b) = ("eni-0000000000000000a", "eni-0000000000000000b");
    let pairs = [("NetworkInterfaceId.1", eni.as_str()), ("NetworkInterfaceId.2", b), ("NetworkInterfaceId.3", a)];
    let refusal = world.refused("DescribeNetworkInterfaces", &pairs);
    assert_eq!(refusal.message, format!("The networkInterface ID '{b}' does not exist"));
}

#[test]
fn a_dry_run_changes_nothing() {
    let world = World::new();
    let pairs = [("SubnetId", world.subnet.as_str()), ("DryRun", "true")];
    let refusal = world.refused("CreateNetworkInterface", &pairs);
    assert_eq!((refusal.status, refusal.code.as_str()), (412, "DryRunOperation"));
    assert_eq!(world.free(&world.subnet), 251);
    assert_eq!(world.code("DescribeInstances", &[("DryRun", "true")]), "DryRunOperation");
}

#[test]
fn an_action_outside_the_policy_is_named_in_the_refusal() {
    let world = World::new();
    let allow = BTreeSet::from(["ec2:Describe*".to_owned(), "ec2:CreateNetworkInterface".to_owned()]);
    let caller = Caller { allow: Some(allow), access_key: "AKIA1".to_owned(), ..world.caller.clone() };
    world.call_as(&caller, "DescribeSubnets", &[]).unwrap();
    let create = [("SubnetId", world.subnet.as_str())];
    let eni = world.call_as(&caller, "CreateNetworkInterface", &create).unwrap().one("networkInterfaceId");
    let refusal = world.call_as(&caller, "DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]).err().unwrap();
    assert_eq!((refusal.status, refusal.code.as_str()), (403, "UnauthorizedOperation"));
    assert!(refusal.message.contains("is not authorized to perform: ec2:DeleteNetworkInterface"));
    assert!(refusal.message.contains("Encoded authorization failure message: "));
    // Tags at creation need the right to tag.
    let tagged = [
        ("SubnetId", world.subnet.as_str()),
        ("TagSpecification.1.ResourceType", "network-interface"),
        ("TagSpecification.1.Tag.1.Key", "a"),
        ("TagSpecification.1.Tag.1.Value", "b"),
    ];
    let refusal = world.call_as(&caller, "CreateNetworkInterface", &tagged).err().unwrap();
    assert!(refusal.message.contains("ec2:CreateTags"));
    let dry = [("NetworkInterfaceId", eni.as_str()), ("DryRun", "true")];
    assert_eq!(world.call_as(&caller, "DeleteNetworkInterface", &dry).err().unwrap().code, "UnauthorizedOperation");
    let calls = world.ec2.calls_of("AKIA1");
    assert_eq!((calls["DeleteNetworkInterface"].ok, calls["DeleteNetworkInterface"].errors), (0, 2));
    assert_eq!(world.ec2.calls()["CreateNetworkInterface"].ok, 1);
}

#[test]
fn an_empty_bucket_refuses_until_it_refills() {
    let mut world =
        World::with(Options { throttle: Some(Buckets::published()), delays: Delays::NONE, ..Options::default() });
    let eni = world.new_eni(&world.subnet);
    let modify = [("NetworkInterfaceId", eni.as_str()), ("Description.Value", "x")];
    world.ec2.drain(world.now, "ModifyNetworkInterfaceAttribute", 99);
    world.ok("ModifyNetworkInterfaceAttribute", &modify);
    let refusal = world.refused("ModifyNetworkInterfaceAttribute", &modify);
    assert_eq!((refusal.status, refusal.code.as_str()), (503, "RequestLimitExceeded"));
    assert_eq!(refusal.message, "Request limit exceeded.");
    world.ok("DescribeSubnets", &[]);
    world.pass(200);
    world.ok("ModifyNetworkInterfaceAttribute", &modify);
    let unfiltered = (0..60).filter(|_| world.call("DescribeNetworkInterfaces", &[]).is_ok()).count();
    let paged = (0..60).filter(|_| world.call("DescribeNetworkInterfaces", &[("MaxResults", "5")]).is_ok()).count();
    assert_eq!((unfiltered, paged), (50, 60));
}

#[test]
fn tags_are_checked_kept_and_found() {
    let world = World::new();
    let eni = world.new_eni(&world.subnet);
    let tag = |key: &str, value: &str| {
        world.call("CreateTags", &[("ResourceId.1", &eni), ("Tag.1.Key", key), ("Tag.1.Value", value)])
    };
    tag("Name", "a<b>&\"c\"").unwrap();
    tag("empty", "").unwrap();
    assert_eq!(tag("aws:x", "1").err().unwrap().code, "InvalidParameterValue");
    assert_eq!(tag(&"k".repeat(128), "1").err().unwrap().code, "InvalidParameterValue");
    let unknown = [("ResourceId.1", "eni-0123456789abcdef0"), ("Tag.1.Key", "a"), ("Tag.1.Value", "b")];
    assert_eq!(world.code("CreateTags", &unknown), "InvalidNetworkInterfaceID.NotFound");
    let both = [("ResourceId.1", eni.as_str()), ("ResourceId.2", "vpc-0123456789abcdef0"), ("Tag.1.Key", "half")];
    assert_eq!(world.code("CreateTags", &both), "InvalidVpcID.NotFound");
    let shown = world.ok("DescribeTags", &[("Filter.1.Name", "resource-id"), ("Filter.1.Value.1", &eni)]);
    assert_eq!(shown.all("key"), ["Name", "empty"]);
    assert_eq!(shown.one("value"), "a&lt;b&gt;&amp;&quot;c&quot;");
    assert_eq!(shown.all("resourceType"), ["network-interface"; 2]);
    for n in 0..48 {
        tag(&format!("k{n}"), "v").unwrap();
    }
    assert_eq!(tag("one-too-many", "v").err().unwrap().code, "TagLimitExceeded");
    let wrong = [("ResourceId.1", eni.as_str()), ("Tag.1.Key", "Name"), ("Tag.1.Value", "other")];
    world.ok("DeleteTags", &wrong);
    assert!(world.eni(&eni).all("key").contains(&"Name".to_owned()));
    world.ok("DeleteTags", &[("ResourceId.1", &eni)]);
    assert!(world.eni(&eni).all("key").is_empty());
}

#[test]
fn networks_refuse_what_overlaps_or_depends() {
    let world = World::new();
    let subnet = |cidr: &str| {
        world.call("CreateSubnet", &[("VpcId", &world.vpc), ("CidrBlock", cidr)]).err().map(|refusal| refusal.code)
    };
    for (cidr, code) in [
        ("10.0.0.128/25", "InvalidSubnet.Conflict"),
        ("10.1.0.0/24", "InvalidSubnet.Range"),
        ("10.0.8.0/29", "InvalidSubnet.Range"),
        ("10.0.8.0/33", "InvalidParameterValue"),
    ] {
        assert_eq!(subnet(cidr).as_deref(), Some(code), "{cidr}");
    }
    let more = [("VpcId", world.vpc.as_str()), ("CidrBlock", "100.64.0.0/16")];
    world.ok("AssociateVpcCidrBlock", &more);
    assert_eq!(world.code("AssociateVpcCidrBlock", &more), "InvalidVpc.Range");
    assert_eq!(subnet("100.64.0.0/24"), None);
    assert_eq!(world.ok("DescribeVpcs", &[]).all("cidrBlockAssociationSet").len(), 1);

    let eni = world.new_eni(&world.subnet);
    assert_eq!(world.code("DeleteSubnet", &[("SubnetId", &world.subnet)]), "DependencyViolation");
    assert_eq!(world.code("DeleteVpc", &[("VpcId", &world.vpc)]), "DependencyViolation");
    world.ok("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]);
    world.ok("DeleteSubnet", &[("SubnetId", &world.subnet)]);

    let other = world.ok("CreateVpc", &[("CidrBlock", "10.0.0.0/20")]).one("vpcId");
    let peer =
        |accepter: &str| world.call("CreateVpcPeeringConnection", &[("VpcId", &world.vpc), ("PeerVpcId", accepter)]);
    assert_eq!(peer(&other).err().unwrap().code, "OperationNotPermitted");
    let other = world.ok("CreateVpc", &[("CidrBlock", "10.9.0.0/16")]).one("vpcId");
    let peering = peer(&other).unwrap().one("vpcPeeringConnectionId");
    assert!(world.ec2.view(world.now).peerings.is_empty());
    let accepted = world.ok("AcceptVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]);
    assert_eq!(accepted.one("code"), "active");
    assert_eq!(world.ec2.view(world.now).peerings.len(), 1);
    world.ok("DeleteVpcPeeringConnection", &[("VpcPeeringConnectionId", &peering)]);
    assert!(world.ec2.view(world.now).peerings.is_empty());
}

#[test]
fn security_groups_keep_their_rules() {
    let world = World::new();
    let create = [("GroupName", "web"), ("GroupDescription", "d"), ("VpcId", world.vpc.as_str())];
    let group = world.ok("CreateSecurityGroup", &create).one("groupId");
    assert_eq!(world.code("CreateSecurityGroup", &create), "InvalidGroup.Duplicate");
    let rule = [
        ("GroupId", group.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "80"),
        ("IpPermissions.1.ToPort", "80"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "10.0.0.0/16"),
        ("IpPermissions.1.Groups.1.GroupId", group.as_str()),
    ];
    assert_eq!(world.ok("AuthorizeSecurityGroupIngress", &rule).all("securityGroupRuleId").len(), 2);
    assert_eq!(world.code("AuthorizeSecurityGroupIngress", &rule), "InvalidPermission.Duplicate");
    let shown = world.ok("DescribeSecurityGroups", &[("GroupId.1", &group)]);
    assert_eq!(shown.all("fromPort"), ["80", "80"]);
    assert_eq!(shown.all("cidrIp"), ["10.0.0.0/16", "0.0.0.0/0"]);
    assert_eq!(world.ec2.view(world.now).security_groups.len(), 2);
    world.ok("RevokeSecurityGroupIngress", &rule);
    assert_eq!(world.code("RevokeSecurityGroupIngress", &rule), "InvalidPermission.NotFound");
    let eni = world
        .ok("CreateNetworkInterface", &[("SubnetId", &world.subnet), ("SecurityGroupId.1", &group)])
        .one("networkInterfaceId");
    assert_eq!(world.code("DeleteSecurityGroup", &[("GroupId", &group)]), "DependencyViolation");
    world.ok("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]);
    world.ok("DeleteSecurityGroup", &[("GroupId", &group)]);
}

#[test]
fn one_seed_gives_one_history() {
    let history = || {
        let world = World::new();
        let enis: Vec<String> = (0..5).map(|_| world.eni(&world.new_eni(&world.subnet)).0).collect();
        (enis, world.ec2.view(world.now))
    };
    assert_eq!(history(), history());
}
