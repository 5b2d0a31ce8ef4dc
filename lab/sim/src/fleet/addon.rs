//! A node under the add-on's policy with its default settings: one loop that sleeps five seconds, asks EC2 for one thing after
//! the other, and waits for each. What it asks, in which order and how it tries again follows aws/amazon-vpc-cni-k8s v1.23;
//! below that lies the AWS SDK's standard retryer.
//!
//! The loop is written as it runs, from top to bottom: as an `async` function over the world's clock.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, Time};
use flatwire_core::limits;
use flatwire_core::ports::{CloudReply, CloudRequest, Metadata, Want};
use flatwire_core::target::PREFIX_SIZE;
use lab_ec2::{ApiError, Caller, Ec2, PageAsked, Params};

use super::{AGAIN_MS, Member, ONE_WAY_MS, caller};
use crate::dice::Dice;
use crate::shape::Shape;

/// Attempts of the SDK's standard retryer, and the longest pause between two.
const SDK_ATTEMPTS: u32 = 3;
const SDK_PAUSE_MS: u64 = 20_000;
/// Half a turn of the loop: it looks at the pool, and half a turn later at the metadata.
const HALF_TURN_MS: u64 = 2_500;
/// Longest pause between two tries of the add-on's own.
const OWN_PAUSE_MS: u64 = 60_000;
const OWN_TRIES: u32 = 12;
/// The kubelet starts a container that exited after this, twice as long each time, and five minutes at most.
const CRASH_LOOP_MS: (u64, u64) = (10_000, 300_000);
/// WARM_ENI_TARGET and WARM_PREFIX_TARGET.
const WARM: u32 = 1;

pub(super) struct AddOnNode<'e> {
    aws: Rc<Aws<'e>>,
    store: Rc<RefCell<Store>>,
    task: Pin<Box<dyn Future<Output = ()> + 'e>>,
    /// When each pod tries again.
    tries: BTreeMap<u32, Time>,
    served: Vec<Time>,
    dice: Dice,
}

/// What the daemon holds; pods are answered from it at once, with an address or without.
#[derive(Debug, Default)]
struct Store {
    answering: bool,
    /// By ENI: addresses, as the data store knows them.
    enis: BTreeMap<EniId, u32>,
    assigned: u32,
}

impl Store {
    fn total(&self) -> u32 {
        self.enis.values().sum()
    }
}

impl<'e> AddOnNode<'e> {
    pub(super) fn new(ec2: &'e Ec2, instance: InstanceId, shape: &Shape, mut dice: Dice, now: Time) -> Box<Self> {
        let tries = (0..shape.pods).map(|pod| (pod, now.plus_ms(dice.between(1, 130)))).collect();
        let aws = Rc::new(Aws {
            ec2,
            caller: caller(),
            instance,
            dice: RefCell::new(dice.split()),
            clock: Cell::new(now),
            wake: Cell::new(now),
        });
        let store = Rc::new(RefCell::new(Store::default()));
        let kind = limits::lookup(shape.instance_type).expect("invariant: a shape is of a known type");
        let daemon = Daemon {
            aws: Rc::clone(&aws),
            store: Rc::clone(&store),
            slots: kind.ipv4_per_eni - 1,
            max_enis: kind.max_enis,
            prefixes: shape.prefixes,
            max_pods: if shape.prefixes { 110 } else { kind.max_enis * (kind.ipv4_per_eni - 1) + 2 },
        };
        Box::new(Self { aws, store, task: Box::pin(daemon.run()), tries, served: Vec::new(), dice })
    }

    /// The plugin asks: an address that is free is given, and else the kubelet tries again later.
    fn try_pods(&mut self, now: Time) {
        let due: Vec<u32> = self.tries.iter().filter(|(_, at)| **at <= now).map(|(pod, _)| *pod).collect();
        for pod in due {
            let mut store = self.store.borrow_mut();
            if store.answering && store.assigned < store.total() {
                store.assigned += 1;
                self.served.push(now);
                self.tries.remove(&pod);
            } else {
                self.tries.insert(pod, now.plus_ms(self.dice.between(AGAIN_MS, AGAIN_MS * 3 / 2)));
            }
        }
    }
}

impl Member for AddOnNode<'_> {
    fn next(&self) -> Option<Time> {
        self.tries.values().copied().chain([self.aws.wake.get()]).min()
    }

    fn advance(&mut self, now: Time) {
        self.aws.clock.set(now);
        if self.aws.wake.get() <= now {
            // Each pause says itself when it ends; the loop has no end.
            let _: Poll<()> = self.task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        self.try_pods(now);
    }

    fn served(&self) -> &[Time] {
        &self.served
    }
}

