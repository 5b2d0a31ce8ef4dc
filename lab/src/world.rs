//! The world: process 1 of the lab. It holds EC2, the fabric, the machines and their pods, and serves the commands.
//!
//! It ends when the process that started it ends, and everything inside ends with it.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flatwire_core::ids::{InstanceId, Time, VpcId};
use lab_ec2::{InstanceState, View};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::cloud::Cloud;
use crate::ctl::{Called, DaemonAction, Entrance, NodeSpec, PodInfo, Probe, Request, Spec};
use crate::error::{Doing, Error, Result, chain};
use crate::fabric::{Fabric, Guest, IMDS, INTERNET_SERVER, INTERNET_SERVER6, plan};
use crate::node::{Node, Programs};
use crate::ns::{Place, bind, has_ipv6, make_private};
use crate::probe::{self, Reflector};
use crate::runtime;
use crate::serve::{serve_api, serve_control};

/// How long a launched machine may take to be there, and the cloud to come to rest.
const SETTLE_SECS: u64 = 60;
/// What failed in the fabric is tried again after this long.
const RETRY: Duration = Duration::from_millis(300);
/// Nothing that is due later than this keeps the cloud from being called settled.
const HORIZON_MS: u64 = 120_000;
/// Name of the machine in the peered VPC.
pub const PEER: &str = "peer";

/// True where root is somebody else outside.
pub fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.split_whitespace().nth(2) != Some("4294967295"))
}

/// The hidden command. Standard input is the API's listener, standard output the control socket's, standard error a
/// log.
pub fn main(spec: &str) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).doing(|| "tie the world to its parent".into())?;
    let spec: Spec = serde_json::from_str(spec).doing(|| "the lab's own description".into())?;
    let api = TcpListener::from(
        std::io::stdin().as_fd().try_clone_to_owned().doing(|| "take over the API's listener".into())?,
    );
    let control = UnixListener::from(
        std::io::stdout().as_fd().try_clone_to_owned().doing(|| "take over the control listener".into())?,
    );
    for listener in [api.set_nonblocking(true), control.set_nonblocking(true)] {
        listener.doing(|| "prepare the listeners".into())?;
    }
    withdraw(spec.keep.as_deref())?;
    // A world with a part missing would only puzzle people.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(101);
    }));
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .doing(|| "start the runtime".into())?;
    runtime.block_on(run(spec, api, control))
}

/// Leaves the machine's network and mounts for good: from here on nothing done can touch them.
fn withdraw(keep: Option<&Path>) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).doing(|| "create the world's namespaces".into())?;
    make_private()?;
    let hidden = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), hidden, None::<&str>).doing(|| "mount /proc".into())?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755"))
        .doing(|| "mount an empty /run".into())?;
    for dir in ["/run/netns", "/run/nodes"] {
        fs::create_dir(dir).doing(|| format!("create {dir}"))?;
    }
    if let Some(keep) = keep {
        bind(keep, Path::new("/run/nodes"))?;
    }
    Ok(())
}

/// How far the fabric has followed EC2.
#[derive(Debug, Clone, Default)]
pub(crate) struct Followed {
    version: u64,
    pub(crate) took_ms: f64,
    trouble: Vec<String>,
}

pub(crate) struct World {
    pub(crate) spec: Spec,
    pub(crate) endpoint: SocketAddr,
    pub(crate) cloud: Cloud,
    pub(crate) programs: Option<Programs>,
    pub(crate) fabric: tokio::sync::Mutex<Fabric>,
    pub(crate) nodes: Mutex<BTreeMap<InstanceId, Arc<Node>>>,
    /// What is known of machines that are being launched, by name.
    launching: Mutex<BTreeMap<String, NodeSpec>>,
    changed: Arc<Notify>,
    pub(crate) followed: watch::Sender<Followed>,
    internet: Place,
    _internet_server: Reflector,
}

