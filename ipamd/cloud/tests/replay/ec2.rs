//! The adapter against replayed EC2 answers: what each action sends, how each answer is read, what each failure
//! becomes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Answer, Canned, Keys, Request};
use flatwire_cloud::{AwsCloud, CallObserver, Config, ConfigError};
use flatwire_core::ids::{AttachmentId, DeviceIndex, EniId, InstanceId, SecurityGroupId, SubnetId, VpcId};
use flatwire_core::ports::{
    Cloud, CloudError, CloudErrorKind as Kind, CloudReply, CloudRequest, EniKind, EniStatus, InstanceLimits, Want,
};

const HTTP_TIMEOUT: Duration = Duration::from_millis(700);

fn eni() -> EniId {
    EniId::new("eni-0bbbbbbbbbbbbbbb1").unwrap()
}

fn instance() -> InstanceId {
    InstanceId::new("i-0123456789abcdef0").unwrap()
}

fn attachment() -> AttachmentId {
    AttachmentId::new("eni-attach-0bbbbbbbbbbbbbbb1").unwrap()
}

fn vpc() -> VpcId {
    VpcId::new("vpc-0123456789abcdef0").unwrap()
}

fn create(want: Want) -> CloudRequest {
    CloudRequest::CreateEni {
        subnet: SubnetId::new("subnet-0b7f8e1a2c3d4e5f6").unwrap(),
        security_groups: vec![SecurityGroupId::new("sg-1").unwrap(), SecurityGroupId::new("sg-2").unwrap()],
        want,
        ipv6_prefix: false,
        description: "aws-K8S-i-0123456789abcdef0".to_owned(),
        tags: BTreeMap::from([("cluster.k8s.amazonaws.com/name".to_owned(), "c 1&2".to_owned())]),
        client_token: "token-1".to_owned(),
    }
}

fn assign(want: Want) -> CloudRequest {
    CloudRequest::Assign { eni: eni(), want }
}

fn attach() -> CloudRequest {
    CloudRequest::AttachEni { eni: eni(), instance: instance(), device: DeviceIndex(1), card: 0 }
}

/// The adapter with its EC2 and a metadata service that holds nothing but credentials.
struct Bench {
    ec2: Canned,
    _imds: Canned,
    cloud: AwsCloud,
}

fn bench(answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Bench {
    let ec2 = Canned::start(answer);
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |_, _| None);
    let config = Config {
        region: Some("eu-west-1".to_owned()),
        ec2_endpoint: Some(ec2.url()),
        imds_endpoint: Some(imds.url()),
        http_timeout: HTTP_TIMEOUT,
        ..Config::new("0.1.0")
    };
    let cloud = AwsCloud::connect(config, Arc::new(())).unwrap();
    Bench { ec2, _imds: imds, cloud }
}

impl Bench {
    async fn call(&self, request: CloudRequest) -> Result<CloudReply, CloudError> {
        self.cloud.call(request).await
    }

    fn last(&self) -> Request {
        self.ec2.asked().pop().unwrap()
    }
}

fn refusal(status: u16, code: &str, message: &str) -> Answer {
    Answer::status(
        status,
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Response><Errors><Error>\
             <Code>{code}</Code><Message>{message}</Message></Error></Errors>\
             <RequestID>ea966190-f9aa-478e-9ede-example</RequestID></Response>"
        ),
    )
}

fn slots(texts: &[&str]) -> BTreeSet<ipnet::IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[tokio::test]
async fn describe_node_filters_and_follows_every_page() {
    let bench = bench(|request, _| match request.form("NextToken") {
        None => Answer::ok(include_str!("answers/describe_network_interfaces_1.xml")),
        Some(token) if token == "opaque==" => Answer::ok(include_str!("answers/describe_network_interfaces_2.xml")),
        Some(other) => refusal(400, "InvalidPaginationToken", &other),
    });
    let CloudReply::Enis(enis) = bench.call(CloudRequest::DescribeNode { instance: instance() }).await.unwrap() else {
        panic!("not a node")
    };

    let asked = bench.ec2.asked();
    assert_eq!(asked.len(), 2);
    for request in &asked {
        assert_eq!(request.form("Action").as_deref(), Some("DescribeNetworkInterfaces"));
        assert_eq!(request.form("Version").as_deref(), Some("2016-11-15"));
        assert_eq!(request.form("MaxResults").as_deref(), Some("1000"));
        assert_eq!(request.form("Filter.1.Name").as_deref(), Some("attachment.instance-id"));
        assert_eq!(request.form("Filter.1.Value.1").as_deref(), Some("i-0123456789abcdef0"));
        assert!(request.header("authorization").unwrap().contains("Credential=AKIDEXAMPLE/"), "{request:?}");
        assert!(request.header("x-amz-user-agent").unwrap().contains("app/flatwire-0.1.0"), "{request:?}");
    }

    let [primary, trunk, efa] = &enis[..] else { panic!("{enis:?}") };
    assert_eq!(primary.id.as_str(), "eni-0aaaaaaaaaaaaaaa1");
    assert_eq!(primary.mac.to_string(), "02:78:d7:00:8a:1e");
    assert_eq!((primary.device, primary.card), (DeviceIndex::PRIMARY, 0));
    assert_eq!(primary.primary_ipv4.to_string(), "10.0.1.17");
    assert_eq!(primary.slots, slots(&["10.0.1.33/32", "10.0.1.201/32", "10.0.1.64/28"]));
    assert_eq!(primary.security_groups.len(), 2);
    assert_eq!(primary.attachment.as_ref().unwrap().as_str(), "eni-attach-0aaaaaaaaaaaaaaa1");
    assert_eq!((primary.status, primary.kind), (EniStatus::Attached, EniKind::Interface));
    assert_eq!(primary.subnet_cidr, None);

    assert_eq!((trunk.status, trunk.kind, trunk.device), (EniStatus::Attaching, EniKind::Trunk, DeviceIndex(1)));
    assert_eq!(trunk.tags["eks:eni:owner"], "amazon-vpc-cni");
    assert_eq!(trunk.description, "aws-K8S-i-0123456789abcdef0");
    assert!(trunk.slots.is_empty());

    // An EFA-only interface takes a device index of its card but has no address.
    assert_eq!((efa.status, efa.kind, efa.card), (EniStatus::Detaching, EniKind::Efa, 2));
    assert!(efa.primary_ipv4.is_unspecified());
}

