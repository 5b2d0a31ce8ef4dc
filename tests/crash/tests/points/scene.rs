//! One node of a lab of its own with running pods, and what happens to them.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flatwire_core::ids::EniId;
use flatwire_core::ledger::Record;
use flatwire_store::journal::{COMPACT_AFTER, Journal};
use flatwire_tests::{binary, found, name_of, programs, start};
use ipamd::probe::Point;
use lab::api::element;
use lab::client::Lab;
use lab::ctl::{DaemonAction, Info, NodeSpec, PodInfo, Probe, Request, Spec};
use lab::error::chain;
use lab::fabric::{EC2_INSIDE, IMDS};
use serde_json::Value;
use tempfile::TempDir;

use crate::recipes::Recipe;

const NODE: &str = "node-1";
/// Outside the VPC, so that an answer has crossed all of it.
const WATCHER: &str = "peer";
/// Pods that are there from the beginning; the primary ENI of an m5.large has room for them.
const RESIDENTS: usize = 3;
const DUAL_STACK: (&str, &str) = ("ENABLE_IPv6", "true");
const DEADLINE: Duration = Duration::from_secs(90);
/// How a shell, and `lab exec`, shows SIGABRT.
const ABORTED: i32 = 134;

pub struct Scene {
    lab: Lab,
    keep: TempDir,
    pods: Vec<PodInfo>,
    adding: Vec<JoinHandle<PodInfo>>,
    /// An address that EC2 was told to take away.
    lost: Option<PodInfo>,
    lost_prefix: Option<String>,
    /// An ENI that belongs to nobody on purpose.
    leaked: Option<String>,
    names: u32,
}

/// Waits for a condition; if it does not come, says what was seen last.
fn eventually(what: &str, holds: impl FnMut() -> Result<(), String>) {
    found(DEADLINE.as_secs(), what, holds);
}

fn or<T: ToString>(holds: bool, otherwise: T) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_string()) }
}

impl Scene {
    pub fn start(recipe: &Recipe) -> Self {
        let keep = TempDir::new().unwrap();
        let mut node: NodeSpec = "m5.large".parse().unwrap();
        node.env.insert("AWS_VPC_K8S_CNI_LOGLEVEL".to_owned(), "debug".to_owned());
        if recipe.dual_stack {
            node.env.insert(DUAL_STACK.0.to_owned(), DUAL_STACK.1.to_owned());
        }
        let ipv6 = recipe.dual_stack;
        let (name, bin_dir, folder) = (name_of("crash"), Some(programs()), Some(keep.path().to_owned()));
        let lab = start(&Spec { name, ipv6, nodes: vec![node], bin_dir, keep: folder, ..Spec::default() });
        let (pods, adding) = (Vec::new(), Vec::new());
        let mut scene = Self { lab, keep, pods, adding, lost: None, lost_prefix: None, leaked: None, names: 0 };
        scene.burst_and_wait(RESIDENTS);
        scene
    }

    fn info(&self) -> Info {
        self.lab.connect().unwrap().ask(&Request::Info).unwrap()
    }

    /// A file of the node, as this machine sees it.
    fn file(&self, path: &str) -> PathBuf {
        let files = self.info().nodes[0].files.clone();
        assert!(files.starts_with(self.keep.path()), "the node's files are kept in {}", files.display());
        files.join(path)
    }

    /// Pods that ask at once and go on asking, as the kubelet does.
    pub fn burst(&mut self, count: usize) {
        for _ in 0..count {
            self.names += 1;
            let (name, mut control) = (format!("pod-{}", self.names), self.lab.connect().unwrap());
            self.adding.push(std::thread::spawn(move || {
                let deadline = Instant::now() + DEADLINE;
                loop {
                    match control.ask(&Request::PodAdd { node: NODE.to_owned(), name: name.clone() }) {
                        Ok(pod) => return pod,
                        Err(error) => assert!(Instant::now() < deadline, "{name} got no address: {}", chain(&error)),
                    }
                }
            }));
        }
    }

    pub fn burst_and_wait(&mut self, count: usize) {
        self.burst(count);
        self.join_adding();
    }