async fn run(spec: Spec, api: TcpListener, control: UnixListener) -> Result<()> {
    let endpoint = api.local_addr().doing(|| "read the API's address".into())?;
    let programs = match (spec.daemons, Programs::find(spec.bin_dir.as_deref())) {
        (true, found) => Some(found?),
        (false, found) => found.ok(),
    };
    if spec.ipv6 && !has_ipv6() {
        return Err(Error::refused("this kernel was booted without IPv6 (ipv6.disable=1); leave --ipv6 out"));
    }
    let cloud = Cloud::build(&spec)?;
    let fabric = Fabric::new().await?;
    let internet = fabric.internet().clone();
    let server = Reflector::start(&internet)?;
    let world = Arc::new(World {
        endpoint,
        cloud,
        programs,
        fabric: tokio::sync::Mutex::new(fabric),
        nodes: Mutex::default(),
        launching: Mutex::default(),
        changed: Arc::new(Notify::new()),
        followed: watch::Sender::default(),
        internet,
        _internet_server: server,
        spec,
    });
    let changed = Arc::clone(&world.changed);
    world.cloud.on_change(move || changed.notify_one());
    tokio::spawn(Arc::clone(&world).follow_forever());

    let outside = tokio::net::TcpListener::from_std(api).doing(|| "listen for API calls".into())?;
    tokio::spawn(serve_api(Arc::clone(&world), outside));

    // The machines come up while the control socket is served; whoever asks waits until they are there.
    let (ready, is_ready) = watch::channel(None);
    let builder = Arc::clone(&world);
    tokio::spawn(async move {
        let built = builder.populate().await.map_err(|error| chain(&error));
        ready.send_replace(Some(built));
    });
    serve_control(world, control, is_ready).await
}

impl World {
    fn now(&self) -> Time {
        self.cloud.now()
    }

    /// Launches every machine, in order, and waits for all of them at once.
    async fn populate(self: &Arc<Self>) -> Result<()> {
        let mut launched = vec![(PEER.to_owned(), self.launch(PEER, None)?)];
        for (index, spec) in self.spec.nodes.iter().enumerate() {
            let name = format!("node-{}", index + 1);
            let instance = self.launch(&name, Some(spec))?;
            launched.push((name, instance));
        }
        let mut coming = JoinSet::new();
        for (name, instance) in launched {
            let world = Arc::clone(self);
            coming.spawn(async move { world.bring_up(&name, &instance).await });
        }
        while let Some(ended) = coming.join_next().await {
            ended.map_err(|_| Error::refused("a machine's start panicked"))??;
        }
        Ok(())
    }

    fn launch(&self, name: &str, spec: Option<&NodeSpec>) -> Result<InstanceId> {
        let Some(spec) = spec else { return self.cloud.launch_peer(name) };
        self.lock(&self.launching).insert(name.to_owned(), spec.clone());
        let view = self.cloud.view();
        let turn = view.instances.iter().filter(|info| info.vpc == self.cloud.vpc && is_alive(info.state)).count();
        self.cloud.launch_node(name, spec, turn)
    }

    /// Waits until the machine's first link is there, and starts its ipamd.
    async fn bring_up(&self, name: &str, instance: &InstanceId) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(SETTLE_SECS);
        let mut followed = self.followed.subscribe();
        loop {
            followed.mark_unchanged();
            if self.is_up(instance).await {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if tokio::time::timeout(left, followed.changed()).await.is_err() {
                let trouble = self.followed.borrow().trouble.join("; ");
                let what = format!("the first link of {name} ({trouble})");
                return Err(Error::Deadline { what, seconds: SETTLE_SECS });
            }
        }
        if self.spec.daemons && self.node(name)?.spec.is_some() {
            self.daemon(name, DaemonAction::Start).await?;
        }
        Ok(())
    }

    async fn is_up(&self, instance: &InstanceId) -> bool {
        let view = self.cloud.view();
        let primary = view.enis_of(instance).first().map(|eni| eni.id.clone());
        let running = view.instance(instance).is_some_and(|info| info.state == InstanceState::Running);
        match primary {
            Some(eni) => running && self.fabric.lock().await.is_connected(&eni),
            None => false,
        }
    }

    async fn follow_forever(self: Arc<Self>) {
        let mut served = Vec::new();
        loop {
            let trouble = self.follow(&mut served).await;
            let pause = match self.cloud.next_transition() {
                _ if trouble => RETRY,
                Some(due) => Duration::from_millis(due.since_ms(self.now())),
                None => Duration::from_secs(3600),
            };
            // Woken by a change, or by something that is due.
            let _ = tokio::time::timeout(pause, self.changed.notified()).await;
        }
    }