#[tokio::test]
async fn describe_eni_finds_one_or_says_not_found() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/describe_network_interfaces_2.xml")));
    let found = EniId::new("eni-0aaaaaaaaaaaaaaa3").unwrap();
    let CloudReply::Eni(view) = bench.call(CloudRequest::DescribeEni { eni: found.clone() }).await.unwrap() else {
        panic!("not an ENI")
    };
    assert_eq!(view.id, found);
    assert_eq!(bench.last().form("NetworkInterfaceId.1").as_deref(), Some("eni-0aaaaaaaaaaaaaaa3"));
    // EC2 refuses ids together with a page size.
    assert_eq!(bench.last().form("MaxResults"), None);

    let error = bench.call(CloudRequest::DescribeEni { eni: eni() }).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::NotFound, "InvalidNetworkInterfaceID.NotFound"));
}

#[tokio::test]
async fn describe_unattached_narrows_by_tags_and_follows_every_page() {
    let bench = bench(|request, _| match request.form("NextToken") {
        None => Answer::ok(include_str!("answers/describe_network_interfaces_1.xml")),
        Some(token) if token == "opaque==" => Answer::ok(include_str!("answers/describe_network_interfaces_2.xml")),
        Some(other) => refusal(400, "InvalidPaginationToken", &other),
    });
    let tags = BTreeMap::from([
        ("cluster.k8s.amazonaws.com/name".to_owned(), "c 1".to_owned()),
        ("node.k8s.amazonaws.com/instance_id".to_owned(), instance().to_string()),
    ]);
    let request = CloudRequest::DescribeUnattached { vpc: vpc(), tags };
    let CloudReply::Enis(enis) = bench.call(request).await.unwrap() else { panic!("not ENIs") };
    assert_eq!(enis.len(), 3);
    let asked = bench.ec2.asked();
    assert_eq!(asked.len(), 2);
    let filters = [
        ("status", "available"),
        ("vpc-id", "vpc-0123456789abcdef0"),
        ("tag-key", "node.k8s.amazonaws.com/instance_id"),
        ("tag:cluster.k8s.amazonaws.com/name", "c 1"),
        ("tag:node.k8s.amazonaws.com/instance_id", "i-0123456789abcdef0"),
    ];
    for request in &asked {
        for (n, (name, value)) in (1..).zip(filters) {
            assert_eq!(request.form(&format!("Filter.{n}.Name")).as_deref(), Some(name));
            assert_eq!(request.form(&format!("Filter.{n}.Value.1")).as_deref(), Some(value), "{name}");
        }
        assert_eq!(request.form("Filter.6.Name"), None);
        assert_eq!(request.form("MaxResults").as_deref(), Some("1000"));
    }
}

/// Part of a list must never be taken for the whole: whoever compares with it would give up what it does not show.
#[tokio::test]
async fn a_list_whose_second_page_fails_is_an_error() {
    let requests = [
        CloudRequest::DescribeNode { instance: instance() },
        CloudRequest::DescribeUnattached { vpc: vpc(), tags: BTreeMap::new() },
    ];
    for request in requests {
        let bench = bench(|request, _| match request.form("NextToken") {
            None => Answer::ok(include_str!("answers/describe_network_interfaces_1.xml")),
            Some(_) => refusal(503, "RequestLimitExceeded", "Request limit exceeded."),
        });
        assert_eq!(bench.call(request).await.unwrap_err().kind, Kind::Throttled);
    }
    let page = "<DescribeSubnetsResponse><subnetSet/><nextToken>more</nextToken></DescribeSubnetsResponse>";
    let bench = bench(move |request, _| match request.form("NextToken") {
        None => Answer::ok(page),
        Some(_) => refusal(403, "UnauthorizedOperation", "no"),
    });
    let request = CloudRequest::DescribeSubnets { vpc: vpc(), availability_zone: "eu-west-1a".to_owned() };
    assert_eq!(bench.call(request).await.unwrap_err().kind, Kind::Denied);
}