/// The way to EC2, and the clock.
struct Aws<'e> {
    ec2: &'e Ec2,
    caller: Caller,
    instance: InstanceId,
    dice: RefCell<Dice>,
    clock: Cell<Time>,
    /// When the task goes on.
    wake: Cell<Time>,
}

type Reply = Result<CloudReply, ApiError>;

impl Aws<'_> {
    async fn sleep(&self, ms: u64) {
        let until = self.clock.get().plus_ms(ms);
        self.wake.set(until);
        poll_fn(|_| if self.clock.get() >= until { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    async fn travel(&self) {
        let ms = self.dice.borrow_mut().between(1, ONE_WAY_MS);
        self.sleep(ms).await;
    }

    /// As the SDK calls: a refusal for going too fast is tried again after a pause by chance, longer each time.
    async fn sdk(&self, once: impl Fn(Time) -> Reply) -> Reply {
        let mut attempt = 0;
        loop {
            self.travel().await;
            let reply = once(self.clock.get());
            self.travel().await;
            attempt += 1;
            match reply {
                Err(error) if error.status == 503 && attempt < SDK_ATTEMPTS => {
                    let most = (1_000 << (attempt - 1)).min(SDK_PAUSE_MS);
                    let pause = self.dice.borrow_mut().between(0, most);
                    self.sleep(pause).await;
                }
                reply => return reply,
            }
        }
    }

    async fn call(&self, request: CloudRequest) -> Reply {
        self.sdk(|now| self.ec2.call(now, &self.caller, &request, &PageAsked::default()).result).await
    }

    /// The core never asks this, so it has no request in its port: by the Query API.
    async fn describe_instance(&self) -> Reply {
        let id = self.instance.to_string();
        let pairs = [("Action", "DescribeInstances"), ("Version", "2016-11-15"), ("InstanceId.1", id.as_str())];
        let params = Params::new(pairs);
        let once = |now| {
            let response = self.ec2.query(now, &self.caller, &params);
            let refused = ApiError { status: response.status, ..ApiError::new("Refused", response.body) };
            if response.status == 200 { Ok(CloudReply::Done) } else { Err(refused) }
        };
        self.sdk(once).await
    }

    /// The add-on's own tries around the SDK's: twice the pause each time, and up to 15 % by chance.
    async fn tries(&self, first_ms: u64, tries: u32, request: CloudRequest) -> Reply {
        let mut pause = first_ms;
        let mut tried = 0;
        loop {
            let reply = self.call(request.clone()).await;
            tried += 1;
            if reply.is_ok() || tried >= tries {
                return reply;
            }
            let chance = self.dice.borrow_mut().between(0, pause * 15 / 100);
            self.sleep(pause + chance).await;
            pause = (pause * 2).min(OWN_PAUSE_MS);
        }
    }

    fn imds(&self) -> Option<Metadata> {
        self.ec2.metadata(self.clock.get(), &self.instance).ok()
    }
}

/// The daemon's one goroutine.
struct Daemon<'e> {
    aws: Rc<Aws<'e>>,
    store: Rc<RefCell<Store>>,
    /// Of an ENI, beside its own address.
    slots: u32,
    max_enis: u32,
    prefixes: bool,
    max_pods: u32,
}

impl Daemon<'_> {
    async fn run(self) {
        let (mut pause, longest) = CRASH_LOOP_MS;
        while !self.init().await {
            self.aws.sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
        self.store.borrow_mut().answering = true;
        loop {
            self.aws.sleep(HALF_TURN_MS).await;
            if self.is_low() {
                self.increase().await;
            }
            self.aws.sleep(HALF_TURN_MS).await;
            self.reconcile();
        }
    }

    /// False where the process exits.
    async fn init(&self) -> bool {
        let request = CloudRequest::DescribeNode { instance: self.aws.instance.clone() };
        if self.aws.tries(10, OWN_TRIES, request).await.is_err() {
            return false;
        }
        self.reconcile();
        let Some(node) = self.aws.imds() else { return false };
        for eni in &node.enis {
            let tags = [("node.k8s.amazonaws.com/instance_id".to_owned(), self.aws.instance.to_string())].into();
            let _ = self.aws.tries(500, 5, CloudRequest::TagEni { eni: eni.id.clone(), tags }).await;
            let _ = self.aws.call(self.subnets(&node)).await;
        }
        // The first look at the security groups counts as a change.
        for eni in &node.enis {
            let security_groups = eni.security_groups.clone();
            let _ = self.aws.call(CloudRequest::SetSecurityGroups { eni: eni.id.clone(), security_groups }).await;
        }
        !self.is_low() || self.increase().await
    }

    /// WARM_ENI_TARGET, or WARM_PREFIX_TARGET with prefixes.
    fn is_low(&self) -> bool {
        let store = self.store.borrow();
        let unit = if self.prefixes { PREFIX_SIZE } else { self.slots };
        store.total() < self.max_pods && store.total() - store.assigned < unit * WARM
    }

    /// More on an ENI with room, else one more ENI. False for an error.
    async fn increase(&self) -> bool {
        let size = if self.prefixes { PREFIX_SIZE } else { 1 };
        let room = |(id, addresses): (&EniId, &u32)| {
            let free = self.slots.saturating_sub(addresses / size);
            (free > 0).then(|| (id.clone(), free))
        };
        let with_room = self.store.borrow().enis.iter().find_map(room);
        let Some((eni, free)) = with_room else { return self.allocate_eni().await };
        let request = |want| CloudRequest::Assign { eni: eni.clone(), want };
        let want = if self.prefixes { Want::Prefixes(WARM) } else { Want::Addresses(free) };
        let one = if self.prefixes { Want::Prefixes(1) } else { Want::Addresses(1) };
        let done = self.aws.call(request(want)).await.is_ok() || self.aws.call(request(one)).await.is_ok();
        self.reconcile();
        done
    }

    async fn allocate_eni(&self) -> bool {
        let Some(node) = self.aws.imds() else { return false };
        let primary = node.enis.iter().find(|eni| eni.device == DeviceIndex::PRIMARY);
        let (Some(primary), true) = (primary, u32::try_from(node.enis.len()).is_ok_and(|n| n < self.max_enis)) else {
            return false;
        };
        let _ = self.aws.call(self.subnets(&node)).await;
        let create = CloudRequest::CreateEni {
            subnet: primary.subnet.clone(),
            security_groups: primary.security_groups.clone(),
            want: if self.prefixes { Want::Prefixes(WARM) } else { Want::Addresses(self.slots) },
            ipv6_prefix: false,
            description: format!("aws-K8S-{}", self.aws.instance),
            tags: BTreeMap::new(),
            // The add-on sends none: every call makes an ENI of its own.
            client_token: format!("{}-{}", self.aws.instance, self.aws.dice.borrow_mut().number()),
        };
        let Ok(CloudReply::Created(made)) = self.aws.call(create).await else { return false };
        let device = DeviceIndex(u32::try_from(node.enis.len()).unwrap_or(0));
        let attach =
            CloudRequest::AttachEni { eni: made.id.clone(), instance: self.aws.instance.clone(), device, card: 0 };
        let attached = match self.aws.describe_instance().await {
            Ok(_) => self.aws.call(attach).await,
            Err(error) => Err(error),
        };
        let Ok(CloudReply::Attached { attachment }) = attached else {
            let _ = self.aws.tries(500, OWN_TRIES, CloudRequest::DeleteEni { eni: made.id }).await;
            return false;
        };
        let settle = CloudRequest::SetDeleteOnTermination { eni: made.id.clone(), attachment: attachment.clone() };
        if self.aws.call(settle).await.is_err() {
            let _ = self.aws.call(CloudRequest::DescribeEni { eni: made.id.clone() }).await;
            let detach = CloudRequest::DetachEni { eni: made.id.clone(), attachment };
            let detached = self.aws.tries(200, OWN_TRIES, detach).await.is_ok();
            self.aws.sleep(2_000).await;
            let delete = CloudRequest::DeleteEni { eni: made.id };
            if detached && self.aws.tries(500, OWN_TRIES, delete).await.is_ok() {
                // The error is lost here: it waits for an ENI without a name to appear.
                self.appears(None).await;
            }
            return false;
        }
        let there = self.appears(Some(&made.id)).await;
        let _ = self.aws.call(self.subnets(&node)).await;
        self.reconcile();
        there
    }

    /// Waits for the ENI in the metadata: a tenth of a second, then twice as long each time, twelve looks.
    async fn appears(&self, eni: Option<&EniId>) -> bool {
        let mut pause = 100;
        for _ in 0..OWN_TRIES {
            let there = |node: Metadata| node.enis.iter().any(|seen| Some(&seen.id) == eni);
            if self.aws.imds().is_some_and(there) {
                return true;
            }
            self.aws.sleep(pause).await;
            pause = (pause * 2).min(OWN_PAUSE_MS);
        }
        false
    }

    fn subnets(&self, node: &Metadata) -> CloudRequest {
        CloudRequest::DescribeSubnets { vpc: node.vpc.clone(), availability_zone: node.availability_zone.clone() }
    }

    /// What the metadata shows is what there is.
    fn reconcile(&self) {
        let Some(node) = self.aws.imds() else { return };
        let size = |eni: &flatwire_core::ports::EniView| eni.slots.iter().map(flatwire_core::pick::size).sum();
        self.store.borrow_mut().enis = node.enis.iter().map(|eni| (eni.id.clone(), size(eni))).collect();
    }
}