    /// One round: machines, then the fabric, then what the routers serve. Returns whether anything failed.
    async fn follow(self: &Arc<Self>, served: &mut Vec<VpcId>) -> bool {
        let start = Instant::now();
        self.cloud.advance();
        let view = self.cloud.view();
        let mut trouble = Vec::new();
        if let Err(error) = self.follow_machines(&view).await {
            trouble.push(chain(&error));
        }
        let guests: BTreeMap<InstanceId, Guest> =
            self.lock(&self.nodes).iter().map(|(id, node)| (id.clone(), node.guest.clone())).collect();
        let mut fabric = self.fabric.lock().await;
        trouble.extend(fabric.follow(&plan(&view), &guests).await.iter().map(|error| chain(error)));
        let routers: Vec<_> = fabric.routers().map(|(vpc, place)| (vpc.clone(), place.clone())).collect();
        drop(fabric);
        served.retain(|vpc| routers.iter().any(|(router, _)| router == vpc));
        for (vpc, place) in routers {
            if !served.contains(&vpc) {
                match self.serve_inside(&vpc, &place) {
                    Ok(()) => served.push(vpc),
                    Err(error) => trouble.push(chain(&error)),
                }
            }
        }
        for text in &trouble {
            tracing::error!(trouble = text, "the fabric is not what EC2 says");
        }
        let failed = !trouble.is_empty();
        let took_ms = start.elapsed().as_secs_f64() * 1e3;
        self.followed.send_replace(Followed { version: view.version, took_ms, trouble });
        failed
    }

    /// A machine for every instance that runs, none for those that do not. Instances that somebody else launched get
    /// one too, named by their tag `Name`.
    async fn follow_machines(&self, view: &View) -> Result<()> {
        self.lock(&self.nodes).retain(|id, _| view.instance(id).is_some_and(|info| is_alive(info.state)));
        for info in view.instances.iter().filter(|info| is_alive(info.state)) {
            if self.lock(&self.nodes).contains_key(&info.id) {
                continue;
            }
            let tag = info.tags.get("Name").filter(|name| is_place_name(name) && self.node(name).is_err()).cloned();
            let name = tag.unwrap_or_else(|| info.id.to_string());
            let spec = self.lock(&self.launching).remove(&name);
            let files = PathBuf::from("/run/nodes").join(&name);
            let programs = self.programs.as_ref().filter(|_| spec.is_some());
            let node = Node::boot(&name, info.id.clone(), spec, files, programs).await?;
            self.lock(&self.nodes).insert(info.id.clone(), Arc::new(node));
        }
        Ok(())
    }

    fn node(&self, name: &str) -> Result<Arc<Node>> {
        let nodes = self.lock(&self.nodes);
        let found = nodes.values().find(|node| node.name == name || node.instance.as_str() == name).cloned();
        found.ok_or_else(|| Error::refused(format!("there is no machine {name}")))
    }

    pub(crate) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> std::sync::MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn daemon(&self, node: &str, action: DaemonAction) -> Result<()> {
        let programs = (self.programs.as_ref())
            .ok_or_else(|| Error::refused("this lab was started without ipamd and aws-cni at hand"))?;
        let env: Vec<_> = self.spec.env.clone().into_iter().collect();
        self.node(node)?.daemon(action, &programs.ipamd, &env).await
    }