#[tokio::test]
async fn a_list_without_end_is_refused() {
    let bench = bench(|_, before| {
        Answer::ok(format!(
            "<DescribeNetworkInterfacesResponse><networkInterfaceSet/><nextToken>page-{before}</nextToken>\
             </DescribeNetworkInterfacesResponse>"
        ))
    });
    let error = bench.call(CloudRequest::DescribeNode { instance: instance() }).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Malformed"), "{error}");
    assert!(error.message.contains("50 pages"), "{error}");
    assert_eq!(bench.ec2.asked().len(), 50);
}

#[tokio::test]
async fn describe_subnets_reads_what_a_pool_needs() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/describe_subnets.xml")));
    let request = CloudRequest::DescribeSubnets { vpc: vpc(), availability_zone: "eu-west-1a".to_owned() };
    let CloudReply::Subnets(subnets) = bench.call(request).await.unwrap() else { panic!("not subnets") };
    let [subnet] = &subnets[..] else { panic!("the IPv6-only subnet is none of ours: {subnets:?}") };
    assert_eq!((subnet.cidr.to_string().as_str(), subnet.free_addresses), ("10.0.1.0/24", 231));
    assert_eq!(subnet.tags["kubernetes.io/role/cni"], "1");
    let asked = bench.last();
    assert_eq!(asked.form("Filter.1.Name").as_deref(), Some("vpc-id"));
    assert_eq!(asked.form("Filter.2.Name").as_deref(), Some("availability-zone"));
    assert_eq!(asked.form("Filter.2.Value.1").as_deref(), Some("eu-west-1a"));
    assert_eq!(asked.form("MaxResults").as_deref(), Some("200"));
}

#[tokio::test]
async fn describe_subnets_follows_every_page() {
    let subnet = |n: u32, token: &str| {
        format!(
            "<DescribeSubnetsResponse><subnetSet><item><subnetId>subnet-{n}</subnetId><cidrBlock>10.0.{n}.0/24</cidrBlock>\
             <availableIpAddressCount>{n}</availableIpAddressCount></item></subnetSet>{token}</DescribeSubnetsResponse>"
        )
    };
    let bench = bench(move |request, _| match request.form("NextToken") {
        None => Answer::ok(subnet(1, "<nextToken>two</nextToken>")),
        Some(_) => Answer::ok(subnet(2, "")),
    });
    let request = CloudRequest::DescribeSubnets { vpc: vpc(), availability_zone: "eu-west-1a".to_owned() };
    let CloudReply::Subnets(subnets) = bench.call(request).await.unwrap() else { panic!("not subnets") };
    let seen: Vec<_> = subnets.iter().map(|subnet| (subnet.id.as_str(), subnet.free_addresses)).collect();
    assert_eq!(seen, [("subnet-1", 1), ("subnet-2", 2)]);
    assert_eq!(bench.last().form("NextToken").as_deref(), Some("two"));
    assert_eq!(bench.last().form("Filter.1.Name").as_deref(), Some("vpc-id"), "every page is filtered");
}

#[tokio::test]
async fn limits_are_those_of_the_default_card() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/describe_instance_types.xml")));
    let ask = |name: &str| CloudRequest::DescribeInstanceType { instance_type: name.to_owned() };
    let expected = InstanceLimits {
        instance_type: "p4d.24xlarge".to_owned(),
        max_enis: 15,
        ipv4_per_eni: 50,
        ipv6_per_eni: 50,
        prefixes: true,
    };
    assert_eq!(bench.call(ask("p4d.24xlarge")).await.unwrap(), CloudReply::InstanceType(expected));
    assert_eq!(bench.last().form("InstanceType.1").as_deref(), Some("p4d.24xlarge"));
    assert_eq!(bench.call(ask("m5.large")).await.unwrap_err().code, "Malformed");
}

