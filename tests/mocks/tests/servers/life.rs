//! A node's whole life on LocalStack and on moto: the daemon and the plugin as they ship, told by their environment where EC2
//! and the metadata are.
//!
//! The servers have no machines. A network namespace stands for the instance, a link appears there when an ENI is attached,
//! and the metadata says what the server says of the instance's ENIs. Between daemon and server stands a proxy that puts two
//! things right: what `server.rs` repairs, and that AssignPrivateIpAddresses answers with what is new alone.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flatwire_kernel::netns::{Netns, create_named, in_netns, remove_named};
use flatwire_mock_tests::canned::{Answer, Canned, Keys, Request, metadata};
use flatwire_mock_tests::query::{Query, text, texts};
use flatwire_mock_tests::server::{Place, REGION, Server, pass_on};
use flatwire_tests::{binary, found};
use serde_json::{Value, json};

/// Nine on the primary ENI of an m5.large, so that the others are on a second one.
const PODS: usize = 12;
/// An address is given back when it was free for a minute, at one of the looks that are half a minute apart.
const PATIENCE: Duration = Duration::from_secs(240);

#[tokio::test(flavor = "multi_thread")]
async fn localstack_life() {
    let Some(server) = Server::localstack() else { return };
    live(server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn moto_life() {
    let Some(server) = Server::moto() else { return };
    live(server).await;
}

async fn live(server: Server) {
    let mut node = Node::boot(server).await;
    node.start();
    let mut pods: Vec<Pod> = Vec::new();
    for number in 0..PODS {
        pods.push(node.add(number).await);
    }
    let enis = node.world.enis();
    assert_eq!(enis.len(), 2, "{enis:?}");
    let ours = enis.iter().find(|eni| eni.device == 1).unwrap();
    assert!(ours.tags.contains("cluster.k8s.amazonaws.com/name"), "{ours:?}");

    // A daemon that dies keeps its promises.
    node.kill();
    node.start();
    for number in PODS..PODS + 2 {
        pods.push(node.add(number).await);
    }
    let given: BTreeSet<Ipv4Addr> = pods.iter().map(|pod| pod.address).collect();
    assert_eq!(given.len(), pods.len(), "an address was given twice");
    let held: BTreeSet<Ipv4Addr> = node.world.enis().into_iter().flat_map(|eni| eni.secondary).collect();
    assert!(given.is_subset(&held), "given {given:?}, EC2 has {held:?}");
    for pod in &pods {
        node.cni("CHECK", pod, Some(&pod.result)).unwrap();
    }

    // What nobody uses goes back, an ENI at a time.
    let kept = pods.remove(0);
    for pod in &pods {
        node.cni("DEL", pod, Some(&pod.result)).unwrap();
    }
    eventually("addresses are given back", || {
        let held: BTreeSet<Ipv4Addr> = node.world.enis().into_iter().flat_map(|eni| eni.secondary).collect();
        if held.len() < given.len() - 2 && held.contains(&kept.address) {
            Ok(())
        } else {
            Err(format!("EC2 has {held:?}"))
        }
    });
    node.kill();
    node.start();
    node.cni("CHECK", &kept, Some(&kept.result)).unwrap();
    node.cni("DEL", &kept, Some(&kept.result)).unwrap();
    node.stop();

    let left = node.world.end();
    assert!(left.is_empty(), "EC2 still has {left:?}");
}

/// What stands for EC2 and for the instance's hardware.
struct World {
    query: Query,
    place: Place,
    netns: PathBuf,
    /// LocalStack answers a reading of the metadata, forty leaves, in seconds; they are one moment of the server.
    seen: Mutex<Option<(Instant, Vec<Eni>)>>,
}

#[derive(Debug, Clone)]
struct Eni {
    id: String,
    mac: String,
    device: u32,
    primary: Ipv4Addr,
    secondary: Vec<Ipv4Addr>,
    tags: String,
}

struct Node {
    world: Arc<World>,
    folder: tempfile::TempDir,
    daemon: Option<Child>,
    ec2: Canned,
    imds: Canned,
    pods: Vec<PathBuf>,
    _server: Server,
}

struct Pod {
    name: String,
    id: String,
    netns: PathBuf,
    address: Ipv4Addr,
    result: Value,
}

impl World {
    fn enis(&self) -> Vec<Eni> {
        let filter = [("Filter.1.Name", "attachment.instance-id"), ("Filter.1.Value.1", self.place.instance.as_str())];
        let all = self.query.ec2("DescribeNetworkInterfaces", &filter);
        let ids: BTreeSet<String> = texts(&all, "networkInterfaceId").into_iter().map(str::to_owned).collect();
        ids.into_iter().map(|id| self.eni(id)).collect()
    }

    fn eni(&self, id: String) -> Eni {
        let xml = self.query.ec2("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", &id)]);
        let addresses = addresses(&xml);
        let primary = text(&xml, "privateIpAddress").parse().unwrap();
        Eni {
            mac: texts(&xml, "macAddress").first().map(|mac| flatwire_mock_tests::server::repair_mac(mac)).unwrap(),
            device: texts(&xml, "deviceIndex").first().and_then(|index| index.parse().ok()).unwrap_or(0),
            primary,
            secondary: addresses.into_iter().filter(|address| *address != primary).collect(),
            tags: texts(&xml, "tagSet").concat(),
            id,
        }
    }

    /// A leaf of the metadata.
    fn leaf(&self, path: &str) -> Option<String> {
        let enis = self.seen();
        let primary = enis.iter().find(|eni| eni.device == 0)?;
        let text = match path {
            "meta-data/mac" => primary.mac.clone(),
            "meta-data/local-ipv4" => primary.primary.to_string(),
            "meta-data/instance-id" => self.place.instance.to_string(),
            "meta-data/instance-type" => "m5.large".to_owned(),
            "meta-data/placement/availability-zone" => self.place.zone.clone(),
            "meta-data/placement/region" => REGION.to_owned(),
            "meta-data/network/interfaces/macs/" => enis.iter().map(|eni| format!("{}/\n", eni.mac)).collect(),
            _ => {
                let (mac, leaf) = path.strip_prefix("meta-data/network/interfaces/macs/")?.split_once('/')?;
                let eni = enis.iter().find(|eni| eni.mac == mac)?;
                match leaf {
                    "interface-id" => eni.id.clone(),
                    "device-number" => eni.device.to_string(),
                    "local-ipv4s" => {
                        [eni.primary].iter().chain(&eni.secondary).map(|address| format!("{address}\n")).collect()
                    }
                    "subnet-id" => self.place.subnet.to_string(),
                    "subnet-ipv4-cidr-block" | "vpc-ipv4-cidr-block" | "vpc-ipv4-cidr-blocks" => {
                        "10.0.0.0/16".to_owned()
                    }
                    "security-group-ids" => self.place.group.to_string(),
                    "vpc-id" => self.place.vpc.to_string(),
                    _ => return None,
                }
            }
        };
        Some(text)
    }

    fn seen(&self) -> Vec<Eni> {
        let mut seen = self.seen.lock().unwrap();
        match &*seen {
            Some((at, enis)) if at.elapsed() < Duration::from_secs(2) => enis.clone(),
            _ => {
                let enis = self.enis();
                *seen = Some((Instant::now(), enis.clone()));
                enis
            }
        }
    }

    /// A call of the daemon's, on its way to the server.
    fn ec2(&self, request: &Request, repair: fn(String) -> String) -> Answer {
        let action = request.form("Action").unwrap_or_default();
        let eni = request.form("NetworkInterfaceId");
        let before = eni.clone().filter(|_| action == "AssignPrivateIpAddresses").map(|id| self.eni(id));
        let mut answer = pass_on(self.query.port, request, repair);
        if let Answer::Http { status: 200, body, .. } = &mut answer {
            if let Some(eni) = before {
                let text = String::from_utf8(std::mem::take(body)).unwrap();
                *body = without(text, eni.secondary.into_iter().chain([eni.primary])).into_bytes();
            }
            *self.seen.lock().unwrap() = None;
            if action == "AttachNetworkInterface" {
                self.plug(&self.eni(eni.unwrap()));
            }
        }
        answer
    }

    /// The instance gets a link.
    fn plug(&self, eni: &Eni) {
        let (name, far) = (format!("eth{}", eni.device), format!("far{}", eni.device));
        self.ip(&["link", "add", &name, "address", &eni.mac, "type", "veth", "peer", "name", &far]);
        self.ip(&["link", "set", &far, "up"]);
        if eni.device == 0 {
            self.ip(&["address", "add", &format!("{}/16", eni.primary), "dev", &name]);
            self.ip(&["link", "set", &name, "up"]);
            self.ip(&["route", "add", "default", "via", "10.0.0.1", "dev", &name]);
        }
    }

    fn ip(&self, arguments: &[&str]) {
        let output = inside(&self.netns, "ip").args(arguments).output().unwrap();
        assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The instance is terminated, and what it had is deleted, which the servers leave to whoever asked for it. Returns the
    /// ENIs that are there after all.
    fn end(&self) -> Vec<String> {
        let enis = self.enis();
        self.query.ec2("TerminateInstances", &[("InstanceId.1", self.place.instance.as_str())]);
        for eni in enis {
            let xml = self.query.ec2("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", &eni.id)]);
            // EC2 lets nobody detach the primary one, and takes it away with the instance.
            let attachment = texts(&xml, "attachmentId").into_iter().find(|_| eni.device > 0);
            if let Some(attachment) = attachment {
                self.query.ec2("DetachNetworkInterface", &[("AttachmentId", attachment), ("Force", "true")]);
            }
            self.query.ec2("DeleteNetworkInterface", &[("NetworkInterfaceId", &eni.id)]);
        }
        let left = self.query.ec2("DescribeNetworkInterfaces", &[]);
        texts(&left, "networkInterfaceId").into_iter().map(str::to_owned).collect()
    }
}

