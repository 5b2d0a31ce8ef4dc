//! The metadata service: tokens, absent keys, listings, and its lag behind EC2.

use std::str::FromStr;

use flatwire_core::ids::{DeviceIndex, InstanceId, Time};
use lab_ec2::{
    Delays, Ec2, Ending, Faults, ImdsRequest, ImdsResponse, ImdsRule, NODE_ROLE, Options, RunInstance, Tags, When,
};

struct Node {
    ec2: Ec2,
    now: Time,
    id: InstanceId,
    token: String,
}

impl Node {
    fn new(delays: Delays) -> Self {
        let ec2 = Ec2::new(Options { delays, ..Options::default() });
        let now = Time(1_700_000_000_000);
        let vpc = ec2.create_vpc(now, "10.0.0.0/16".parse().unwrap(), "v").unwrap();
        ec2.associate_vpc_cidr(now, &vpc, "100.64.0.0/16".parse().unwrap()).unwrap();
        let subnet = ec2.create_subnet(now, &vpc, "10.0.0.0/24".parse().unwrap(), None, Tags::new()).unwrap();
        ec2.create_internet_gateway(now, &vpc).unwrap();
        let run = RunInstance { ipv4_prefix_count: 1, public_ip: true, ..RunInstance::new("m5.large", subnet) };
        let id = ec2.run_instance(now, &run).unwrap();
        let mut node = Self { ec2, now, id, token: String::new() };
        let answer = node.ask("PUT", "/latest/api/token", &[("X-aws-ec2-metadata-token-ttl-seconds", "21600")]);
        assert_eq!((answer.status, answer.ttl), (200, Some(2)));
        assert!(answer.headers.contains(&("x-aws-ec2-metadata-token-ttl-seconds".into(), "21600".into())));
        node.token = answer.body;
        node
    }

    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> ImdsResponse {
        self.ask_as(&self.id, method, path, headers)
    }

    fn ask_as(&self, id: &InstanceId, method: &str, path: &str, headers: &[(&str, &str)]) -> ImdsResponse {
        let headers: Vec<_> = headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.ec2.imds_request(self.now, id, &ImdsRequest { method, path, headers: &headers })
    }

    fn get(&self, path: &str) -> (u16, String) {
        let answer = self.ask("GET", &format!("/latest/{path}"), &[("x-aws-ec2-metadata-token", &self.token)]);
        (answer.status, answer.body)
    }

    #[track_caller]
    fn value(&self, path: &str) -> String {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{path}: {body}");
        body
    }
}

#[test]
fn tokens_are_asked_for_properly_and_expire() {
    let mut node = Node::new(Delays::NONE);
    for headers in [
        &[][..],
        &[("X-aws-ec2-metadata-token-ttl-seconds", "0")],
        &[("X-aws-ec2-metadata-token-ttl-seconds", "21601")],
    ] {
        assert_eq!(node.ask("PUT", "/latest/api/token", headers).status, 400);
    }
    let ttl = ("X-aws-ec2-metadata-token-ttl-seconds", "10");
    assert_eq!(node.ask("PUT", "/latest/api/token", &[ttl, ("X-Forwarded-For", "1.2.3.4")]).status, 403);
    assert_eq!(node.ask("GET", "/latest/api/token", &[ttl]).status, 405);
    assert_eq!(node.ask("GET", "/latest/meta-data/mac", &[]).status, 401);
    assert_eq!(node.ask("GET", "/latest/meta-data/mac", &[("x-aws-ec2-metadata-token", "x")]).status, 401);
    assert_eq!(node.get("meta-data/mac").0, 200);
    let short = node.ask("PUT", "/latest/api/token", &[ttl]).body;
    node.now = node.now.plus_ms(9_999);
    assert_eq!(node.ask("GET", "/latest/meta-data/mac", &[("x-aws-ec2-metadata-token", &short)]).status, 200);
    node.now = node.now.plus_ms(1);
    assert_eq!(node.ask("GET", "/latest/meta-data/mac", &[("x-aws-ec2-metadata-token", &short)]).status, 401);
    let subnet = node.ec2.view(node.now).subnets[0].id.clone();
    let other = node.ec2.run_instance(node.now, &RunInstance::new("t3.nano", subnet)).unwrap();
    let stolen = [("x-aws-ec2-metadata-token", node.token.as_str())];
    assert_eq!(node.ask_as(&other, "GET", "/latest/meta-data/mac", &stolen).status, 401);
    assert_eq!(node.ask("POST", "/latest/meta-data/mac", &stolen).status, 405);
}