#[tokio::test]
async fn create_sends_everything_in_one_call() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/create_network_interface.xml")));
    let CloudReply::Created(created) = bench.call(create(Want::Addresses(2))).await.unwrap() else {
        panic!("not created")
    };
    assert_eq!(created.slots, slots(&["10.0.1.91/32", "10.0.1.140/32"]));
    assert_eq!((created.status, created.attachment), (EniStatus::Available, None));
    assert_eq!(created.tags["node"], "n1");

    let asked = bench.last();
    for (name, value) in [
        ("Action", "CreateNetworkInterface"),
        ("SubnetId", "subnet-0b7f8e1a2c3d4e5f6"),
        ("SecurityGroupId.1", "sg-1"),
        ("SecurityGroupId.2", "sg-2"),
        ("Description", "aws-K8S-i-0123456789abcdef0"),
        ("SecondaryPrivateIpAddressCount", "2"),
        ("TagSpecification.1.ResourceType", "network-interface"),
        ("TagSpecification.1.Tag.1.Key", "cluster.k8s.amazonaws.com/name"),
        ("TagSpecification.1.Tag.1.Value", "c 1&2"),
        ("ClientToken", "token-1"),
    ] {
        assert_eq!(asked.form(name).as_deref(), Some(value), "{name} in {}", asked.body);
    }
    assert_eq!(asked.form("Ipv4PrefixCount"), None);

    bench.call(create(Want::Prefixes(3))).await.unwrap();
    assert_eq!(bench.last().form("Ipv4PrefixCount").as_deref(), Some("3"));
    assert_eq!(bench.last().form("SecondaryPrivateIpAddressCount"), None);

    bench.call(create(Want::Addresses(0))).await.unwrap();
    assert_eq!(bench.last().form("SecondaryPrivateIpAddressCount"), None);
}

#[tokio::test]
async fn attach_always_names_the_card() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/attach_network_interface.xml")));
    assert_eq!(bench.call(attach()).await.unwrap(), CloudReply::Attached { attachment: attachment() });
    let asked = bench.last();
    assert_eq!(asked.form("NetworkInterfaceId").as_deref(), Some("eni-0bbbbbbbbbbbbbbb1"));
    assert_eq!(asked.form("InstanceId").as_deref(), Some("i-0123456789abcdef0"));
    assert_eq!(asked.form("DeviceIndex").as_deref(), Some("1"));
    assert_eq!(asked.form("NetworkCardIndex").as_deref(), Some("0"));
}

#[tokio::test]
async fn assign_returns_what_ec2_says_is_new() {
    let bench = bench(|request, _| match request.form("Ipv4PrefixCount") {
        None => Answer::ok(include_str!("answers/assign_addresses.xml")),
        Some(_) => Answer::ok(include_str!("answers/assign_prefixes.xml")),
    });
    let addresses = bench.call(assign(Want::Addresses(2))).await.unwrap();
    assert_eq!(addresses, CloudReply::Assigned(slots(&["10.0.1.9/32", "10.0.1.150/32"])));
    assert_eq!(bench.last().form("SecondaryPrivateIpAddressCount").as_deref(), Some("2"));
    assert_eq!(bench.last().form("AllowReassignment"), None);

    let prefixes = bench.call(assign(Want::Prefixes(2))).await.unwrap();
    assert_eq!(prefixes, CloudReply::Assigned(slots(&["10.0.1.16/28", "10.0.1.160/28"])));
    assert_eq!(bench.last().form("Ipv4PrefixCount").as_deref(), Some("2"));
    assert_eq!(bench.last().form("SecondaryPrivateIpAddressCount"), None);
}

#[tokio::test]
async fn assign_by_name_takes_nobody_elses() {
    let bench = bench(|request, _| match request.form("Ipv4Prefix.1") {
        None => Answer::ok(include_str!("answers/assign_addresses.xml")),
        Some(_) => Answer::ok(include_str!("answers/assign_prefixes.xml")),
    });
    let named = |texts: &[&str]| CloudRequest::AssignNamed { eni: eni(), slots: slots(texts) };
    let both = bench.call(named(&["10.0.1.9/32", "10.0.1.150/32", "10.0.1.16/28", "10.0.1.160/28"])).await.unwrap();
    let all = slots(&["10.0.1.9/32", "10.0.1.150/32", "10.0.1.16/28", "10.0.1.160/28"]);
    assert_eq!(both, CloudReply::Assigned(all));
    let asked = bench.ec2.asked();
    assert_eq!(asked.len(), 2, "EC2 does not say that it takes both kinds at once");
    assert_eq!(asked[0].form("PrivateIpAddress.1").as_deref(), Some("10.0.1.9"));
    assert_eq!(asked[0].form("PrivateIpAddress.2").as_deref(), Some("10.0.1.150"));
    assert_eq!(asked[0].form("Ipv4Prefix.1"), None);
    assert_eq!(asked[1].form("Ipv4Prefix.2").as_deref(), Some("10.0.1.160/28"));
    assert_eq!(asked[1].form("PrivateIpAddress.1"), None);
    for request in &asked {
        assert_eq!(request.form("Action").as_deref(), Some("AssignPrivateIpAddresses"));
        assert_eq!(request.form("NetworkInterfaceId").as_deref(), Some("eni-0bbbbbbbbbbbbbbb1"));
        for never in ["AllowReassignment", "SecondaryPrivateIpAddressCount", "Ipv4PrefixCount"] {
            assert_eq!(request.form(never), None, "{never}");
        }
    }

    bench.call(named(&["10.0.1.16/28"])).await.unwrap();
    assert_eq!(bench.ec2.asked().len(), 3);
    assert_eq!(bench.call(named(&["10.0.0.0/16"])).await.unwrap_err().kind, Kind::Invalid);
    assert_eq!(bench.ec2.asked().len(), 3, "a request that cannot be put is not sent");
}

