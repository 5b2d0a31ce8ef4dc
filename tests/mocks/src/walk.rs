//! The life of a node's interfaces as the adapter leads it, the same on every server.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use flatwire_cloud::AwsCloud;
use flatwire_core::ids::{AttachmentId, DeviceIndex, EniId, InstanceId, SubnetId};
use flatwire_core::ports::{
    Cloud, CloudError, CloudErrorKind as Kind, CloudReply, CloudRequest, EniKind, EniStatus, EniView, InstanceLimits,
    SubnetView, Want,
};
use ipnet::IpNet;

use crate::loud;
use crate::server::Place;

/// Attach and detach take their time on a faithful server.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
const CLUSTER_TAG: &str = "cluster.k8s.amazonaws.com/name";

/// What a server may be unable to do; a faithful one can do it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    AnyTextInTags,
    ClientToken,
    OnlyNewInAssignReply,
    Prefixes,
    Limits,
    SubnetExhaustion,
    DeviceIndexCheck,
    InUseCheck,
    PrimaryStaysAttached,
    UnassignCheck,
    MalformedIds,
}

/// Something a server lacks: the action as the walk would have called it, and what the server does instead.
#[derive(Debug, Clone, Copy)]
pub struct Lack {
    pub feature: Feature,
    pub action: &'static str,
    pub instead: &'static str,
}

/// What moto does not model, and LocalStack with it, whose EC2 is moto's.
pub const MOTO_LACKS: &[Lack] = &[
    Lack {
        feature: Feature::ClientToken,
        action: "CreateNetworkInterface(same ClientToken)",
        instead: "the token is ignored, a second ENI is made",
    },
    Lack {
        feature: Feature::OnlyNewInAssignReply,
        action: "AssignPrivateIpAddresses(reply holds only what is new)",
        instead: "the reply lists every address of the ENI",
    },
    Lack {
        feature: Feature::Prefixes,
        action: "AssignPrivateIpAddresses(Prefixes), CreateNetworkInterface(Prefixes)",
        instead: "Ipv4PrefixCount is ignored by the server",
    },
    Lack {
        feature: Feature::Limits,
        action: "AssignPrivateIpAddresses and AttachNetworkInterface beyond the type's limits",
        instead: "any number is accepted",
    },
    Lack {
        feature: Feature::SubnetExhaustion,
        action: "AssignPrivateIpAddresses in a full subnet",
        instead: "moto never answers, LocalStack hands out duplicates",
    },
    Lack {
        feature: Feature::DeviceIndexCheck,
        action: "AttachNetworkInterface(taken device index)",
        instead: "the attached ENI is silently replaced",
    },
    Lack {
        feature: Feature::InUseCheck,
        action: "DeleteNetworkInterface(attached ENI)",
        instead: "the attached ENI is deleted",
    },
    Lack {
        feature: Feature::PrimaryStaysAttached,
        action: "DetachNetworkInterface(primary ENI)",
        instead: "the primary ENI is detached",
    },
    Lack {
        feature: Feature::UnassignCheck,
        action: "UnassignPrivateIpAddresses(address of nobody)",
        instead: "success",
    },
    Lack { feature: Feature::MalformedIds, action: "ids that are no ids", instead: "NotFound in place of Malformed" },
];

/// What moto lacks besides once it checks signatures.
pub const MOTO_IAM_LACKS: &[Lack] = &[Lack {
    feature: Feature::AnyTextInTags,
    action: "CreateNetworkInterface(tags with spaces and signs)",
    instead: "the signature is checked against the server's own encoding of the form, which writes them otherwise",
}];

/// A server, the place laid out on it, and the adapter that walks there.
pub struct Walk {
    pub name: &'static str,
    pub cloud: AwsCloud,
    pub place: Place,
    pub lacks: Vec<Lack>,
    odd_tags: bool,
}

impl Walk {
    pub fn new(name: &'static str, cloud: AwsCloud, place: Place, lacks: Vec<Lack>) -> Self {
        let mut walk = Self { name, cloud, place, lacks, odd_tags: true };
        walk.odd_tags = walk.can(Feature::AnyTextInTags);
        walk
    }