#[test]
fn the_tree_says_what_the_add_on_reads() {
    let node = Node::new(Delays::NONE);
    let view = node.ec2.view(node.now);
    let (eni, subnet, vpc) = (&view.enis[0], &view.subnets[0], &view.vpcs[0]);
    let group = eni.security_groups[0].to_string();
    let mac = node.value("meta-data/mac");
    assert_eq!(mac, eni.mac.to_string());
    let table = [
        ("instance-id", node.id.to_string()),
        ("instance-type", "m5.large".into()),
        ("local-ipv4", eni.primary_ipv4.to_string()),
        ("public-ipv4", eni.public[&eni.primary_ipv4].to_string()),
        ("placement/availability-zone", "us-east-1a".into()),
        ("placement/availability-zone-id", "use1-az1".into()),
        ("placement/region", "us-east-1".into()),
        ("network/interfaces/macs", format!("{mac}/")),
        ("network/interfaces/macs/", format!("{mac}/")),
    ];
    for (path, value) in table {
        assert_eq!(node.value(&format!("meta-data/{path}")), value, "{path}");
    }
    let table = [
        ("device-number", "0".to_owned()),
        ("interface-id", eni.id.to_string()),
        ("subnet-id", subnet.id.to_string()),
        ("subnet-ipv4-cidr-block", "10.0.0.0/24".into()),
        ("vpc-id", vpc.id.to_string()),
        ("vpc-ipv4-cidr-block", "10.0.0.0/16".into()),
        ("vpc-ipv4-cidr-blocks", "10.0.0.0/16\n100.64.0.0/16".into()),
        ("local-ipv4s", eni.primary_ipv4.to_string()),
        ("ipv4-prefix", eni.prefixes.first().unwrap().to_string()),
        ("security-group-ids", group),
        ("security-groups", "default".into()),
        ("owner-id", "123456789012".into()),
        ("network-card", "0".into()),
        ("mac", mac.clone()),
    ];
    for (leaf, value) in table {
        assert_eq!(node.value(&format!("meta-data/network/interfaces/macs/{mac}/{leaf}")), value, "{leaf}");
    }
    for absent in ["ipv6s", "ipv6-prefix", "nothing"] {
        assert_eq!(node.get(&format!("meta-data/network/interfaces/macs/{mac}/{absent}")).0, 404, "{absent}");
    }
    assert_eq!(node.get("meta-data/network/interfaces/macs/02:00:00:00:00:00/").0, 404);
    let listing = node.value("meta-data/");
    assert!(listing.lines().any(|line| line == "network/") && listing.lines().any(|line| line == "mac"), "{listing}");
    let document: serde_json::Value = serde_json::from_str(&node.value("dynamic/instance-identity/document")).unwrap();
    assert_eq!(document["region"], "us-east-1");
    assert_eq!(document["instanceId"], node.id.as_str());
    assert_eq!(node.ask("GET", "/2021-07-15/meta-data/mac", &[("x-aws-ec2-metadata-token", &node.token)]).status, 200);
}

#[test]
fn role_credentials_are_renewed_in_time() {
    let mut node = Node::new(Delays::NONE);
    assert_eq!(node.value("meta-data/iam/security-credentials/"), NODE_ROLE);
    let read = |node: &Node| -> serde_json::Value {
        let path = format!("meta-data/iam/security-credentials/{NODE_ROLE}");
        serde_json::from_str(&node.value(&path)).unwrap()
    };
    let first = read(&node);
    assert_eq!((&first["Code"], &first["Type"]), (&"Success".into(), &"AWS-HMAC".into()));
    node.now = node.now.plus_ms(3_600_000);
    assert_eq!(read(&node), first);
    node.now = node.now.plus_ms(4 * 3_600_000);
    let answer = node.ask("PUT", "/latest/api/token", &[("X-aws-ec2-metadata-token-ttl-seconds", "60")]);
    node.token = answer.body;
    assert_ne!(read(&node)["AccessKeyId"], first["AccessKeyId"]);
}