#[tokio::test]
async fn an_ipv6_prefix_is_asked_for_by_count_or_by_name() {
    const ANSWER: &str = r#"<AssignIpv6AddressesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">
        <requestId>5f1c0a3e</requestId><networkInterfaceId>eni-0bbbbbbbbbbbbbbb1</networkInterfaceId>
        <assignedIpv6PrefixSet><item>2600:1f13:0:1:2::/80</item></assignedIpv6PrefixSet>
        </AssignIpv6AddressesResponse>"#;
    let bench = bench(|_, _| Answer::ok(ANSWER));
    let prefix = "2600:1f13:0:1:2::/80".parse().unwrap();
    for (named, count, name) in [(None, Some("1"), None), (Some(prefix), None, Some("2600:1f13:0:1:2::/80"))] {
        let reply = bench.call(CloudRequest::AssignIpv6Prefix { eni: eni(), prefix: named }).await.unwrap();
        assert_eq!(reply, CloudReply::Assigned(slots(&["2600:1f13:0:1:2::/80"])));
        let asked = bench.last();
        assert_eq!(asked.form("Action").as_deref(), Some("AssignIpv6Addresses"));
        assert_eq!(asked.form("Ipv6PrefixCount").as_deref(), count);
        assert_eq!(asked.form("Ipv6Prefix.1").as_deref(), name);
    }
}

#[tokio::test]
async fn unassign_keeps_addresses_and_prefixes_apart() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/done.xml")));
    let unassign = |texts: &[&str]| CloudRequest::Unassign { eni: eni(), slots: slots(texts) };
    let mixed = unassign(&["10.0.1.9/32", "10.0.1.150/32", "10.0.1.16/28"]);
    assert_eq!(bench.call(mixed).await.unwrap(), CloudReply::Done);
    let asked = bench.ec2.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].form("PrivateIpAddress.1").as_deref(), Some("10.0.1.9"));
    assert_eq!(asked[0].form("PrivateIpAddress.2").as_deref(), Some("10.0.1.150"));
    assert_eq!(asked[0].form("Ipv4Prefix.1"), None);
    assert_eq!(asked[1].form("Ipv4Prefix.1").as_deref(), Some("10.0.1.16/28"));
    assert_eq!(asked[1].form("PrivateIpAddress.1"), None);

    for bad in ["10.0.1.0/24", "2001:db8::/80"] {
        assert_eq!(bench.call(unassign(&[bad])).await.unwrap_err().kind, Kind::Invalid, "{bad}");
    }
    assert_eq!(bench.ec2.asked().len(), 2, "a request that cannot be put is not sent");
}

#[tokio::test]
async fn the_silent_actions_send_what_they_should() {
    let bench = bench(|_, _| Answer::ok(include_str!("answers/done.xml")));
    bench.call(CloudRequest::SetDeleteOnTermination { eni: eni(), attachment: attachment() }).await.unwrap();
    let asked = bench.last();
    assert_eq!(asked.form("Action").as_deref(), Some("ModifyNetworkInterfaceAttribute"));
    assert_eq!(asked.form("Attachment.AttachmentId").as_deref(), Some("eni-attach-0bbbbbbbbbbbbbbb1"));
    assert_eq!(asked.form("Attachment.DeleteOnTermination").as_deref(), Some("true"));

    let groups = ["sg-2", "sg-1"].map(|id| SecurityGroupId::new(id).unwrap()).to_vec();
    bench.call(CloudRequest::SetSecurityGroups { eni: eni(), security_groups: groups }).await.unwrap();
    let asked = bench.last();
    assert_eq!(asked.form("Action").as_deref(), Some("ModifyNetworkInterfaceAttribute"));
    assert_eq!(asked.form("NetworkInterfaceId").as_deref(), Some("eni-0bbbbbbbbbbbbbbb1"));
    assert_eq!(asked.form("SecurityGroupId.1").as_deref(), Some("sg-2"));
    assert_eq!(asked.form("SecurityGroupId.2").as_deref(), Some("sg-1"));
    assert_eq!(asked.form("Attachment.AttachmentId"), None, "one attribute a call");

    bench.call(CloudRequest::DetachEni { eni: eni(), attachment: attachment() }).await.unwrap();
    let asked = bench.last();
    assert_eq!(asked.form("AttachmentId").as_deref(), Some("eni-attach-0bbbbbbbbbbbbbbb1"));
    assert_eq!(asked.form("Force"), None);

    bench.call(CloudRequest::DeleteEni { eni: eni() }).await.unwrap();
    assert_eq!(bench.last().form("NetworkInterfaceId").as_deref(), Some("eni-0bbbbbbbbbbbbbbb1"));

    let tags = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
    bench.call(CloudRequest::TagEni { eni: eni(), tags }).await.unwrap();
    let asked = bench.last();
    assert_eq!(asked.form("Action").as_deref(), Some("CreateTags"));
    assert_eq!(asked.form("ResourceId.1").as_deref(), Some("eni-0bbbbbbbbbbbbbbb1"));
    assert_eq!(asked.form("Tag.1.Key").as_deref(), Some("a"));
}