    /// The whole way; panics at the first step that goes wrong. Leaves no ENI behind but the instance's own.
    pub async fn run(&self) {
        self.can(Feature::SubnetExhaustion);
        let limits = self.limits().await;
        let primary = self.primary().await;
        let subnet = self.subnet().await;

        let eni = self.create(&subnet).await;
        self.unattached(&eni.id, true).await;
        let attachment = self.attach(&eni).await;
        self.unattached(&eni.id, false).await;
        self.call(CloudRequest::SetDeleteOnTermination { eni: eni.id.clone(), attachment: attachment.clone() })
            .await
            .unwrap();
        let assigned = self.assign_addresses(&eni.id).await;
        self.unassign_addresses(&eni.id, &assigned).await;
        if self.can(Feature::Prefixes) {
            self.prefixes(&eni.id).await;
        }
        self.tag(&eni.id).await;

        self.unknown_objects(&primary).await;
        self.refusals_of_state(&primary, &eni).await;
        if self.can(Feature::Limits) {
            self.beyond_the_limits(&limits, &eni).await;
        }

        self.detach_and_delete(&eni.id, &attachment).await;
        self.nothing_left(&primary).await;
    }

    pub async fn call(&self, request: CloudRequest) -> Result<CloudReply, CloudError> {
        self.cloud.call(request).await
    }

    /// Whether the server can; if not, says so past the test harness.
    fn can(&self, feature: Feature) -> bool {
        match self.lacks.iter().find(|lack| lack.feature == feature) {
            None => true,
            Some(lack) => {
                loud(&format!("SKIPPED {} {}: {}", self.name, lack.action, lack.instead));
                false
            }
        }
    }

    async fn limits(&self) -> InstanceLimits {
        let ask = |name: &str| CloudRequest::DescribeInstanceType { instance_type: name.to_owned() };
        let CloudReply::InstanceType(limits) = self.call(ask("m5.large")).await.unwrap() else { panic!("no limits") };
        assert_eq!((limits.max_enis, limits.ipv4_per_eni, limits.prefixes), (3, 10, true));
        let CloudReply::InstanceType(xen) = self.call(ask("m4.large")).await.unwrap() else { panic!("no limits") };
        assert!(!xen.prefixes, "prefixes are for Nitro only");
        let error = self.call(ask("m5.enormous")).await.unwrap_err();
        assert_eq!((error.kind, error.code.as_str()), (Kind::Invalid, "InvalidInstanceType"), "{error}");
        limits
    }

    async fn primary(&self) -> EniView {
        // A new instance may be pending for a moment, and cannot take an ENI yet.
        let enis = self.node_until(|enis| enis.len() == 1 && enis[0].status == EniStatus::Attached).await;
        let primary = enis.into_iter().next().unwrap();
        assert_eq!((primary.device, primary.card), (DeviceIndex::PRIMARY, 0));
        assert_eq!(primary.subnet, self.place.subnet);
        assert_eq!(primary.security_groups, std::slice::from_ref(&self.place.group));
        assert_eq!(primary.kind, EniKind::Interface);
        assert!(primary.slots.is_empty() && primary.attachment.is_some(), "{primary:?}");
        primary
    }

    async fn subnet(&self) -> SubnetView {
        let zone = self.place.zone.clone();
        let ask = |zone| CloudRequest::DescribeSubnets { vpc: self.place.vpc.clone(), availability_zone: zone };
        let CloudReply::Subnets(subnets) = self.call(ask(zone)).await.unwrap() else { panic!("no subnets") };
        let subnet = subnets.into_iter().find(|subnet| subnet.id == self.place.subnet).unwrap();
        assert_eq!(subnet.tags["kubernetes.io/role/cni"], "1");
        assert!(subnet.free_addresses > 1000, "{subnet:?}");
        let CloudReply::Subnets(elsewhere) = self.call(ask("us-east-1f".to_owned())).await.unwrap() else { panic!() };
        assert!(elsewhere.iter().all(|other| other.id != subnet.id), "the zone filters");
        subnet
    }

