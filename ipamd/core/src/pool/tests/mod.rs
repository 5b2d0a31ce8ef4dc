//! The pool in a small world: an EC2 that answers at once, a kernel that does as told, a ledger that remembers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

mod families;
mod giving_back;
mod growing;
mod healing;
mod repair;

use super::*;
use crate::ids::{InstanceId, SecurityGroupId, SubnetId, VpcId};
use crate::ports::{CloudErrorKind, EniKind, EniStatus, Metadata, SubnetView};

/// What an answer to a call should be instead of the truth.
type Fault = (&'static str, CloudErrorKind, &'static str);

struct World {
    pool: Pool,
    now: Time,
    instance_type: &'static str,
    enis: BTreeMap<EniId, EniView>,
    next_host: u32,
    /// Taken in order by the next calls of that action.
    faults: Vec<Fault>,
    /// The call is carried out and its answer lost.
    lose: Vec<&'static str>,
    links_hidden: bool,
    pod_routes: BTreeSet<IpAddr>,
    /// Sandboxes whose namespace is gone.
    unplugged: BTreeSet<SandboxId>,
    /// Links of pods that are down.
    down: BTreeMap<String, MacAddress>,
    subnets: Vec<SubnetView>,
    calls: Vec<String>,
    journal: Vec<Record>,
    journal_broken: bool,
    answers: BTreeMap<RequestId, Answer>,
    notes: Vec<Note>,
    next_request: u64,
}

fn settings(vars: &[(&str, &str)]) -> Settings {
    Settings::parse(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())).unwrap()
}

fn subnet(id: &str, free_addresses: u32, tags: &[(&str, &str)]) -> SubnetView {
    SubnetView {
        id: SubnetId::new(id).unwrap(),
        cidr: "10.0.0.0/16".parse().unwrap(),
        free_addresses,
        tags: tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    }
}

fn sandbox(n: u32) -> SandboxId {
    SandboxId { network: "aws-cni".into(), container_id: format!("c{n}"), if_name: "eth0".into() }
}

impl World {
    fn new(instance_type: &'static str, vars: &[(&str, &str)], slots: &[&str]) -> Self {
        let now = Time(1_000_000);
        let primary = EniView {
            id: EniId::new("eni-primary").unwrap(),
            mac: "02:00:00:00:00:00".parse().unwrap(),
            device: DeviceIndex::PRIMARY,
            card: 0,
            subnet: SubnetId::new("subnet-a").unwrap(),
            subnet_cidr: Some("10.0.0.0/16".parse().unwrap()),
            primary_ipv4: Ipv4Addr::new(10, 0, 0, 10),
            slots: slots.iter().map(|s| s.parse().unwrap()).collect(),
            security_groups: vec![SecurityGroupId::new("sg-a").unwrap()],
            attachment: Some("eni-attach-0".parse().unwrap()),
            status: EniStatus::Attached,
            description: String::new(),
            tags: BTreeMap::new(),
            kind: EniKind::Interface,
        };
        Self {
            pool: Pool::new(settings(vars), LedgerState::default(), 7, now),
            now,
            instance_type,
            enis: [(primary.id.clone(), primary)].into(),
            next_host: 0x0a00_1000,
            faults: Vec::new(),
            lose: Vec::new(),
            links_hidden: false,
            pod_routes: BTreeSet::new(),
            unplugged: BTreeSet::new(),
            down: BTreeMap::new(),
            subnets: vec![subnet("subnet-a", 60_000, &[])],
            calls: Vec::new(),
            journal: Vec::new(),
            journal_broken: false,
            answers: BTreeMap::new(),
            notes: Vec::new(),
            next_request: 1,
        }
    }