/// `docs/errors.md`, row by row, as EC2 words it on the wire.
#[tokio::test]
async fn every_known_refusal_keeps_its_code_and_gets_its_class() {
    let delete = || CloudRequest::DeleteEni { eni: eni() };
    let detach = || CloudRequest::DetachEni { eni: eni(), attachment: attachment() };
    let unassign = || CloudRequest::Unassign { eni: eni(), slots: slots(&["10.0.1.9/32"]) };
    let sufficient = "There aren't sufficient free Ipv4 addresses or prefixes";
    let denied = "You are not authorized to perform this operation. User: arn:aws:sts::1:assumed-role/n/i-1 \
                  is not authorized to perform: ec2:AssignPrivateIpAddresses. Encoded authorization failure message: x";
    let table = [
        (assign(Want::Addresses(1)), 503, "RequestLimitExceeded", "Request limit exceeded.", Kind::Throttled),
        (assign(Want::Addresses(1)), 503, "Unavailable", "The service is unavailable.", Kind::Transient),
        (assign(Want::Addresses(1)), 500, "InternalError", "An internal error has occurred", Kind::Transient),
        (
            assign(Want::Addresses(1)),
            400,
            "PrivateIpAddressLimitExceeded",
            "Number of private addresses will exceed limit.",
            Kind::EniFull,
        ),
        (
            assign(Want::Addresses(1)),
            400,
            "InsufficientFreeAddressesInSubnet",
            "The specified subnet does not have enough free addresses to satisfy the request.",
            Kind::SubnetEmpty,
        ),
        (
            assign(Want::Prefixes(1)),
            400,
            "InsufficientCidrBlocks",
            "The specified subnet does not have enough free cidr blocks to satisfy the request.",
            Kind::Fragmented,
        ),
        (assign(Want::Prefixes(1)), 400, "InvalidParameterValue", sufficient, Kind::Fragmented),
        (assign(Want::Addresses(1)), 400, "InvalidParameterValue", sufficient, Kind::SubnetEmpty),
        (create(Want::Prefixes(1)), 400, "InvalidParameterValue", sufficient, Kind::Fragmented),
        (create(Want::Prefixes(1)), 400, "InsufficientFreeAddressesInSubnet", "…", Kind::Fragmented),
        (create(Want::Addresses(1)), 400, "InsufficientCidrBlocks", "…", Kind::SubnetEmpty),
        (
            create(Want::Addresses(1)),
            400,
            "NetworkInterfaceLimitExceeded",
            "The maximum number of network interfaces has been reached.",
            Kind::AccountFull,
        ),
        (create(Want::Addresses(1)), 400, "IdempotentParameterMismatch", "…", Kind::Invalid),
        (
            create(Want::Addresses(1)),
            400,
            "InvalidSubnetID.NotFound",
            "The subnet ID 'subnet-1' does not exist",
            Kind::NotFound,
        ),
        (
            attach(),
            400,
            "AttachmentLimitExceeded",
            "Interface count 9 exceeds the limit for m5a.4xlarge",
            Kind::InstanceFull,
        ),
        (
            attach(),
            400,
            "InvalidParameterValue",
            "Instance 'i-1' already has an interface attached at device index '1'.",
            Kind::DeviceTaken,
        ),
        (
            attach(),
            400,
            "InvalidInterface.IpAddressLimitExceeded",
            "Interface has 50 addresses, exceeding the limit",
            Kind::EniFull,
        ),
        (attach(), 400, "InvalidNetworkInterface.InUse", "Interface: [eni-1] in use.", Kind::Busy),
        (attach(), 400, "IncorrectState", "Instance 'i-1' is not 'running'.", Kind::Busy),
        (attach(), 400, "InvalidInstanceID.NotFound", "The instance ID 'i-1' does not exist", Kind::NotFound),
        (
            detach(),
            400,
            "OperationNotPermitted",
            "The network interface at device index 0 and networkCard index 0 cannot be detached.",
            Kind::Invalid,
        ),
        (
            detach(),
            400,
            "InvalidAttachmentID.NotFound",
            "The interface attachment 'eni-attach-1' does not exist.",
            Kind::NotFound,
        ),
        (delete(), 400, "InvalidParameterValue", "Network interface 'eni-1' is currently in use.", Kind::Busy),
        (
            delete(),
            400,
            "InvalidNetworkInterfaceID.NotFound",
            "The networkInterface ID 'eni-1' does not exist",
            Kind::NotFound,
        ),
        (
            unassign(),
            400,
            "InvalidParameterValue",
            "Some of the specified addresses are not assigned to interface eni-1",
            Kind::NotFound,
        ),
        (assign(Want::Addresses(1)), 403, "UnauthorizedOperation", denied, Kind::Denied),
        (assign(Want::Addresses(1)), 403, "AccessDenied", "User is not authorized", Kind::Denied),
        (
            assign(Want::Addresses(1)),
            401,
            "AuthFailure",
            "AWS was not able to validate the provided access credentials",
            Kind::Denied,
        ),
        (assign(Want::Addresses(1)), 400, "RequestExpired", "Request has expired.", Kind::Transient),
        (assign(Want::Addresses(1)), 400, "MissingParameter", "…", Kind::Invalid),
        (
            assign(Want::Addresses(1)),
            412,
            "DryRunOperation",
            "Request would have succeeded, but DryRun flag is set.",
            Kind::Invalid,
        ),
    ];
    for (request, status, code, message, kind) in table {
        let bench = {
            let (code, message) = (code.to_owned(), message.to_owned());
            bench(move |_, _| refusal(status, &code, &message))
        };
        let action = request.action();
        let error = bench.call(request).await.unwrap_err();
        assert_eq!((error.kind, error.code.as_str()), (kind, code), "{action} {message}");
        assert_eq!((error.action.as_str(), error.message.as_str()), (action, message));
        assert_eq!(error.request_id.as_deref(), Some("ea966190-f9aa-478e-9ede-example"));
        assert_eq!(bench.ec2.asked().len(), 1, "{action} is a mutation and sent once");
    }
}

