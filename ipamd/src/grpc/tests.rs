//! Requests with any values, through the service and the loop: never a panic, a refusal names the field, and whatever is given
//! is held, found and released under the very same names.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use flatwire_core::netplan::{Look, NodePlan};
use flatwire_core::pool::Pool;
use flatwire_core::ports::{
    Cloud, CloudError, CloudErrorKind, CloudReply, CloudRequest, EniKind, EniStatus, EniView, Kernel, KernelReport,
    Metadata, PodsSeen,
};
use flatwire_core::settings::Settings;
use flatwire_proto::Attachment;
use flatwire_store::journal::Journal;
use ipnet::IpNet;
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::*;
use crate::driver::{Driver, wall_clock};
use crate::node_state::NodeStateFile;
use crate::probe::NoProbe;

/// A node that was born with prefixes, and an EC2 that nobody reaches.
struct BornWithPrefixes;

impl Cloud for BornWithPrefixes {
    async fn call(&self, request: CloudRequest) -> Result<CloudReply, CloudError> {
        if request == CloudRequest::ReadMetadata {
            return Ok(CloudReply::Metadata(metadata_of_the_node()));
        }
        Err(CloudError {
            kind: CloudErrorKind::Transient,
            action: request.action().to_owned(),
            code: "Connection".to_owned(),
            message: "nobody is there".to_owned(),
            request_id: None,
        })
    }
}

fn metadata_of_the_node() -> Metadata {
    let prefixes = (1u8..40).map(|n| format!("10.0.{}.{}/28", n / 16, n % 16 * 16));
    let mac = "02:00:00:00:00:10".parse().unwrap();
    let primary = EniView {
        id: "eni-1".parse().unwrap(),
        mac,
        device: flatwire_core::ids::DeviceIndex::PRIMARY,
        card: 0,
        subnet: "subnet-1".parse().unwrap(),
        subnet_cidr: Some("10.0.0.0/20".parse().unwrap()),
        primary_ipv4: "10.0.0.10".parse().unwrap(),
        slots: prefixes.map(|prefix| prefix.parse::<IpNet>().unwrap()).collect(),
        security_groups: Vec::new(),
        attachment: None,
        status: EniStatus::Attached,
        description: String::new(),
        tags: Default::default(),
        kind: EniKind::Interface,
    };
    Metadata {
        instance: "i-1".parse().unwrap(),
        instance_type: "c5.metal".to_owned(),
        region: "eu-west-1".to_owned(),
        availability_zone: "eu-west-1a".to_owned(),
        vpc: "vpc-1".parse().unwrap(),
        primary_mac: mac,
        primary_ipv4: primary.primary_ipv4,
        vpc_cidrs: vec!["10.0.0.0/16".parse().unwrap()],
        enis: vec![primary],
        terminating: false,
    }
}

/// Everything stands at once, and no pod ever shows.
struct Willing;

impl Kernel for Willing {
    type Error = Infallible;

    async fn apply(&self, plan: &NodePlan, _: &Look) -> Result<KernelReport, Infallible> {
        let enis = plan.enis.iter().map(|eni| eni.id.clone()).chain([plan.primary.id.clone()]);
        Ok(KernelReport { programmed: enis.collect(), ..KernelReport::default() })
    }

    async fn pods(&self) -> Result<PodsSeen, Infallible> {
        Ok(PodsSeen::default())
    }
}