    fn step(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut broken = None;
            for command in self.pool.step(event, self.now) {
                match command {
                    Command::Persist(records) if self.journal_broken => broken = Some(records),
                    _ if broken.is_some() => {}
                    Command::Persist(records) => self.journal.extend(records),
                    Command::Reply { request, answer } => {
                        assert!(self.answers.insert(request, answer).is_none(), "answered twice");
                    }
                    Command::Cloud { op, request } => {
                        self.now = self.now.plus_ms(10);
                        let result = self.cloud(request);
                        events.push_back(Event::Cloud { op, result });
                    }
                    Command::Kernel { op, plan, .. } => {
                        let result = Ok((self.kernel(&plan), self.pods_seen()));
                        events.push_back(Event::Kernel { op, result });
                    }
                    Command::Note(note) => self.notes.push(note),
                }
            }
            if let Some(records) = broken {
                self.pool.persist_failed(records);
            }
            assert!(self.calls.len() < 500, "a hot loop: {:?}", &self.calls[480..]);
        }
    }

    /// Lets time run to the pool's own deadlines until `until`.
    fn run(&mut self, ms: u64) {
        let until = self.now.plus_ms(ms);
        while let Some((at, _)) = self.pool.poll_deadline().filter(|(at, _)| *at <= until) {
            self.now = self.now.max(at);
            self.step(Event::Tick);
        }
        self.now = self.now.max(until);
        self.step(Event::Tick);
    }

    fn pods_seen(&self) -> PodsSeen {
        let wired = self
            .pool
            .ledger()
            .pods
            .values()
            .filter(|a| !self.unplugged.contains(&a.sandbox))
            .flat_map(Allocation::addresses);
        PodsSeen {
            routes: self.pod_routes.iter().copied().chain(wired).collect(),
            down: self.down.clone(),
            ..PodsSeen::default()
        }
    }

    fn kernel(&self, plan: &NodePlan) -> KernelReport {
        let mut ids: BTreeSet<EniId> = plan.enis.iter().map(|eni| eni.id.clone()).collect();
        let primary = plan.primary.id.clone();
        if self.links_hidden {
            return KernelReport { missing_links: ids, programmed: [primary].into(), ..KernelReport::default() };
        }
        ids.insert(primary);
        KernelReport { programmed: ids, ..KernelReport::default() }
    }

    fn cloud(&mut self, request: CloudRequest) -> Result<CloudReply, CloudError> {
        let action = request.action();
        self.calls.push(action.to_owned());
        let error = |kind, code: &str| CloudError {
            kind,
            action: action.to_owned(),
            code: code.to_owned(),
            message: "as told".to_owned(),
            request_id: None,
        };
        if let Some(at) = self.faults.iter().position(|(a, _, _)| *a == action) {
            let (_, kind, code) = self.faults.remove(at);
            return Err(error(kind, code));
        }
        let reply = self.carry_out(request);
        if let Some(at) = self.lose.iter().position(|a| *a == action) {
            self.lose.remove(at);
            return Err(error(CloudErrorKind::Transient, "Timeout"));
        }
        Ok(reply)
    }

    fn carry_out(&mut self, request: CloudRequest) -> CloudReply {
        match request {
            CloudRequest::ReadMetadata => CloudReply::Metadata(self.metadata()),
            CloudRequest::DescribeNode { .. } => {
                CloudReply::Enis(self.enis.values().filter(|e| e.attachment.is_some()).cloned().collect())
            }
            CloudRequest::DescribeSubnets { .. } => CloudReply::Subnets(self.subnets.clone()),
            CloudRequest::DescribeUnattached { .. } => {
                CloudReply::Enis(self.enis.values().filter(|e| e.attachment.is_none()).cloned().collect())
            }
            CloudRequest::DescribeEni { eni } => CloudReply::Eni(self.enis[&eni].clone()),
            CloudRequest::CreateEni { subnet, want, ipv6_prefix, client_token, tags, description, security_groups } => {
                let id = EniId::new(format!("eni-{}", client_token.replace("fw-", ""))).unwrap();
                if !self.enis.contains_key(&id) {
                    let n = u8::try_from(self.enis.len()).unwrap();
                    let view = EniView {
                        id: id.clone(),
                        mac: crate::ids::MacAddress([2, 0, 0, 0, 0, n]),
                        device: DeviceIndex(0),
                        card: 0,
                        subnet,
                        subnet_cidr: None,
                        primary_ipv4: Ipv4Addr::new(10, 0, 1, n),
                        slots: BTreeSet::new(),
                        security_groups,
                        attachment: None,
                        status: EniStatus::Available,
                        description,
                        tags,
                        kind: EniKind::Interface,
                    };
                    self.enis.insert(id.clone(), view);
                    self.give(&id, want);
                    if ipv6_prefix {
                        self.give_ipv6(&id, None);
                    }
                }
                CloudReply::Created(self.enis[&id].clone())
            }
            CloudRequest::AttachEni { eni, device, .. } => {
                let view = self.enis.get_mut(&eni).unwrap();
                let attachment: crate::ids::AttachmentId = format!("eni-attach-{device}").parse().unwrap();
                (view.device, view.status) = (device, EniStatus::Attached);
                view.attachment = Some(attachment.clone());
                CloudReply::Attached { attachment }
            }
            CloudRequest::Assign { eni, want } => CloudReply::Assigned(self.give(&eni, want)),
            CloudRequest::AssignIpv6Prefix { eni, prefix } => CloudReply::Assigned(self.give_ipv6(&eni, prefix)),
            CloudRequest::DeleteEni { eni } => {
                self.enis.remove(&eni);
                CloudReply::Done
            }
            CloudRequest::SetDeleteOnTermination { .. } => CloudReply::Done,
            CloudRequest::SetSecurityGroups { eni, security_groups } => {
                self.enis.get_mut(&eni).unwrap().security_groups = security_groups;
                CloudReply::Done
            }
            CloudRequest::TagEni { eni, tags } => {
                self.enis.get_mut(&eni).unwrap().tags.extend(tags);
                CloudReply::Done
            }
            CloudRequest::AssignNamed { eni, slots } => {
                self.enis.get_mut(&eni).unwrap().slots.extend(slots.iter().copied());
                CloudReply::Assigned(slots)
            }
            CloudRequest::Unassign { eni, slots } => {
                self.enis.get_mut(&eni).unwrap().slots.retain(|slot| !slots.contains(slot));
                CloudReply::Done
            }
            CloudRequest::DetachEni { eni, .. } => {
                let view = self.enis.get_mut(&eni).unwrap();
                (view.status, view.attachment) = (EniStatus::Available, None);
                CloudReply::Done
            }
            other => panic!("not expected: {other:?}"),
        }
    }

    fn give(&mut self, eni: &EniId, want: Want) -> BTreeSet<IpNet> {
        let mut new = BTreeSet::new();
        for _ in 0..want.slots() {
            let (bits, len) = match want {
                Want::Addresses(_) => (1, 32),
                Want::Prefixes(_) => (16, 28),
            };
            self.next_host = self.next_host.next_multiple_of(bits);
            new.insert(IpNet::V4(Ipv4Net::new(Ipv4Addr::from(self.next_host), len).unwrap()));
            self.next_host += bits;
        }
        self.enis.get_mut(eni).unwrap().slots.extend(new.iter().copied());
        new
    }

    fn give_ipv6(&mut self, eni: &EniId, prefix: Option<Ipv6Net>) -> BTreeSet<IpNet> {
        let number = u16::try_from(self.next_host & 0xffff).unwrap();
        self.next_host += 1;
        let any = || Ipv6Net::new(Ipv6Addr::new(0x2600, 0x1f13, 0, 1, number, 0, 0, 0), 80).unwrap();
        let slot = IpNet::V6(prefix.unwrap_or_else(any));
        self.enis.get_mut(eni).unwrap().slots.insert(slot);
        BTreeSet::from([slot])
    }

    fn metadata(&self) -> Metadata {
        let primary = &self.enis[&EniId::new("eni-primary").unwrap()];
        Metadata {
            instance: InstanceId::new("i-1").unwrap(),
            instance_type: self.instance_type.to_owned(),
            region: "us-east-1".into(),
            availability_zone: "us-east-1a".into(),
            vpc: VpcId::new("vpc-1").unwrap(),
            primary_mac: primary.mac,
            primary_ipv4: primary.primary_ipv4,
            vpc_cidrs: vec!["10.0.0.0/16".parse().unwrap()],
            enis: self.enis.values().filter(|e| e.attachment.is_some()).cloned().collect(),
            terminating: false,
        }
    }

    fn request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    fn add(&mut self, n: u32) -> RequestId {
        let request = self.request();
        self.step(Event::Add { request, sandbox: sandbox(n), pod: PodName::default(), patience_ms: None });
        request
    }

    fn added(&self, request: RequestId) -> Allocation {
        match self.answers.get(&request) {
            Some(Answer::Added(allocation)) => allocation.clone(),
            other => panic!("no address: {other:?}, waiting {:?}", self.pool.why_no_address(self.now, self.now)),
        }
    }

    fn failure(&self, request: RequestId) -> Failure {
        match self.answers.get(&request) {
            Some(Answer::Failed(failure)) => failure.clone(),
            other => panic!("did not fail: {other:?}"),
        }
    }

    fn del(&mut self, n: u32) -> RequestId {
        let request = self.request();
        self.step(Event::Del { request, sandbox: sandbox(n) });
        request
    }

    fn ec2_calls(&self) -> usize {
        self.calls.iter().filter(|call| *call != "ImdsRead").count()
    }

    /// The daemon dies and starts again over its journal.
    fn restart(&mut self) {
        let settings = self.pool.settings().clone();
        self.pool = Pool::new(settings, LedgerState::replay(&self.journal), 8, self.now);
        assert_eq!(self.pool.ledger(), &LedgerState::replay(&self.journal));
        self.step(Event::Tick);
    }

    fn distinct(&self) {
        let addresses: BTreeSet<_> = self.pool.ledger().pods.values().map(|a| a.address).collect();
        assert_eq!(addresses.len(), self.pool.ledger().pods.len(), "an address given twice");
    }
}