impl Node {
    async fn boot(server: Server) -> Self {
        let folder = tempfile::Builder::new().prefix("flatwire-life-").tempdir().unwrap();
        let netns = folder.path().join("node");
        create_named(&netns, true).await.unwrap();
        let place = server.lay_out();
        let world =
            Arc::new(World { query: server.query.clone(), place, netns: netns.clone(), seen: Mutex::default() });
        world.plug(&world.enis()[0]);
        let listen = || {
            let netns = Netns::open(&netns).unwrap();
            in_netns(&netns, || TcpListener::bind("127.0.0.1:0")).unwrap()
        };
        let (leaves, repair) = (world.clone(), server.repair);
        let leaf = move |path: &str, _| leaves.leaf(path).map(Answer::ok);
        let imds = Canned::on(listen(), metadata(Keys::any(&server.query.access_key), leaf));
        let calls = world.clone();
        let ec2 = Canned::on(listen(), move |request, _| calls.ec2(request, repair));
        Self { world, folder, daemon: None, ec2, imds, pods: Vec::new(), _server: server }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.file("ipamd.log")).unwrap();
        let daemon = inside(&self.world.netns, binary("ipamd"))
            .arg("run")
            .env_clear()
            // These two are what points the daemon at somebody else's EC2.
            .env("AWS_EC2_ENDPOINT", self.ec2.url())
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", self.imds.url())
            .env("MY_NODE_NAME", "node-1")
            .env("CLUSTER_NAME", "life")
            .env("WARM_IP_TARGET", "2")
            .env("MINIMUM_IP_TARGET", "3")
            .env("IP_COOLDOWN_PERIOD", "5")
            .env("FLATWIRE_SOCKET", self.file("ipamd.sock"))
            .env("FLATWIRE_LEDGER", self.file("flatwire.journal"))
            .env("AWS_VPC_K8S_CNI_BACKING_STORE", self.file("ipam.json"))
            .env("FLATWIRE_RELEASE_QUEUE", self.file("releases"))
            .env("FLATWIRE_NODE_STATE", self.file("node-state.json"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        eventually("ipamd serves", || {
            UnixStream::connect(self.file("ipamd.sock")).map(drop).map_err(|error| format!("{error}\n{}", self.log()))
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.file("ipamd.log")).unwrap_or_default()
    }

    fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        // The next one must make its own.
        let _ = std::fs::remove_file(self.file("ipamd.sock"));
    }

    fn stop(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(daemon.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success(), "{}", self.log());
    }

    async fn add(&mut self, number: usize) -> Pod {
        let name = format!("pod-{number}");
        let netns = self.file(&name);
        create_named(&netns, true).await.unwrap();
        self.pods.push(netns.clone());
        let mut pod =
            Pod { id: format!("{number:064x}"), name, netns, address: Ipv4Addr::UNSPECIFIED, result: Value::Null };
        pod.result = eventually("a pod", || self.cni("ADD", &pod, None));
        let address = pod.result["ips"][0]["address"].as_str().unwrap();
        pod.address = address.strip_suffix("/32").unwrap().parse().unwrap();
        pod
    }

    /// One call of the plugin, as a runtime makes it.
    fn cni(&self, verb: &str, pod: &Pod, before: Option<&Value>) -> Result<Value, String> {
        let mut conf = json!({
            "cniVersion": "1.0.0", "name": "aws-cni", "type": "aws-cni", "vethPrefix": "eni", "mtu": "9001",
            "pluginLogFile": self.file("plugin.log"), "ipamdSocket": self.file("ipamd.sock"),
            "releaseQueueDir": self.file("releases"),
        });
        if let Some(result) = before {
            conf["prevResult"] = result.clone();
        }
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={}",
            pod.name, pod.id
        );
        let mut plugin = inside(&self.world.netns, binary("aws-cni"))
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", &pod.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        plugin.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
        let Output { status, stdout, .. } = plugin.wait_with_output().unwrap();
        let said = String::from_utf8(stdout).unwrap();
        if status.success() {
            return Ok(serde_json::from_str(&said).unwrap_or(Value::Null));
        }
        Err(said)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for netns in self.pods.iter().chain([&self.world.netns]) {
            let _ = remove_named(netns);
        }
    }
}

/// A program in a network namespace, by the name that it has or its path.
fn inside(netns: &Path, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg(program);
    command
}

fn addresses(xml: &str) -> Vec<Ipv4Addr> {
    let sets = texts(xml, "privateIpAddressesSet");
    sets.into_iter().flat_map(|set| texts(set, "privateIpAddress")).filter_map(|text| text.parse().ok()).collect()
}

/// The answer without the items of these addresses.
fn without(mut xml: String, addresses: impl IntoIterator<Item = Ipv4Addr>) -> String {
    for address in addresses {
        let element = format!("<privateIpAddress>{address}</privateIpAddress>");
        let Some(at) = xml.find(&element) else { continue };
        let (start, end) = (xml[..at].rfind("<item>").unwrap(), xml[at..].find("</item>").unwrap());
        xml.replace_range(start..at + end + "</item>".len(), "");
    }
    xml
}

fn eventually<T>(what: &str, look: impl FnMut() -> Result<T, String>) -> T {
    found(PATIENCE.as_secs(), what, look)
}