    fn creation(&self, want: Want, token: &str) -> CloudRequest {
        CloudRequest::CreateEni {
            subnet: self.place.subnet.clone(),
            security_groups: vec![self.place.group.clone()],
            want,
            ipv6_prefix: false,
            description: format!("aws-K8S-{}", self.place.instance),
            tags: self.tags(),
            client_token: token.to_owned(),
        }
    }

    /// Tags of the created ENIs: the add-on's, and one with every sign that an encoding could stumble over.
    fn tags(&self) -> BTreeMap<String, String> {
        let mut tags = BTreeMap::from([
            (CLUSTER_TAG.to_owned(), "walk".to_owned()),
            ("node.k8s.amazonaws.com/instance_id".to_owned(), self.place.instance.to_string()),
        ]);
        if self.odd_tags {
            tags.insert("a word & more".to_owned(), "<ü> 1+1=2/~*'".to_owned());
        }
        tags
    }

    async fn create(&self, subnet: &SubnetView) -> EniView {
        let created = self.created(self.creation(Want::Addresses(3), "walk-1")).await;
        assert_eq!(created.subnet, self.place.subnet);
        assert_eq!(created.security_groups, std::slice::from_ref(&self.place.group));
        assert_eq!(created.description, format!("aws-K8S-{}", self.place.instance));
        assert_eq!(created.tags, self.tags());
        assert_eq!((created.status, created.attachment.as_ref()), (EniStatus::Available, None));
        assert_eq!(created.slots.len(), 3);
        for slot in created.slots.iter().copied().chain([IpNet::from(std::net::IpAddr::V4(created.primary_ipv4))]) {
            assert!(IpNet::V4(subnet.cidr).contains(&slot), "{slot}");
        }
        let seen = self.eni(&created.id).await;
        assert_eq!((&seen.slots, &seen.tags, seen.mac), (&created.slots, &created.tags, created.mac));

        if self.can(Feature::ClientToken) {
            let again = self.created(self.creation(Want::Addresses(3), "walk-1")).await;
            assert_eq!(again.id, created.id, "the same token gives the same ENI");
            let other = self.call(self.creation(Want::Addresses(2), "walk-1")).await.unwrap_err();
            assert_eq!((other.kind, other.code.as_str()), (Kind::Invalid, "IdempotentParameterMismatch"), "{other}");
        }
        created
    }

    async fn created(&self, request: CloudRequest) -> EniView {
        match self.call(request).await.unwrap() {
            CloudReply::Created(created) => created,
            other => panic!("{other:?}"),
        }
    }

    async fn attach(&self, eni: &EniView) -> AttachmentId {
        self.eni_until(&eni.id, |view| view.status == EniStatus::Available).await;
        let request = CloudRequest::AttachEni {
            eni: eni.id.clone(),
            instance: self.place.instance.clone(),
            device: DeviceIndex(1),
            card: 0,
        };
        let CloudReply::Attached { attachment } = self.call(request).await.unwrap() else { panic!("not attached") };
        let enis =
            self.node_until(|enis| enis.len() == 2 && enis.iter().all(|e| e.status == EniStatus::Attached)).await;
        let attached = enis.into_iter().find(|view| view.id == eni.id).unwrap();
        assert_eq!(attached.attachment.as_ref(), Some(&attachment));
        assert_eq!((attached.device, attached.card), (DeviceIndex(1), 0));
        assert_eq!((attached.slots, attached.tags), (eni.slots.clone(), self.tags()));
        attachment
    }

    /// Whether the ENI is among those of its cluster that belong to no instance, and of no other cluster.
    async fn unattached(&self, eni: &EniId, shown: bool) {
        for (cluster, here) in [("walk", shown), ("elsewhere", false)] {
            let tags = BTreeMap::from([(CLUSTER_TAG.to_owned(), cluster.to_owned())]);
            let request = CloudRequest::DescribeUnattached { vpc: self.place.vpc.clone(), tags };
            self.until("the list of unattached ENIs is right", async || {
                let CloudReply::Enis(enis) = self.call(request.clone()).await.unwrap() else { panic!("not ENIs") };
                enis.iter().any(|view| view.id == *eni) == here
            })
            .await;
        }
    }

