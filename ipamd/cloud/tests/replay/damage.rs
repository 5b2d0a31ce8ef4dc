//! Answers of EC2 and leaves of the metadata that were cut, changed or made up: never a panic, and never a part taken for the
//! whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Answer, Canned, Keys};
use flatwire_cloud::{AwsCloud, Config};
use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, SubnetId, VpcId};
use flatwire_core::ports::{Cloud, CloudError, CloudReply, CloudRequest, Want};
use proptest::prelude::*;
use proptest::sample::select;
use tokio::runtime::Runtime;

/// Every answer the adapter reads something out of, and the request it belongs to.
fn answers() -> Vec<(CloudRequest, &'static str)> {
    let eni = || EniId::new("eni-0aaaaaaaaaaaaaaa3").unwrap();
    let instance = || InstanceId::new("i-0123456789abcdef0").unwrap();
    let create = CloudRequest::CreateEni {
        subnet: SubnetId::new("subnet-0b7f8e1a2c3d4e5f6").unwrap(),
        security_groups: Vec::new(),
        want: Want::Addresses(2),
        ipv6_prefix: false,
        description: String::new(),
        tags: BTreeMap::new(),
        client_token: "t".to_owned(),
    };
    let subnets = CloudRequest::DescribeSubnets {
        vpc: VpcId::new("vpc-0123456789abcdef0").unwrap(),
        availability_zone: "eu-west-1a".to_owned(),
    };
    vec![
        (
            CloudRequest::DescribeNode { instance: instance() },
            include_str!("answers/describe_network_interfaces_2.xml"),
        ),
        (CloudRequest::DescribeEni { eni: eni() }, include_str!("answers/describe_network_interfaces_2.xml")),
        (subnets, include_str!("answers/describe_subnets.xml")),
        (
            CloudRequest::DescribeInstanceType { instance_type: "p4d.24xlarge".to_owned() },
            include_str!("answers/describe_instance_types.xml"),
        ),
        (create, include_str!("answers/create_network_interface.xml")),
        (
            CloudRequest::AttachEni { eni: eni(), instance: instance(), device: DeviceIndex(1), card: 0 },
            include_str!("answers/attach_network_interface.xml"),
        ),
        (CloudRequest::Assign { eni: eni(), want: Want::Addresses(2) }, include_str!("answers/assign_addresses.xml")),
        (CloudRequest::Assign { eni: eni(), want: Want::Prefixes(2) }, include_str!("answers/assign_prefixes.xml")),
    ]
}

/// The adapter before an EC2 and a metadata service that say what they were last told to say.
struct Bench {
    runtime: Runtime,
    cloud: AwsCloud,
    ec2: Arc<Mutex<Answer>>,
    leaves: Arc<Mutex<BTreeMap<String, Answer>>>,
    _servers: [Canned; 2],
}

impl Bench {
    fn new() -> Self {
        let ec2 = Arc::new(Mutex::new(Answer::Hangup));
        let leaves: Arc<Mutex<BTreeMap<String, Answer>>> = Arc::default();
        let (say, told) = (ec2.clone(), leaves.clone());
        let api = Canned::start(move |_, _| say.lock().unwrap().clone());
        let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), move |path, _| {
            let told = told.lock().unwrap().get(path).cloned();
            told.or_else(|| crate::imds::leaf(path).map(Answer::ok))
        });
        let config = Config {
            region: Some("eu-west-1".to_owned()),
            ec2_endpoint: Some(api.url()),
            imds_endpoint: Some(imds.url()),
            http_timeout: Duration::from_secs(5),
            ..Config::new("0.1.0")
        };
        let cloud = AwsCloud::connect(config, Arc::new(())).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, cloud, ec2, leaves, _servers: [api, imds] }
    }

    fn call(&self, request: &CloudRequest, answer: Answer) -> Result<CloudReply, CloudError> {
        *self.ec2.lock().unwrap() = answer;
        self.runtime.block_on(self.cloud.call(request.clone()))
    }
}

fn assert_says_what_is_wrong(error: &CloudError, request: &CloudRequest) {
    assert_eq!(error.action, request.action());
    assert!(!error.code.is_empty() && !error.message.is_empty(), "{error:?}");
    assert!(error.message.chars().count() <= 1_024, "{error:?}");
}

/// A proxy that ends an answer early and says that this was all of it. A list that lost its end would look like an ENI that
/// lost its addresses.
#[test]
fn an_answer_that_was_cut_is_never_taken_for_the_whole() {
    let bench = Bench::new();
    for (request, text) in answers() {
        let whole = bench.call(&request, Answer::ok(text)).unwrap();
        let end = text.trim_end().len();
        for cut in 0..end {
            match bench.call(&request, Answer::ok(&text.as_bytes()[..cut])) {
                Ok(reply) => assert_eq!(
                    reply,
                    whole,
                    "{} cut at {cut}: …{:?}",
                    request.action(),
                    &text[cut.saturating_sub(60)..cut]
                ),
                Err(error) => assert_says_what_is_wrong(&error, &request),
            }
        }
    }
}

/// A place in the bytes, how many go there, and what comes instead.
type Blow = (usize, usize, Vec<u8>);

