//! Attaching, detaching, deleting, terminating: states with delays, and limits at the step where EC2 raises them.

use lab_ec2::{Delays, Options};

use crate::World;

fn slow() -> World {
    World::with(Options { throttle: None, ..Options::default() })
}

#[test]
fn attachment_takes_its_time_in_the_api_and_in_the_guest() {
    let mut world = slow();
    let eni = world.new_eni(&world.subnet);
    assert_eq!(world.eni(&eni).one("status"), "pending");
    let instance = world.new_instance("m5.large");
    assert_eq!(world.attach(&eni, &instance, "1").unwrap_err().code, "IncorrectState");
    world.pass(500);
    assert_eq!(world.eni(&eni).one("status"), "available");
    let attachment = world.attach(&eni, &instance, "1").unwrap();
    let attachment_status = |world: &World| {
        let filter = [("Filter.1.Name", "attachment.attachment-id"), ("Filter.1.Value.1", attachment.as_str())];
        let answer = world.ok("DescribeNetworkInterfaces", &filter).all("attachment");
        answer.first().map(|text| crate::Answer(text.clone()).one("status"))
    };
    assert_eq!(attachment_status(&world).as_deref(), Some("attaching"));
    let link_at = world.ec2.view(world.now).eni(&eni.parse().unwrap()).unwrap().attachment.clone().unwrap().link_at;
    assert_eq!(link_at.since_ms(world.now), Delays::default().link_ms);
    assert_eq!(world.ec2.next_transition().unwrap().since_ms(world.now), Delays::default().attach_ms);
    world.pass(600);
    assert_eq!(attachment_status(&world).as_deref(), Some("attached"));
    let version = world.ec2.version();
    world.pass(300);
    world.ec2.advance(world.now);
    assert!(world.ec2.version() > version, "those who watch are told that the link is there");
    world.ok("DetachNetworkInterface", &[("AttachmentId", &attachment)]);
    assert_eq!(attachment_status(&world).as_deref(), Some("detaching"));
    assert_eq!(world.code("DetachNetworkInterface", &[("AttachmentId", &attachment)]), "IncorrectState");
    let refusal = world.refused("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]);
    assert_eq!(refusal.code, "InvalidParameterValue");
    assert_eq!(refusal.message, format!("Network interface '{eni}' is currently in use."));
    world.pass(800);
    assert_eq!(world.eni(&eni).one("status"), "available");
    assert_eq!(world.code("DetachNetworkInterface", &[("AttachmentId", &attachment)]), "InvalidAttachmentID.NotFound");
    world.ok("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]);
    assert_eq!(
        world.code("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni)]),
        "InvalidNetworkInterfaceID.NotFound"
    );
}

#[test]
fn limits_of_the_type_are_raised_at_attach() {
    let world = World::new();
    let instance = world.new_instance("t3.small");
    for device in ["1", "2"] {
        world.attach(&world.new_eni(&world.subnet), &instance, device).unwrap();
    }
    let refusal = world.attach(&world.new_eni(&world.subnet), &instance, "3").unwrap_err();
    assert_eq!(refusal.code, "AttachmentLimitExceeded");
    assert_eq!(refusal.message, "Interface count 4 exceeds the limit for t3.small");

    let pairs = [("SubnetId", world.subnet.as_str()), ("SecondaryPrivateIpAddressCount", "4")];
    let heavy = world.ok("CreateNetworkInterface", &pairs).one("networkInterfaceId");
    let instance = world.new_instance("t3.small");
    assert_eq!(world.attach(&heavy, &instance, "1").unwrap_err().code, "InvalidInterface.IpAddressLimitExceeded");
}

#[test]
fn cards_count_their_own_interfaces() {
    let world = World::new();
    let instance = world.new_instance("p5.48xlarge");
    let attach = |device: &str, card: &str| {
        let eni = world.new_eni(&world.subnet);
        let pairs = [
            ("NetworkInterfaceId", eni.as_str()),
            ("InstanceId", instance.as_str()),
            ("DeviceIndex", device),
            ("NetworkCardIndex", card),
        ];
        world.call("AttachNetworkInterface", &pairs).map(|answer| answer.one("networkCardIndex"))
    };
    assert_eq!(attach("1", "0").unwrap(), "0");
    assert_eq!(attach("2", "0").unwrap_err().code, "AttachmentLimitExceeded");
    assert_eq!(attach("1", "31").unwrap(), "31");
    assert_eq!(attach("1", "31").unwrap_err().code, "InvalidParameterValue");
    assert_eq!(attach("1", "32").unwrap_err().code, "InvalidParameterValue");
}

#[test]
fn a_taken_index_a_taken_eni_and_a_far_instance_are_refused() {
    let world = World::new();
    let (eni, instance) = (world.new_eni(&world.subnet), world.new_instance("m5.large"));
    world.attach(&eni, &instance, "1").unwrap();
    let refusal = world.attach(&world.new_eni(&world.subnet), &instance, "1").unwrap_err();
    assert_eq!(refusal.code, "InvalidParameterValue");
    assert_eq!(
        refusal.message,
        format!("Instance '{instance}' already has an interface attached at device index '1'.")
    );
    assert_eq!(world.attach(&eni, &instance, "2").unwrap_err().code, "InvalidNetworkInterface.InUse");
    let far = world.new_eni(&world.elsewhere);
    assert_eq!(world.attach(&far, &instance, "2").unwrap_err().code, "InvalidParameterCombination");
    world.ok("TerminateInstances", &[("InstanceId.1", &instance)]);
    let eni = world.new_eni(&world.subnet);
    assert_eq!(world.attach(&eni, &instance, "2").unwrap_err().code, "IncorrectState");
}

#[test]
fn only_one_of_many_attaches_gets_the_index() {
    let world = World::new();
    let instance = world.new_instance("m5.4xlarge");
    let enis: Vec<String> = (0..8).map(|_| world.new_eni(&world.subnet)).collect();
    let won = std::thread::scope(|scope| {
        let threads: Vec<_> =
            enis.iter().map(|eni| scope.spawn(|| world.attach(eni, &instance, "1").is_ok())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).filter(|won| *won).count()
    });
    assert_eq!(won, 1);
}

#[test]
fn the_primary_interface_stays() {
    let world = World::new();
    let instance = world.new_instance("m5.large");
    let shown = world.ok("DescribeInstances", &[("InstanceId.1", &instance)]);
    let refusal = world.refused("DetachNetworkInterface", &[("AttachmentId", &shown.one("attachmentId"))]);
    assert_eq!(refusal.code, "OperationNotPermitted");
    assert_eq!(refusal.message, "The network interface at device index 0 and networkCard index 0 cannot be detached.");
}

#[test]
fn termination_deletes_what_says_so_and_leaves_the_rest() {
    let mut world = slow();
    let instance = world.new_instance("m5.large");
    world.pass(1_000);
    let primary = world.ok("DescribeInstances", &[("InstanceId.1", &instance)]).one("networkInterfaceId");
    let (kept, dropped) = (world.new_eni(&world.subnet), world.new_eni(&world.subnet));
    world.attach(&kept, &instance, "1").unwrap();
    let attachment = world.attach(&dropped, &instance, "2").unwrap();
    world.ok(
        "ModifyNetworkInterfaceAttribute",
        &[
            ("NetworkInterfaceId", &dropped),
            ("Attachment.AttachmentId", &attachment),
            ("Attachment.DeleteOnTermination", "true"),
        ],
    );
    world.pass(1_000);
    let answer = world.ok("TerminateInstances", &[("InstanceId.1", &instance)]);
    assert_eq!(answer.all("name"), ["shutting-down", "running"]);
    assert_eq!(world.eni(&primary).one("status"), "in-use");
    world.pass(1_000);
    assert_eq!(world.eni(&kept).one("status"), "available");
    for gone in [&primary, &dropped] {
        let code = world.code("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", gone)]);
        assert_eq!(code, "InvalidNetworkInterfaceID.NotFound");
    }
    assert_eq!(world.free(&world.subnet), 251 - 1);
    let shown = world.ok("DescribeInstances", &[("InstanceId.1", &instance)]);
    assert_eq!(shown.one("name"), "terminated");
    world.pass(3_600_001);
    assert_eq!(world.code("DescribeInstances", &[("InstanceId.1", &instance)]), "InvalidInstanceID.NotFound");
}

#[test]
fn a_launch_spells_out_its_interfaces() {
    let world = World::new();
    let answer = world.run(&[
        ("InstanceType", "m5.large"),
        ("NetworkInterface.1.DeviceIndex", "0"),
        ("NetworkInterface.1.SubnetId", &world.subnet),
        ("NetworkInterface.1.Ipv4PrefixCount", "2"),
        ("NetworkInterface.2.DeviceIndex", "1"),
        ("NetworkInterface.2.SubnetId", &world.subnet),
        ("NetworkInterface.2.SecondaryPrivateIpAddressCount", "3"),
        ("TagSpecification.1.ResourceType", "network-interface"),
        ("TagSpecification.1.Tag.1.Key", "node"),
        ("TagSpecification.1.Tag.1.Value", "n1"),
    ]);
    assert_eq!(answer.all("ipv4Prefix").len(), 2);
    assert_eq!(world.free(&world.subnet), 251 - 2 - 32 - 3);
    let tagged = [("Filter.1.Name", "tag:node"), ("Filter.1.Value.1", "n1")];
    assert_eq!(world.ok("DescribeNetworkInterfaces", &tagged).all("networkInterfaceId").len(), 2);
    let refused = |pairs: &[(&str, &str)]| {
        let head =
            [("ImageId", "ami-1"), ("MinCount", "1"), ("MaxCount", "1"), ("NetworkInterface.1.DeviceIndex", "0")];
        let pairs: Vec<_> = head.into_iter().chain(pairs.iter().copied()).collect();
        world.code("RunInstances", &pairs)
    };
    let subnet = ("NetworkInterface.1.SubnetId", world.subnet.as_str());
    let table: [(&[(&str, &str)], &str); 4] = [
        (&[("InstanceType", "m5.huge"), subnet], "InvalidParameterValue"),
        (
            &[("InstanceType", "t3.nano"), subnet, ("NetworkInterface.1.SecondaryPrivateIpAddressCount", "2")],
            "PrivateIpAddressLimitExceeded",
        ),
        (&[("InstanceType", "m5.large"), subnet, ("SubnetId", &world.subnet)], "InvalidParameterCombination"),
        (&[("InstanceType", "m5.large")], "VPCIdNotSpecified"),
    ];
    for (pairs, code) in table {
        assert_eq!(refused(pairs), code, "{pairs:?}");
    }
}

#[test]
fn a_launch_that_does_not_fit_leaves_nothing_behind() {
    let world = World::new();
    let run = |min: &str, max: &str| {
        let pairs = [
            ("ImageId", "ami-1"),
            ("InstanceType", "m5.large"),
            ("SubnetId", world.small.as_str()),
            ("MinCount", min),
            ("MaxCount", max),
        ];
        world.call("RunInstances", &pairs)
    };
    assert_eq!(run("60", "60").err().unwrap().code, "InsufficientFreeAddressesInSubnet");
    assert_eq!(world.free(&world.small), 59);
    assert_eq!(run("1", "60").unwrap().all("instanceId").len(), 59);
}

#[test]
fn attributes_change_one_at_a_time() {
    let world = World::new();
    let eni = world.attached_eni("m5.large");
    let group = world
        .ok("CreateSecurityGroup", &[("GroupName", "g"), ("GroupDescription", "d"), ("VpcId", &world.vpc)])
        .one("groupId");
    let modify = |pairs: &[(&str, &str)]| {
        let pairs: Vec<_> = [("NetworkInterfaceId", eni.as_str())].into_iter().chain(pairs.iter().copied()).collect();
        world.call("ModifyNetworkInterfaceAttribute", &pairs)
    };
    modify(&[("SourceDestCheck.Value", "false")]).unwrap();
    modify(&[("Description.Value", "hello")]).unwrap();
    modify(&[("SecurityGroupId.1", &group)]).unwrap();
    let shown = world.eni(&eni);
    assert_eq!((shown.one("sourceDestCheck"), shown.one("description")), ("false".into(), "hello".into()));
    assert_eq!(shown.all("groupId"), [group]);
    let table: [(&[(&str, &str)], &str); 4] = [
        (&[("Description.Value", "a"), ("SourceDestCheck.Value", "true")], "InvalidParameterCombination"),
        (&[], "MissingParameter"),
        (&[("SecurityGroupId.1", "sg-0123456789abcdef0")], "InvalidGroup.NotFound"),
        (
            &[("Attachment.AttachmentId", "eni-attach-0123456789abcdef0"), ("Attachment.DeleteOnTermination", "true")],
            "InvalidAttachmentID.NotFound",
        ),
    ];
    for (pairs, code) in table {
        assert_eq!(modify(pairs).err().unwrap().code, code, "{pairs:?}");
    }
}

#[test]
fn a_public_address_follows_its_private_one() {
    let world = World::new();
    let answer = world.ok("CreateInternetGateway", &[]);
    let gateway = answer.one("internetGatewayId");
    let eni = world.new_eni(&world.subnet);
    let address = world.ok("AllocateAddress", &[("Domain", "vpc")]);
    let (allocation, public) = (address.one("allocationId"), address.one("publicIp"));
    let associate = [("AllocationId", allocation.as_str()), ("NetworkInterfaceId", eni.as_str())];
    assert_eq!(world.code("AssociateAddress", &associate), "Gateway.NotAttached");
    world.ok("AttachInternetGateway", &[("InternetGatewayId", &gateway), ("VpcId", &world.vpc)]);
    let association = world.ok("AssociateAddress", &associate).one("associationId");
    assert_eq!(world.eni(&eni).one("publicIp"), public);
    let private = world.eni(&eni).one("privateIpAddress").parse().unwrap();
    let view = world.ec2.view(world.now);
    assert_eq!(view.eni(&eni.parse().unwrap()).unwrap().public[&private].to_string(), public);
    assert!(view.vpcs[0].internet_gateway);
    assert_eq!(world.code("ReleaseAddress", &[("AllocationId", &allocation)]), "InvalidIPAddress.InUse");
    world.ok("DisassociateAddress", &[("AssociationId", &association)]);
    world.ok("ReleaseAddress", &[("AllocationId", &allocation)]);
    assert!(world.eni(&eni).all("publicIp").is_empty());
}