    async fn assign_addresses(&self, eni: &EniId) -> BTreeSet<IpNet> {
        let before = self.eni(eni).await;
        let reply = self.assigned(eni, Want::Addresses(4)).await;
        let after = self.eni_until(eni, |view| view.slots.len() == before.slots.len() + 4).await;
        let new: BTreeSet<IpNet> = after.slots.difference(&before.slots).copied().collect();
        assert!(after.slots.is_superset(&before.slots), "an Assign takes nothing away");
        if self.can(Feature::OnlyNewInAssignReply) {
            assert_eq!(reply, new);
        } else {
            assert!(reply.is_superset(&new), "{reply:?} {new:?}");
        }
        new
    }

    async fn assigned(&self, eni: &EniId, want: Want) -> BTreeSet<IpNet> {
        match self.call(CloudRequest::Assign { eni: eni.clone(), want }).await.unwrap() {
            CloudReply::Assigned(slots) => slots,
            other => panic!("{other:?}"),
        }
    }

    async fn unassign_addresses(&self, eni: &EniId, from: &BTreeSet<IpNet>) {
        let before = self.eni(eni).await;
        let gone: BTreeSet<IpNet> = from.iter().take(2).copied().collect();
        let reply = self.call(CloudRequest::Unassign { eni: eni.clone(), slots: gone.clone() }).await.unwrap();
        assert_eq!(reply, CloudReply::Done);
        let after = self.eni_until(eni, |view| view.slots.is_disjoint(&gone)).await;
        assert_eq!(after.slots, before.slots.difference(&gone).copied().collect());

        // And back by their names.
        let request = CloudRequest::AssignNamed { eni: eni.clone(), slots: gone.clone() };
        let CloudReply::Assigned(back) = self.call(request).await.unwrap() else { panic!("not assigned") };
        assert!(back.is_superset(&gone), "{back:?}");
        self.eni_until(eni, |view| view.slots == before.slots).await;
    }

    async fn prefixes(&self, eni: &EniId) {
        let before = self.eni(eni).await;
        let new = self.assigned(eni, Want::Prefixes(2)).await;
        assert_eq!(new.len(), 2);
        assert!(new.iter().all(|net| net.prefix_len() == 28 && net.network() == net.addr()), "{new:?}");
        let after = self.eni_until(eni, |view| view.slots.is_superset(&new)).await;
        assert_eq!(after.slots, before.slots.union(&new).copied().collect());

        // An address and a prefix go back in one request.
        let address = *before.slots.first().unwrap();
        let prefix = *new.first().unwrap();
        let back = BTreeSet::from([address, prefix]);
        self.call(CloudRequest::Unassign { eni: eni.clone(), slots: back.clone() }).await.unwrap();
        let after = self.eni_until(eni, |view| view.slots.is_disjoint(&back)).await;
        assert_eq!(after.slots.len(), before.slots.len());

        let created = self.created(self.creation(Want::Prefixes(1), "walk-prefix")).await;
        assert_eq!(created.slots.iter().map(IpNet::prefix_len).collect::<Vec<_>>(), [28]);
        self.eni_until(&created.id, |view| view.status == EniStatus::Available).await;
        self.call(CloudRequest::DeleteEni { eni: created.id }).await.unwrap();
    }

    async fn tag(&self, eni: &EniId) {
        let more = BTreeMap::from([("eks:eni:owner".to_owned(), "amazon-vpc-cni".to_owned())]);
        self.call(CloudRequest::TagEni { eni: eni.clone(), tags: more.clone() }).await.unwrap();
        let seen = self.eni_until(eni, |view| view.tags.contains_key("eks:eni:owner")).await;
        assert_eq!(seen.tags, self.tags().into_iter().chain(more).collect());
    }