#[tokio::test]
async fn a_read_is_tried_three_times_and_a_mutation_once() {
    let describe = CloudRequest::DescribeEni { eni: EniId::new("eni-0aaaaaaaaaaaaaaa3").unwrap() };
    let throttled = bench(|_, _| refusal(503, "RequestLimitExceeded", "Request limit exceeded."));
    assert_eq!(throttled.call(describe.clone()).await.unwrap_err().kind, Kind::Throttled);
    assert_eq!(throttled.ec2.asked().len(), 3);

    let third = bench(|_, before| match before {
        0 => Answer::Hangup,
        1 => Answer::status(500, "<html>"),
        _ => Answer::ok(include_str!("answers/describe_network_interfaces_2.xml")),
    });
    third.call(describe).await.unwrap();
    assert_eq!(third.ec2.asked().len(), 3);
}

#[tokio::test]
async fn a_lost_reply_is_transient_and_not_repeated() {
    let bench = bench(|_, _| Answer::Hangup);
    let error = bench.call(assign(Want::Addresses(4))).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Connection"), "{error}");
    assert!(error.kind.outcome_unknown());
    assert_eq!(bench.ec2.asked().len(), 1);
}

#[tokio::test]
async fn a_server_that_does_not_answer_costs_one_timeout() {
    let bench = bench(|_, _| Answer::Silence(Duration::from_secs(5)));
    let started = Instant::now();
    let error = bench.call(assign(Want::Addresses(4))).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Timeout"), "{error}");
    assert!(started.elapsed() < HTTP_TIMEOUT * 3, "{:?}", started.elapsed());
    assert_eq!(bench.ec2.asked().len(), 1);
}

#[tokio::test]
async fn answers_that_are_no_ec2_answers_are_malformed() {
    let html =
        "<!doctype html>\n<html lang=en>\n<title>500 Internal Server Error</title>\n<h1>Internal Server Error</h1>";
    for (status, body) in [
        (500, html),
        (500, ""),
        (503, "Service Unavailable"),
        (502, "<html><body>bad gateway</body></html>"),
        (200, html),
        (200, "<AssignPrivateIpAddressesResponse><assignedPrivateIpAddressesSet><item><privateIpAd"),
        (
            200,
            "<AssignPrivateIpAddressesResponse><assignedPrivateIpAddressesSet><item>\
             <privateIpAddress>banana</privateIpAddress></item>\
             </assignedPrivateIpAddressesSet></AssignPrivateIpAddressesResponse>",
        ),
    ] {
        let bench = bench(move |_, _| Answer::status(status, body));
        let error = bench.call(assign(Want::Addresses(1))).await.unwrap_err();
        assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Malformed"), "{status} {body}: {error}");
        assert!(!error.message.is_empty());
    }
}

#[tokio::test]
async fn nobody_at_the_endpoint_is_a_connection_error() {
    let gone = Canned::start(|_, _| Answer::Hangup).url();
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |_, _| None);
    let config = Config {
        region: Some("eu-west-1".to_owned()),
        ec2_endpoint: Some(gone),
        imds_endpoint: Some(imds.url()),
        http_timeout: HTTP_TIMEOUT,
        ..Config::new("0.1.0")
    };
    let cloud = AwsCloud::connect(config, Arc::new(())).unwrap();
    let error = cloud.call(CloudRequest::DeleteEni { eni: eni() }).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Connection"), "{error}");
}