fn blows() -> impl Strategy<Value = Vec<Blow>> {
    let xml =
        ["<item>", "</item>", "<", ">", "&#0;", "&", "<![CDATA[", "<!--", "0", "-1", "99999999999", "\"", "\u{fe}"];
    let with = prop_oneof![
        select(xml.to_vec()).prop_map(|text| text.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..4),
    ];
    prop::collection::vec((any::<usize>(), prop_oneof![Just(0), Just(1), 0usize..60], with), 1..4)
}

fn struck(text: &[u8], blows: &[Blow]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for (at, length, with) in blows {
        let at = at % (bytes.len() + 1);
        let end = (at + length).min(bytes.len());
        bytes.splice(at..end, with.iter().copied());
    }
    bytes
}

/// What an adapter may hand on of an answer, whatever its bytes: no ENI twice, and only slots that EC2 gives.
fn assert_sound(reply: &CloudReply) {
    let enis = match reply {
        CloudReply::Enis(enis) => enis.as_slice(),
        CloudReply::Eni(eni) | CloudReply::Created(eni) => std::slice::from_ref(eni),
        CloudReply::InstanceType(limits) => {
            assert!(limits.max_enis > 0 && limits.ipv4_per_eni > 0, "{limits:?}");
            &[]
        }
        _ => &[],
    };
    assert_eq!(enis.iter().map(|eni| &eni.id).collect::<BTreeSet<_>>().len(), enis.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Each case strikes every answer once.
    #[test]
    fn a_damaged_answer_is_refused_or_read_as_it_stands(blows in blows()) {
        thread_local! { static BENCH: Bench = Bench::new(); }
        BENCH.with(|bench| {
            for (request, text) in answers() {
                match bench.call(&request, Answer::ok(struck(text.as_bytes(), &blows))) {
                    Ok(reply) => assert_sound(&reply),
                    Err(error) => assert_says_what_is_wrong(&error, &request),
                }
            }
        });
    }

    #[test]
    fn any_bytes_under_any_status_are_an_error_that_says_so(
        status in select(vec![200u16, 201, 204, 400, 403, 404, 413, 500, 503]),
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "(<(Response|Errors|Error|Code|Message|RequestID|html)>|\\PC{0,8}|</(Code|Error|Response)>){0,12}".prop_map(String::into_bytes),
        ],
    ) {
        thread_local! { static BENCH: Bench = Bench::new(); }
        BENCH.with(|bench| {
            // Changes are sent once; a read would be tried three times, with pauses.
            for (request, _) in answers().into_iter().filter(|(request, _)| !request.action().starts_with("Describe")) {
                let error = bench.call(&request, Answer::status(status, body.clone())).unwrap_err();
                assert_says_what_is_wrong(&error, &request);
            }
        });
    }
}

/// The leaves that a reading of the metadata takes something out of.
fn leaves() -> Vec<String> {
    let own = ["mac", "local-ipv4", "instance-id", "instance-type", "placement/availability-zone", "placement/region"];
    let of_eni = [
        "interface-id",
        "device-number",
        "local-ipv4s",
        "ipv4-prefix",
        "network-card",
        "network-card-index",
        "subnet-id",
        "subnet-ipv4-cidr-block",
        "security-group-ids",
        "vpc-id",
        "vpc-ipv4-cidr-blocks",
    ];
    let macs = ["02:78:d7:00:8a:1e", "02:78:d7:00:8a:2e"];
    let more = ["network/interfaces/macs/", "spot/instance-action", "autoscaling/target-lifecycle-state"];
    let of_enis = macs.iter().flat_map(|mac| of_eni.map(|leaf| format!("network/interfaces/macs/{mac}/{leaf}")));
    own.into_iter().chain(more).map(str::to_owned).chain(of_enis).map(|leaf| format!("meta-data/{leaf}")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn metadata_with_any_leaf_is_read_or_refused(
        changes in prop::collection::vec((select(leaves()), prop_oneof![
            Just(Answer::status(404, "")),
            select(vec!["10.0.1.17\n10.0.1.17", "10.0.1.0/33", "256.0.0.1", "0", "-1", "4294967296", "eni-", "sg-1\n\nsg-2",
                "10.0.0.0/8 10.0.0.0/9", "<html>", "02:78:d7:00:8a:2e/\n02:78:d7:00:8a:2e/"]).prop_map(Answer::ok),
            prop::collection::vec(any::<u8>(), 0..30).prop_map(Answer::ok),
        ]), 1..3),
    ) {
        thread_local! { static BENCH: Bench = Bench::new(); }
        BENCH.with(|bench| {
            *bench.leaves.lock().unwrap() = changes.into_iter().collect();
            match bench.runtime.block_on(bench.cloud.call(CloudRequest::ReadMetadata)) {
                Ok(CloudReply::Metadata(node)) => {
                    let primary = node.enis.iter().find(|eni| eni.mac == node.primary_mac);
                    assert!(primary.is_some() && !node.primary_ipv4.is_unspecified(), "{node:?}");
                    assert!(node.enis.iter().all(|eni| eni.slots.iter().all(|slot| slot.addr().is_ipv4())), "{node:?}");
                    let macs: BTreeSet<_> = node.enis.iter().map(|eni| eni.mac).collect();
                    assert_eq!(macs.len(), node.enis.len(), "{node:?}");
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => assert_says_what_is_wrong(&error, &CloudRequest::ReadMetadata),
            }
        });
    }
}