    /// Errors that every server words as EC2 does.
    async fn unknown_objects(&self, primary: &EniView) {
        let eni = || EniId::new("eni-00000000000000001").unwrap();
        let attachment = || AttachmentId::new("eni-attach-00000000000000001").unwrap();
        let no_eni = "InvalidNetworkInterfaceID.NotFound";
        let slots = BTreeSet::from(["10.0.9.9/32".parse().unwrap()]);
        let no_instance = CloudRequest::AttachEni {
            eni: primary.id.clone(),
            instance: InstanceId::new("i-00000000000000001").unwrap(),
            device: DeviceIndex(1),
            card: 0,
        };
        let no_subnet = match self.creation(Want::Addresses(1), "walk-nowhere") {
            CloudRequest::CreateEni { security_groups, want, description, tags, client_token, .. } => {
                let subnet = SubnetId::new("subnet-00000000000000001").unwrap();
                CloudRequest::CreateEni {
                    subnet,
                    security_groups,
                    want,
                    ipv6_prefix: false,
                    description,
                    tags,
                    client_token,
                }
            }
            other => panic!("{other:?}"),
        };
        for (request, code) in [
            (CloudRequest::DescribeEni { eni: eni() }, no_eni),
            (CloudRequest::DeleteEni { eni: eni() }, no_eni),
            (CloudRequest::Assign { eni: eni(), want: Want::Addresses(1) }, no_eni),
            (CloudRequest::Unassign { eni: eni(), slots }, no_eni),
            (CloudRequest::DetachEni { eni: eni(), attachment: attachment() }, "InvalidAttachmentID.NotFound"),
            (no_instance, "InvalidInstanceID.NotFound"),
            (no_subnet, "InvalidSubnetID.NotFound"),
        ] {
            let error = self.call(request).await.unwrap_err();
            assert_eq!((error.kind, error.code.as_str()), (Kind::NotFound, code), "{error}");
            assert!(error.request_id.is_some() && !error.message.is_empty(), "{error:?}");
        }
        let CloudReply::Enis(nobody) = self
            .call(CloudRequest::DescribeNode { instance: InstanceId::new("i-00000000000000001").unwrap() })
            .await
            .unwrap()
        else {
            panic!("not a node")
        };
        assert!(nobody.is_empty(), "a filter that matches nothing is no error");
    }

    /// Requests that the state of things forbids.
    async fn refusals_of_state(&self, primary: &EniView, eni: &EniView) {
        if self.can(Feature::MalformedIds) {
            let error = self.call(CloudRequest::DeleteEni { eni: EniId::new("eni-xyz").unwrap() }).await.unwrap_err();
            assert_eq!((error.kind, error.code.ends_with(".Malformed")), (Kind::Invalid, true), "{error}");
        }
        if self.can(Feature::InUseCheck) {
            let error = self.call(CloudRequest::DeleteEni { eni: eni.id.clone() }).await.unwrap_err();
            assert_eq!(error.kind, Kind::Busy, "{error}");
        }
        if self.can(Feature::DeviceIndexCheck) {
            let spare = self.created(self.creation(Want::Addresses(0), "walk-spare")).await;
            self.eni_until(&spare.id, |view| view.status == EniStatus::Available).await;
            let onto_taken = CloudRequest::AttachEni {
                eni: spare.id.clone(),
                instance: self.place.instance.clone(),
                device: DeviceIndex(1),
                card: 0,
            };
            let error = self.call(onto_taken).await.unwrap_err();
            assert_eq!(error.kind, Kind::DeviceTaken, "{error}");
            let attached_again = CloudRequest::AttachEni {
                eni: eni.id.clone(),
                instance: self.place.instance.clone(),
                device: DeviceIndex(2),
                card: 0,
            };
            let error = self.call(attached_again).await.unwrap_err();
            assert_eq!(error.kind, Kind::Busy, "{error}");
            self.call(CloudRequest::DeleteEni { eni: spare.id }).await.unwrap();
        }
        if self.can(Feature::PrimaryStaysAttached) {
            let attachment = primary.attachment.clone().unwrap();
            let error = self.call(CloudRequest::DetachEni { eni: primary.id.clone(), attachment }).await.unwrap_err();
            assert_eq!((error.kind, error.code.as_str()), (Kind::Invalid, "OperationNotPermitted"), "{error}");
        }
        if self.can(Feature::UnassignCheck) {
            let slots = BTreeSet::from(["10.0.200.200/32".parse().unwrap()]);
            let error = self.call(CloudRequest::Unassign { eni: eni.id.clone(), slots }).await.unwrap_err();
            assert_eq!(error.kind, Kind::NotFound, "{error}");
        }
    }