    /// Waits until EC2 has nothing under way and the fabric shows all of it.
    async fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(SETTLE_SECS);
        let mut followed = self.followed.subscribe();
        loop {
            followed.mark_unchanged();
            let pending = self.cloud.next_transition().is_some_and(|due| due.since_ms(self.now()) < HORIZON_MS);
            let state = followed.borrow().clone();
            if !pending && state.trouble.is_empty() && state.version == self.cloud.version() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(200));
            if left.is_zero() {
                let what = format!("rest in the cloud ({})", state.trouble.join("; "));
                return Err(Error::Deadline { what, seconds: SETTLE_SECS });
            }
            // A change, or a look every now and then.
            let _ = tokio::time::timeout(left, followed.changed()).await;
        }
    }

    /// Waits until the fabric shows what EC2 has just been told, so that an answer of the API means packets flow.
    /// Bounded: a fabric in trouble does not stop the API.
    pub(crate) async fn caught_up(&self) {
        let version = self.cloud.version();
        let mut followed = self.followed.subscribe();
        let reached = followed.wait_for(|followed| followed.version >= version);
        let _ = tokio::time::timeout(Duration::from_secs(2), reached).await;
    }

    /// A place by its name, and the addresses by which others reach it.
    async fn place(&self, name: &str) -> Result<(Place, Vec<IpAddr>)> {
        if name == "internet" {
            return Ok((self.internet.clone(), vec![INTERNET_SERVER.into(), INTERNET_SERVER6.into()]));
        }
        if let "vpc" | "peer-vpc" = name {
            let vpc = if name == "vpc" { &self.cloud.vpc } else { &self.cloud.peer_vpc };
            let fabric = self.fabric.lock().await;
            let place = fabric.router(vpc).cloned().ok_or_else(|| Error::refused("the router is not up"))?;
            return Ok((place, vec![IMDS.into()]));
        }
        if let Some((node, pod)) = name.split_once('/') {
            let found = self.node(node)?.pods.find(pod);
            return found.ok_or_else(|| Error::refused(format!("{node} has no pod {pod}")));
        }
        let node = self.node(name)?;
        let view = self.cloud.view();
        let enis = view.enis_of(&node.instance);
        let eni = enis.first().ok_or_else(|| Error::refused(format!("{name} has no interface")))?;
        let ipv6 = eni.ipv6.first().map(|address| IpAddr::from(*address));
        Ok((node.place().clone(), [eni.primary_ipv4.into()].into_iter().chain(ipv6).collect()))
    }

    async fn probe(&self, from: &str, to: &[String], ipv6: bool) -> Result<Vec<Probe>> {
        let (place, _) = self.place(from).await?;
        let mut targets = Vec::new();
        for name in to {
            let mut address = match name.parse() {
                Ok(address) => address,
                Err(_) => {
                    let addresses = self.place(name).await?.1;
                    let (ipv6s, ipv4s): (Vec<IpAddr>, _) = addresses.into_iter().partition(IpAddr::is_ipv6);
                    let wanted = if ipv6 || ipv4s.is_empty() { ipv6s } else { ipv4s };
                    let first = wanted.first().copied();
                    first.ok_or_else(|| {
                        Error::refused(format!(
                            "{name} has no IPv6 address; a lab has IPv6 if it is started with --ipv6"
                        ))
                    })?
                }
            };
            if let (IpAddr::V4(private), "internet") = (address, from) {
                // From outside a machine is known by its public address; over IPv6 there is but one.
                let view = self.cloud.view();
                let public = view.enis.iter().find_map(|eni| eni.public.get(&private).copied());
                address = public.map_or(address, IpAddr::from);
            }
            targets.push((name.clone(), address));
        }
        let from = from.to_owned();
        tokio::task::spawn_blocking(move || probe::probe(&place, &from, &targets))
            .await
            .map_err(|_| Error::refused("the probe panicked; its message stands in the log"))?
    }

    async fn call(&self, from: String, to: Vec<SocketAddr>) -> Result<Vec<Called>> {
        let (place, _) = self.place(&from).await?;
        tokio::task::spawn_blocking(move || probe::call(&place, &from, &to))
            .await
            .map_err(|_| Error::refused("the probe panicked; its message stands in the log"))?
    }

    fn pods(&self) -> Vec<PodInfo> {
        self.lock(&self.nodes).values().flat_map(|node| node.pods.list()).collect()
    }

    pub(crate) async fn handle(&self, request: Request) -> Result<Value> {
        match request {
            Request::Hold => json(()),
            Request::Info => json(self.info().await),
            Request::Status => json(self.status().await),
            Request::View => json(self.cloud.view()),
            Request::Settle => json(self.settle().await?),
            Request::Enter { place } => {
                let (place, _) = self.place(&place).await?;
                let (net_fd, mnt_fd) = place.descriptors();
                json(Entrance { net_fd, mnt_fd })
            }
            Request::NodeAdd { spec } => {
                let taken = |number: &usize| self.node(&format!("node-{number}")).is_ok();
                let name = format!("node-{}", (1..).find(|number| !taken(number)).unwrap_or(1));
                let instance = self.launch(&name, Some(&spec))?;
                self.bring_up(&name, &instance).await?;
                json(name)
            }
            Request::NodeRemove { node } => {
                let node = self.node(&node)?;
                self.cloud.terminate(&node.instance)?;
                self.caught_up().await;
                json(())
            }
            Request::Daemon { node, action } => json(self.daemon(&node, action).await?),
            Request::PodAdd { node, name } => json(runtime::add(&*self.node(&node)?, &name, BTreeMap::new()).await?),
            Request::PodAddWith { node, name, capabilities } => {
                json(runtime::add(&*self.node(&node)?, &name, capabilities).await?)
            }
            Request::PodCheck { node, name } => json(runtime::check(&*self.node(&node)?, &name).await?),
            Request::PodDel { node, name } => json(runtime::del(&*self.node(&node)?, &name).await?),
            Request::Pods => json(self.pods()),
            Request::Probe { from, to, ipv6 } => json(self.probe(&from, &to, ipv6).await?),
            Request::Call { from, to } => json(self.call(from, to).await?),
            Request::Down => std::process::exit(0),
        }
    }
}

/// Tags may say anything; a machine's name stands in commands and paths.
fn is_place_name(name: &str) -> bool {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    plain && (1..=40).contains(&name.len()) && !matches!(name, "internet" | "vpc" | "peer-vpc")
}

fn is_alive(state: InstanceState) -> bool {
    matches!(state, InstanceState::Pending | InstanceState::Running)
}

fn json(value: impl Serialize) -> Result<Value> {
    serde_json::to_value(value).doing(|| "an answer of its own".into())
}