struct Bench {
    runtime: Runtime,
    service: Service,
    _folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (journal, opened) = Journal::open(&folder.path().join("flatwire.journal")).unwrap();
        // A freed address comes back at once, so that the node does not run dry.
        let setting = |name: &str| match name {
            "ENABLE_PREFIX_DELEGATION" => Some("true".to_owned()),
            "IP_COOLDOWN_PERIOD" => Some("0".to_owned()),
            _ => None,
        };
        let metrics = Arc::new(Metrics::new().unwrap());
        let driver = Driver {
            pool: Pool::new(Settings::parse(setting).unwrap(), opened.state, 1, wall_clock()),
            journal,
            cloud: Arc::new(BornWithPrefixes),
            kernel: Arc::new(Willing),
            runtime: runtime.handle().clone(),
            metrics: metrics.clone(),
            checkpoint: folder.path().join("ipam.json"),
            imported: Vec::new(),
            release_queue: folder.path().join("releases"),
            node_state: NodeStateFile::new(folder.path().join("node-state.json")),
            probe: NoProbe,
        };
        let service =
            Service { pool: driver.start().unwrap(), metrics, network_policy_mode: String::new(), teller: None };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !runtime.block_on(service.pool.status()).unwrap().ready {
            assert!(Instant::now() < deadline, "the pool does not get ready");
        }
        Self { runtime, service, _folder: folder }
    }

    fn run<T>(&self, call: impl Future<Output = T>) -> T {
        let in_time = async { tokio::time::timeout(Duration::from_secs(10), call).await };
        self.runtime.block_on(in_time).expect("an answer")
    }
}

/// Names as they should be, and any other text.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z0-9.-]{1,40}",
        1 => Just(String::new()),
        2 => any::<String>(),
        1 => (250usize..260).prop_map(|length| "x".repeat(length)),
        1 => (120usize..130).prop_map(|length| "ü".repeat(length)),
    ]
}

fn version() -> impl Strategy<Value = String> {
    let own = env!("CARGO_PKG_VERSION").to_owned();
    prop_oneof![3 => Just(String::new()), 3 => Just(own), 1 => any::<String>()]
}

fn add() -> impl Strategy<Value = AddNetworkRequest> {
    let pod = (name(), name(), name(), name());
    (pod, (name(), name(), name()), version(), prop::bool::weighted(0.1), prop_oneof![Just(1u32), Just(u32::MAX)])
        .prop_map(
            |(
                (pod_name, pod_namespace, netns, pod_uid),
                (if_name, network_name, container_id),
                version,
                multi,
                patience,
            )| {
                AddNetworkRequest {
                    pod_name,
                    pod_namespace,
                    pod_infra_container_id: container_id.clone(),
                    netns,
                    if_name,
                    network_name,
                    container_id,
                    client_version: version,
                    requires_multi_nic_attachment: multi,
                    pod_uid,
                    patience_ms: patience,
                }
            },
        )
}

/// The first field that cannot be, as the refusal should name it.
fn bad_field(request: &AddNetworkRequest) -> Option<&'static str> {
    let wrong = |value: &str| value.is_empty() || value.len() > MAX_NAME_BYTES;
    let fields = [
        ("network_name", wrong(&request.network_name)),
        ("container_id", wrong(&request.container_id)),
        ("if_name", wrong(&request.if_name)),
        ("pod_namespace", request.pod_namespace.len() > MAX_NAME_BYTES),
        ("pod_name", request.pod_name.len() > MAX_NAME_BYTES),
    ];
    fields.into_iter().find(|(_, wrong)| *wrong).map(|(field, _)| field)
}

fn del_of(add: &AddNetworkRequest) -> DelNetworkRequest {
    DelNetworkRequest {
        pod_name: add.pod_name.clone(),
        pod_namespace: add.pod_namespace.clone(),
        if_name: add.if_name.clone(),
        network_name: add.network_name.clone(),
        container_id: add.container_id.clone(),
        ..Default::default()
    }
}