/// Design: a daemon must start although EC2, IMDS and credentials are all out of reach, and recover when they come.
#[tokio::test]
async fn region_and_credentials_are_looked_for_until_found() {
    let alive = Arc::new(Mutex::new((false, false)));
    let ec2 = Canned::start(|_, _| Answer::ok(include_str!("answers/attach_network_interface.xml")));
    let state = alive.clone();
    let imds = Canned::start(move |request, _| {
        let (region, role) = *state.lock().unwrap();
        match (request.method.as_str(), request.path.as_str()) {
            ("PUT", _) if region => Answer::Http {
                status: 200,
                headers: vec![("x-aws-ec2-metadata-token-ttl-seconds", "60".to_owned())],
                body: "token".into(),
            },
            (_, "/latest/meta-data/placement/region") if region => Answer::ok("eu-central-1"),
            (_, "/latest/meta-data/iam/security-credentials/") if role => Answer::ok("node"),
            (_, "/latest/meta-data/iam/security-credentials/node") if role => Answer::ok(
                r#"{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"AKIDLATE","SecretAccessKey":"s","Token":"t",
                    "LastUpdated":"2026-01-01T00:00:00Z","Expiration":"2099-01-01T00:00:00Z"}"#,
            ),
            _ => Answer::status(404, ""),
        }
    });
    let config = Config {
        ec2_endpoint: Some(ec2.url()),
        imds_endpoint: Some(imds.url()),
        http_timeout: HTTP_TIMEOUT,
        ..Config::new("0.1.0")
    };
    let cloud = AwsCloud::connect(config, Arc::new(())).unwrap();

    let error = cloud.call(attach()).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Connection"), "{error}");
    assert!(error.message.contains("region"), "{error}");

    alive.lock().unwrap().0 = true;
    let error = cloud.call(attach()).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Credentials"), "{error}");
    assert!(ec2.asked().is_empty(), "nothing unsigned goes out");

    alive.lock().unwrap().1 = true;
    cloud.call(attach()).await.unwrap();
    let authorization = ec2.asked()[0].header("authorization").unwrap().to_owned();
    assert!(authorization.contains("AKIDLATE/") && authorization.contains("/eu-central-1/ec2/"), "{authorization}");
}

#[tokio::test]
async fn the_observer_hears_of_every_call() {
    #[derive(Default)]
    struct Heard(Mutex<Vec<(String, Option<Kind>)>>);
    impl CallObserver for Heard {
        fn observed(&self, action: &str, outcome: Result<(), &CloudError>, latency: Duration) {
            assert!(latency > Duration::ZERO);
            self.0.lock().unwrap().push((action.to_owned(), outcome.err().map(|error| error.kind)));
        }
    }
    let heard = Arc::new(Heard::default());
    let ec2 = Canned::start(|request, _| match request.form("Action").as_deref() {
        Some("AttachNetworkInterface") => Answer::ok(include_str!("answers/attach_network_interface.xml")),
        _ => refusal(403, "UnauthorizedOperation", "no"),
    });
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |_, _| None);
    let config = Config {
        region: Some("eu-west-1".to_owned()),
        ec2_endpoint: Some(ec2.url()),
        imds_endpoint: Some(imds.url()),
        http_timeout: HTTP_TIMEOUT,
        ..Config::new("0.1.0")
    };
    let cloud = AwsCloud::connect(config, heard.clone()).unwrap();
    cloud.call(attach()).await.unwrap();
    cloud.call(CloudRequest::DeleteEni { eni: eni() }).await.unwrap_err();
    cloud.call(CloudRequest::ReadMetadata).await.unwrap_err();
    let expected = [
        ("AttachNetworkInterface".to_owned(), None),
        ("DeleteNetworkInterface".to_owned(), Some(Kind::Denied)),
        ("ImdsRead".to_owned(), Some(Kind::Transient)),
    ];
    assert_eq!(*heard.0.lock().unwrap(), expected);
}

#[test]
fn connecting_fails_only_on_settings_that_can_never_work() {
    let bad = Config { ec2_endpoint: Some("ec2.local".to_owned()), ..Config::new("0.1.0") };
    assert!(matches!(AwsCloud::connect(bad, Arc::new(())), Err(ConfigError::Endpoint { which: "EC2", .. })));
    let bad = Config { imds_endpoint: Some("//x".to_owned()), ..Config::new("0.1.0") };
    assert!(matches!(AwsCloud::connect(bad, Arc::new(())), Err(ConfigError::Endpoint { which: "IMDS", .. })));
    assert!(matches!(AwsCloud::connect(Config::new("0.1 ü"), Arc::new(())), Err(ConfigError::Version(_))));
}