    fn join_adding(&mut self) {
        for thread in std::mem::take(&mut self.adding) {
            match thread.join() {
                Ok(pod) => self.pods.push(pod),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    }

    /// Pods come and go again, and leave more addresses behind than are wanted.
    pub fn come_and_go(&mut self, count: usize) {
        self.burst_and_wait(count);
        for pod in self.pods.split_off(RESIDENTS) {
            self.lab.pod_del(NODE, &pod.name).unwrap();
        }
    }

    pub fn delete_a_pod(&mut self) {
        let pod = self.pods.pop().unwrap();
        self.lab.pod_del(NODE, &pod.name).unwrap();
    }

    pub fn daemon_away(&mut self) {
        self.lab.daemon(NODE, DaemonAction::Stop).unwrap();
    }

    pub fn daemon_back(&mut self) {
        self.lab.daemon(NODE, DaemonAction::Start).unwrap_or_else(|error| panic!("{}", chain(&error)));
    }

    /// Starts the daemon that is to die, and waits until it serves or has died of its start.
    pub fn start_dying(&mut self, point: Point, arrival: u32, recipe: &Recipe) -> Dying {
        let log = std::fs::File::create(self.keep.path().join("dying.log")).unwrap();
        let mut variables = vec![
            format!("FLATWIRE_CRASH_AT={point}:{arrival}"),
            format!("FLATWIRE_HURRY={}", recipe.hurry),
            format!("AWS_EC2_ENDPOINT=http://{EC2_INSIDE}"),
            format!("AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{IMDS}"),
            "RUST_BACKTRACE=0".to_owned(),
        ];
        variables.extend(recipe.dual_stack.then(|| format!("{}={}", DUAL_STACK.0, DUAL_STACK.1)));
        let child = Command::new(binary("lab"))
            .args(["exec", "--name", self.lab.name(), NODE, "--", "env"])
            .args(variables)
            .args([env!("CARGO_BIN_EXE_ipamd-crash"), "run"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut dying = Dying { child, log: self.keep.path().join("dying.log") };
        let socket = self.file("run/aws-node/ipamd.sock");
        eventually("the daemon that is to die serves", || {
            or(UnixStream::connect(&socket).is_ok() || dying.child.try_wait().unwrap().is_some(), "it does not listen")
        });
        dying
    }

    /// Asks the pods that are there now, again and again, from outside.
    pub fn watch(&self) -> Watch {
        let pods: Vec<String> = self.pods.iter().map(|pod| format!("{NODE}/{}", pod.name)).collect();
        let mut control = self.lab.connect().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let thread = std::thread::spawn(move || {
            let mut silent = BTreeSet::new();
            let mut rounds = 0;
            while !seen.load(Ordering::Relaxed) {
                let request = Request::Probe { from: WATCHER.to_owned(), to: pods.clone(), ipv6: false };
                let probes: Vec<Probe> = control.ask(&request).unwrap();
                silent.extend(probes.iter().filter(|p| p.rtt_us.is_none() || p.seen.is_none()).map(|p| p.to.clone()));
                rounds += 1;
            }
            (rounds, silent)
        });
        Watch { over, thread }
    }

    pub fn everybody_is_served(&mut self) {
        self.join_adding();
        let addresses: BTreeSet<_> = self.pods.iter().map(|pod| pod.address).collect();
        assert_eq!(addresses.len(), self.pods.len(), "an address was given twice");
    }

    /// The three views agree, by ipamd's own comparison and by the lab's EC2.
    pub fn all_agree(&mut self) {
        let ipamd = self.lab.ipamd().unwrap();
        let pods = self.pods.len() + self.lost.iter().count();
        eventually("the views agree", || {
            let status = self.status();
            let enis = status["enis"].as_array().unwrap();
            or(enis.iter().all(|eni| eni["state"] == "in service"), format!("ENIs: {enis:?}"))?;
            or(status["counts"]["waiting"] == 0, "somebody waits")?;
            let held = status["pods"].as_array().unwrap().len();
            or(held == pods, format!("{held} pods in the ledger, {pods} on the node"))?;
            let audit = self.lab.exec(NODE, &[&ipamd, "audit"]).unwrap();
            let said = [audit.stdout, audit.stderr].concat();
            or(audit.status.success(), String::from_utf8_lossy(&said))
        });
        self.lab.settle().unwrap();
        let of_ledger = |status: &Value| -> BTreeSet<String> {
            let ids = status["enis"].as_array().unwrap().iter();
            ids.map(|eni| eni["id"].as_str().unwrap().to_owned()).collect()
        };
        let of_cloud: BTreeSet<String> = self.info().nodes[0].enis.iter().map(|eni| eni.id.clone()).collect();
        assert_eq!(of_ledger(&self.status()), of_cloud, "ENIs of the ledger, and of EC2");
        let view = self.lab.view().unwrap();
        let unattached: Vec<String> =
            view.enis.iter().filter(|eni| eni.attachment.is_none()).map(|eni| eni.id.to_string()).collect();
        let expected: Vec<String> = self.leaked.iter().cloned().collect();
        assert_eq!(unattached, expected, "ENIs that belong to nobody");
    }

    fn status(&self) -> Value {
        let ipamd = self.lab.ipamd().unwrap();
        serde_json::from_str(&self.lab.run(NODE, &[&ipamd, "status", "--json"]).unwrap()).unwrap()
    }

    pub fn all_answer(&mut self) {
        let targets: Vec<String> = self.pods.iter().map(|pod| format!("{NODE}/{}", pod.name)).collect();
        let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
        for probe in self.lab.probe(WATCHER, &targets).unwrap() {
            assert!(probe.rtt_us.is_some() && probe.seen.is_some(), "no answer: {probe:?}");
        }
    }

    pub fn nothing_is_left(&mut self) {
        for pod in std::mem::take(&mut self.pods) {
            self.lab.pod_del(NODE, &pod.name).unwrap();
        }
        eventually("the ledger is empty", || {
            let status = self.status();
            or(status["pods"].as_array().is_some_and(Vec::is_empty), &status["pods"])
        });
        let routes: Value = serde_json::from_str(&self.lab.run(NODE, &["ip", "-j", "route"]).unwrap()).unwrap();
        let to_pods = routes.as_array().unwrap().iter();
        let to_pods = to_pods.filter(|route| route["dev"].as_str().is_some_and(|dev| dev.starts_with("eni")));
        assert_eq!(to_pods.count(), 0, "routes to pods are left: {routes}");
    }

    /// Somebody takes a pod's address away in EC2, and an audit is asked for.
    pub fn lose_an_address_in_ec2(&mut self) {
        let pod = self.lost.clone().unwrap();
        let eni = self.status()["pods"].as_array().unwrap().iter().find_map(|held| {
            (held["address"] == pod.address.to_string()).then(|| held["eni"].as_str().unwrap().to_owned())
        });
        let address = pod.address.to_string();
        let parameters = [("NetworkInterfaceId", eni.as_deref().unwrap()), ("PrivateIpAddress.1", address.as_str())];
        self.lab.ec2().call("UnassignPrivateIpAddresses", &parameters).unwrap();
        // Answered, or cut off by the death it leads to.
        let ipamd = self.lab.ipamd().unwrap();
        let _ = self.lab.exec(NODE, &[&ipamd, "audit"]).unwrap();
    }

    /// One of the pods is to lose its address, and so is not watched.
    pub fn choose_who_loses(&mut self) {
        self.burst_and_wait(1);
        self.lost = self.pods.pop();
    }

    pub fn it_is_there_again(&mut self) {
        self.pods.push(self.lost.take().unwrap());
    }

    fn ipv6_prefixes(&self) -> Vec<String> {
        let enis = self.info().nodes[0].enis.clone();
        let primary = enis.iter().find(|eni| eni.device == 0).unwrap();
        primary.ipv6_prefixes.iter().map(ToString::to_string).collect()
    }

    /// Somebody takes the primary's /80 away, under the pods that live on it.
    pub fn lose_the_ipv6_prefix_in_ec2(&mut self) {
        let prefix = self.ipv6_prefixes().pop().expect("a dual-stack node has a /80");
        let primary = self.primary();
        let parameters = [("NetworkInterfaceId", primary.as_str()), ("Ipv6Prefix.1", prefix.as_str())];
        self.lab.ec2().call("UnassignIpv6Addresses", &parameters).unwrap();
        self.lost_prefix = Some(prefix);
    }

    /// That very one, by which its pods' addresses are made.
    pub fn the_ipv6_prefix_is_there_again(&mut self) {
        assert_eq!(self.ipv6_prefixes(), [self.lost_prefix.take().unwrap()]);
        let pods: Vec<String> = self.pods.iter().map(|pod| format!("{NODE}/{}", pod.name)).collect();
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        let probes = self.lab.probe6(WATCHER, &pods).unwrap();
        assert!(probes.iter().all(|probe| probe.rtt_us.is_some() && probe.seen.is_some()), "{probes:?}");
    }

    pub fn add_a_group_to_the_primary(&mut self) {
        let primary = self.primary();
        let vpc = self.info().vpc.id.clone();
        let parameters = [("GroupName", "more"), ("GroupDescription", "more"), ("VpcId", vpc.as_str())];
        let made = self.lab.ec2().call("CreateSecurityGroup", &parameters).unwrap();
        let group = element(&made, "groupId").unwrap();
        let mut groups = self.groups_of(&primary);
        groups.insert(group);
        let names: Vec<String> = (1..=groups.len()).map(|n| format!("SecurityGroupId.{n}")).collect();
        let mut parameters = vec![("NetworkInterfaceId", primary.as_str())];
        parameters.extend(names.iter().map(String::as_str).zip(groups.iter().map(String::as_str)));
        self.lab.ec2().call("ModifyNetworkInterfaceAttribute", &parameters).unwrap();
        // IMDS lags, and the daemon's first look at it is what this is about.
        self.lab.settle().unwrap();
    }

    fn primary(&self) -> String {
        self.info().nodes[0].enis.iter().find(|eni| eni.device == 0).unwrap().id.clone()
    }

    fn groups_of(&mut self, eni: &str) -> BTreeSet<String> {
        let view = self.lab.view().unwrap();
        view.eni(&EniId::new(eni).unwrap()).unwrap().security_groups.iter().map(ToString::to_string).collect()
    }

    pub fn every_eni_has_the_groups(&mut self) {
        let primary = self.primary();
        let wanted = self.groups_of(&primary);
        assert!(wanted.len() > 1);
        let enis: Vec<String> = self.info().nodes[0].enis.iter().map(|eni| eni.id.clone()).collect();
        assert!(enis.len() > 1);
        for eni in enis {
            assert_eq!(self.groups_of(&eni), wanted, "groups of {eni}");
        }
    }

    /// An ENI as a node leaves it that dies between creating and attaching it, and has lost its ledger.
    pub fn leak_an_eni(&mut self) {
        let node = self.info().nodes[0].clone();
        let parameters = [
            ("SubnetId", node.enis[0].subnet.as_str()),
            ("Description", "aws-K8S-leaked"),
            ("TagSpecification.1.ResourceType", "network-interface"),
            ("TagSpecification.1.Tag.1.Key", "node.k8s.amazonaws.com/instance_id"),
            ("TagSpecification.1.Tag.1.Value", node.instance.as_str()),
        ];
        let made = self.lab.ec2().call("CreateNetworkInterface", &parameters).unwrap();
        self.leaked = element(&made, "networkInterfaceId");
        self.lab.settle().unwrap();
    }

    /// As long use makes it, with records that change nothing.
    pub fn lengthen_the_journal(&mut self) {
        let primary = EniId::new(self.primary()).unwrap();
        let (mut journal, opened) = Journal::open(&self.file("run/aws-node/flatwire.journal")).unwrap();
        let record = Record::EniUnseen { eni: primary, at: None };
        journal.append(&vec![record; COMPACT_AFTER + opened.state.as_records().len()]).unwrap();
    }
}

/// The daemon that is to die.
pub struct Dying {
    child: Child,
    log: PathBuf,
}

impl Dying {
    pub fn wait(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => {
                    assert_eq!(status.code(), Some(ABORTED), "it ended otherwise: {}", self.log_tail());
                    return;
                }
                None if Instant::now() > deadline => {
                    panic!("the point was not reached within {} s: {}", DEADLINE.as_secs(), self.log_tail());
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }
}

impl Drop for Dying {
    fn drop(&mut self) {
        // Of a test that failed before; the daemon itself goes with the lab.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pods being asked.
pub struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<(u32, BTreeSet<String>)>,
}

impl Watch {
    pub fn nobody_fell_silent(self) {
        self.over.store(true, Ordering::Relaxed);
        let (rounds, silent) = self.thread.join().unwrap();
        assert!(rounds > 0, "nobody was asked");
        assert!(silent.is_empty(), "running pods did not answer: {silent:?}");
    }
}