fn check_of(add: &AddNetworkRequest) -> CheckNetworkRequest {
    CheckNetworkRequest {
        if_name: add.if_name.clone(),
        network_name: add.network_name.clone(),
        container_id: add.container_id.clone(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_pod_is_added_found_and_released_or_refused_by_the_name_of_the_field(request in add()) {
        thread_local! { static BENCH: Bench = Bench::new(); }
        BENCH.with(|bench| {
            let service = &bench.service;
            let add = || bench.run(service.add_network(Request::new(request.clone())));
            let reply = match add() {
                Ok(reply) => reply.into_inner(),
                Err(status) => {
                    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status:?}");
                    assert!(status.message().contains("version"), "{status:?}");
                    assert!(!["", env!("CARGO_PKG_VERSION")].contains(&request.client_version.as_str()));
                    return;
                }
            };
            if !reply.success {
                let failure = reply.failure.unwrap();
                assert!(reply.ip_allocation_metadata.is_empty());
                if request.requires_multi_nic_attachment {
                    assert_eq!(failure.reason(), Reason::Unsupported, "{failure:?}");
                } else {
                    let field = bad_field(&request).unwrap_or_else(|| panic!("{failure:?} to {request:?}"));
                    assert_eq!(failure.reason(), Reason::InvalidRequest, "{failure:?}");
                    assert!(failure.message.starts_with(field) && !failure.retryable, "{field}: {failure:?}");
                }
                return;
            }
            assert_eq!((bad_field(&request), request.requires_multi_nic_attachment), (None, false));
            let given = reply.ip_allocation_metadata;
            assert_eq!(given.len(), 1);
            assert!(given[0].ipv4_addr.parse::<std::net::Ipv4Addr>().is_ok(), "{given:?}");
            assert_eq!(add().unwrap().into_inner().ip_allocation_metadata, given, "who asks twice has one address");
            let check = || bench.run(service.check_network(Request::new(check_of(&request)))).unwrap().into_inner();
            assert_eq!(check().ip_allocation_metadata, given);
            let del = || bench.run(service.del_network(Request::new(del_of(&request))));
            assert_eq!(del().unwrap().into_inner().ip_allocation_metadata, given);
            assert_eq!(check().failure.unwrap().reason(), Reason::UnknownSandbox);
            let unknown = del().unwrap_err();
            assert_eq!((unknown.code(), unknown.message()), (tonic::Code::NotFound, UNKNOWN_POD));
        });
    }

    /// GC names what is stale of its own network and releases nothing.
    #[test]
    fn a_collection_names_what_the_runtime_forgot_and_nothing_else(
        kept in prop::collection::btree_set("[a-c]{1,2}", 0..4),
        gone in prop::collection::btree_set("[d-f]{1,2}", 0..4),
        strangers in prop::collection::vec((any::<String>(), any::<String>()), 0..4),
        network in name(),
    ) {
        thread_local! { static BENCH: Bench = Bench::new(); }
        BENCH.with(|bench| {
            let service = &bench.service;
            let add = |id: &String| AddNetworkRequest {
                if_name: "eth0".to_owned(),
                network_name: "aws-cni".to_owned(),
                container_id: id.clone(),
                patience_ms: 1,
                ..Default::default()
            };
            for id in kept.iter().chain(&gone) {
                let reply = bench.run(service.add_network(Request::new(add(id)))).unwrap().into_inner();
                assert!(reply.success, "{:?}", reply.failure);
            }
            let known = kept.iter().map(|id| (id.clone(), "eth0".to_owned()));
            let valid_attachments: Vec<Attachment> = known
                .chain(strangers)
                .map(|(container_id, if_name)| Attachment { container_id, if_name })
                .collect();
            let gc = |network: &str| {
                let request = GcNetworkRequest {
                    network_name: network.to_owned(),
                    valid_attachments: valid_attachments.clone(),
                };
                let reply = bench.run(service.gc_network(Request::new(request))).unwrap().into_inner();
                reply.stale.into_iter().map(|stale| stale.container_id).collect::<BTreeSet<String>>()
            };
            assert_eq!(gc("aws-cni"), gone);
            assert_eq!(gc("aws-cni"), gone, "nothing was released");
            if network != "aws-cni" {
                assert_eq!(gc(&network), BTreeSet::new(), "another network's runtime knows nothing of these");
            }
            for id in kept.iter().chain(&gone) {
                let reply = bench.run(service.del_network(Request::new(del_of(&add(id))))).unwrap().into_inner();
                assert!(reply.success, "{:?}", reply.failure);
            }
        });
    }
}