#[test]
fn metadata_lags_and_what_a_node_is_born_with_does_not() {
    let mut node = Node::new(Delays { imds_lag_ms: 5_000, ..Delays::NONE });
    let macs = |node: &Node| node.value("meta-data/network/interfaces/macs/").lines().count();
    assert_eq!(macs(&node), 1);
    let view = node.ec2.view(node.now);
    let (subnet, primary) = (view.subnets[0].id.clone(), view.enis[0].clone());
    let local = format!("meta-data/network/interfaces/macs/{}/local-ipv4s", primary.mac);
    node.now = node.now.plus_ms(6_000);
    let eni = node.ec2.create_eni(node.now, &subnet, &[], "x", Tags::new()).unwrap();
    let attachment = node.ec2.attach_eni(node.now, &eni, &node.id, DeviceIndex(1), 0).unwrap();
    let given = node.ec2.assign_addresses(node.now, &primary.id, 1).unwrap();
    assert_eq!((macs(&node), node.value(&local).lines().count()), (1, 1));
    node.now = node.now.plus_ms(4_999);
    assert_eq!(macs(&node), 1);
    node.now = node.now.plus_ms(1);
    assert_eq!((macs(&node), node.value(&local).lines().count()), (2, 2));
    node.ec2.detach_eni(node.now, &attachment).unwrap();
    node.ec2.unassign(node.now, &primary.id, &given, &[]).unwrap();
    node.now = node.now.plus_ms(1);
    node.ec2.delete_eni(node.now, &eni).unwrap();
    assert_eq!((macs(&node), node.value(&local).lines().count()), (2, 2), "gone from EC2, still listed");
    node.now = node.now.plus_ms(5_000);
    assert_eq!((macs(&node), node.value(&local).lines().count()), (1, 1));
}

#[test]
fn a_node_without_a_role_and_a_gone_node_have_nothing() {
    let node = Node::new(Delays::NONE);
    let subnet = node.ec2.view(node.now).subnets[0].id.clone();
    let run = RunInstance { role: None, ..RunInstance::new("t3.nano", subnet) };
    let bare = node.ec2.run_instance(node.now, &run).unwrap();
    assert_eq!(node.ec2.imds(node.now, &bare).unwrap().get("meta-data/iam/security-credentials/"), None);
    node.ec2.terminate_instance(node.now, &bare).unwrap();
    assert_eq!(node.ec2.imds(node.now, &bare), None);
    assert_eq!(node.ec2.imds(node.now, &InstanceId::from_str("i-0").unwrap()), None);
}

#[test]
fn injected_faults_meet_reads() {
    let node = Node::new(Delays::NONE);
    let rule = ImdsRule { path: "local-ipv4s".into(), when: When::Next(1), status: 503 };
    node.ec2.set_faults(Faults { calls: Vec::new(), imds: vec![rule] });
    let mac = node.value("meta-data/mac");
    let path = format!("meta-data/network/interfaces/macs/{mac}/local-ipv4s");
    assert_eq!((node.get(&path).0, node.get(&path).0), (503, 200));
}

#[test]
fn an_end_that_was_announced_is_shown_in_its_own_way() {
    let node = Node::new(Delays::NONE);
    for leaf in ["spot/instance-action", "autoscaling/target-lifecycle-state"] {
        assert_eq!(node.get(&format!("meta-data/{leaf}")).0, 404, "{leaf} of a node that stays");
    }
    node.ec2.announce_end(node.now, &node.id, Ending::ScaleIn).unwrap();
    assert_eq!(node.value("meta-data/autoscaling/target-lifecycle-state"), "Terminated");
    node.ec2.announce_end(node.now, &node.id, Ending::Spot).unwrap();
    let notice: serde_json::Value = serde_json::from_str(&node.value("meta-data/spot/instance-action")).unwrap();
    assert_eq!((&notice["action"], &notice["time"]), (&"terminate".into(), &"2023-11-14T22:15:20Z".into()));
    let nobody = InstanceId::from_str("i-0").unwrap();
    let refused = node.ec2.announce_end(node.now, &nobody, Ending::Spot).unwrap_err();
    assert_eq!(refused.code, "InvalidInstanceID.NotFound");
}