    /// Fills the ENI to the brim and the instance to its last device.
    async fn beyond_the_limits(&self, limits: &InstanceLimits, eni: &EniView) {
        let held = u32::try_from(self.eni(&eni.id).await.slots.len()).unwrap() + 1;
        let room = limits.ipv4_per_eni - held;
        let error =
            self.call(CloudRequest::Assign { eni: eni.id.clone(), want: Want::Addresses(room + 1) }).await.unwrap_err();
        assert_eq!((error.kind, error.code.as_str()), (Kind::EniFull, "PrivateIpAddressLimitExceeded"), "{error}");
        assert_eq!(self.assigned(&eni.id, Want::Addresses(room)).await.len(), usize::try_from(room).unwrap());

        let mut extra = Vec::new();
        for device in 2..=limits.max_enis {
            let spare = self.created(self.creation(Want::Addresses(0), &format!("walk-extra-{device}"))).await;
            self.eni_until(&spare.id, |view| view.status == EniStatus::Available).await;
            let attached = self
                .call(CloudRequest::AttachEni {
                    eni: spare.id.clone(),
                    instance: self.place.instance.clone(),
                    device: DeviceIndex(device),
                    card: 0,
                })
                .await;
            match attached {
                Ok(CloudReply::Attached { attachment }) => extra.push((spare.id, attachment)),
                Err(error) => {
                    assert_eq!(device, limits.max_enis, "{error}");
                    assert_eq!(
                        (error.kind, error.code.as_str()),
                        (Kind::InstanceFull, "AttachmentLimitExceeded"),
                        "{error}"
                    );
                    self.call(CloudRequest::DeleteEni { eni: spare.id }).await.unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(extra.len(), usize::try_from(limits.max_enis).unwrap() - 2);
        for (eni, attachment) in extra {
            self.eni_until(&eni, |view| view.status == EniStatus::Attached).await;
            self.detach_and_delete(&eni, &attachment).await;
        }
    }

    async fn detach_and_delete(&self, eni: &EniId, attachment: &AttachmentId) {
        let detach = CloudRequest::DetachEni { eni: eni.clone(), attachment: attachment.clone() };
        self.call(detach).await.unwrap();
        self.eni_until(eni, |view| view.status == EniStatus::Available).await;
        self.call(CloudRequest::DeleteEni { eni: eni.clone() }).await.unwrap();
        self.until("the ENI is gone", async || {
            let seen = self.call(CloudRequest::DescribeEni { eni: eni.clone() }).await;
            matches!(seen, Err(error) if error.kind == Kind::NotFound)
        })
        .await;
    }

    async fn nothing_left(&self, primary: &EniView) {
        let enis = self.node_until(|enis| enis.len() == 1).await;
        assert_eq!(enis[0].id, primary.id);
    }

    async fn eni(&self, eni: &EniId) -> EniView {
        match self.call(CloudRequest::DescribeEni { eni: eni.clone() }).await.unwrap() {
            CloudReply::Eni(view) => view,
            other => panic!("{other:?}"),
        }
    }

    async fn node(&self) -> Vec<EniView> {
        match self.call(CloudRequest::DescribeNode { instance: self.place.instance.clone() }).await.unwrap() {
            CloudReply::Enis(enis) => enis,
            other => panic!("{other:?}"),
        }
    }

    async fn eni_until(&self, eni: &EniId, right: impl Fn(&EniView) -> bool) -> EniView {
        self.until("the ENI is as it should be", async || right(&self.eni(eni).await)).await;
        self.eni(eni).await
    }

    async fn node_until(&self, right: impl Fn(&[EniView]) -> bool) -> Vec<EniView> {
        self.until("the node is as it should be", async || right(&self.node().await)).await;
        self.node().await
    }

    async fn until(&self, what: &str, right: impl AsyncFn() -> bool) {
        let started = Instant::now();
        while !right().await {
            assert!(started.elapsed() < SETTLE_LIMIT, "{}: not within {SETTLE_LIMIT:?}: {what}", self.name);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
