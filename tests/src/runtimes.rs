//! Real container runtimes on the lab's nodes: what a machine image brings, containerd and podman in a node, and containerd's
//! own interface, spoken as a kubelet speaks it.
//!
//! A runtime runs inside a node: its namespaces, mounts and processes are the lab's, and end with it. Only control groups and
//! the image's file are the machine's: they carry the id of the process that made them, and every scene sweeps those of
//! processes that are no more.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, io};

use lab::client::Lab;
use lab::ctl::{DaemonAction, Spec};
use lab::fabric::{EC2_INSIDE, IMDS};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use crate::manifest::container;
use crate::{binary, eventually, name_of, programs, start};

/// The calls of the Container Runtime Interface.
pub mod cri {
    #![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated")]
    tonic::include_proto!("runtime.v1");
}

use cri::runtime_service_client::RuntimeServiceClient;

/// The image of sandboxes and containers: the program `peer`.
pub const IMAGE: &str = "localhost/peer:1";
/// Those that pods run on.
pub const NODES: [&str; 2] = ["node-1", "node-2"];
pub const CONFLIST: &str = "/etc/cni/net.d/10-aws.conflist";
/// On the machine, from the package containernetworking-plugins.
const PLUGINS: &str = "/usr/lib/cni";
const CGROUPS: &str = "/sys/fs/cgroup";
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// As long as a kubelet waits.
const CALL: Duration = Duration::from_secs(120);

/// Why no container can be run on this machine, if so.
#[must_use]
pub fn obstacle() -> Option<String> {
    static FOUND: OnceLock<Option<String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let own = Path::new(CGROUPS).join(if Path::new(CGROUPS).join("memory").is_dir() { "memory" } else { "." });
        let probe = own.join(format!("flatwire-probe-{}", std::process::id()));
        let made = fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe));
        made.err().map(|error| format!("no control group can be made: {}: {error}", probe.display()))
    });
    found.clone()
}

/// Two nodes as a machine image and the chart make them, with the daemon away.
pub struct Scene {
    pub lab: Lab,
    // After the lab, whose processes are in them.
    outside: Outside,
}

impl Scene {
    /// Two nodes with our plugin on them as the chart puts it there. `peer` is the program that containers run.
    ///
    /// # Panics
    ///
    /// If a part of it cannot be had, with the reason.
    #[must_use]
    pub fn start(name: &str, peer: &Path) -> Self {
        let scene = Self::bare(name, 2, peer);
        let install = container("install");
        let program = scene.lab.ipamd().unwrap();
        let env = install.env.iter().map(String::as_str);
        let command: Vec<&str> = ["env"].into_iter().chain(env).chain([program.as_str()]).collect();
        let command = [command, install.args.iter().map(String::as_str).collect()].concat();
        for node in NODES {
            scene.run(node, &command);
        }
        scene
    }

    /// As many nodes with what a machine image brings, the plugins `loopback` and `portmap`, and nothing of ours.
    ///
    /// # Panics
    ///
    /// If a part of it cannot be had, with the reason.
    #[must_use]
    pub fn bare(name: &str, count: usize, peer: &Path) -> Self {
        let name = name_of(name);
        let outside = Outside::claim(&name);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("image.py");
        let mut command = Command::new("python3");
        command.arg(script).arg(outside.image()).arg(IMAGE).arg(peer).arg("pause");
        let made = command.output().expect("python3 starts");
        assert!(made.status.success(), "the image: {}", String::from_utf8_lossy(&made.stderr));

        let env = container("aws-node").env.into_iter().filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        let nodes = vec!["m5.large".parse().unwrap(); count];
        let (bin_dir, env) = (Some(programs()), env.collect());
        let lab = start(&Spec { name, nodes, bin_dir, env, daemons: false, ..Spec::default() });
        let scene = Self { lab, outside };
        // The lab's own runtime needs what it puts there, and podman's package a conflist.
        let furnish = format!(
            "rm -f /etc/cni/net.d/* /opt/cni/bin/aws-cni && cp {PLUGINS}/loopback {PLUGINS}/portmap /opt/cni/bin/"
        );
        for number in 1..=count {
            scene.run(&format!("node-{number}"), &["sh", "-c", &furnish]);
        }
        scene
    }

    /// # Panics
    ///
    /// If the command fails.
    pub fn run(&self, node: &str, command: &[&str]) -> String {
        self.lab.run(node, command).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The node's own address.
    ///
    /// # Panics
    ///
    /// If it has none.
    #[must_use]
    pub fn address(&self, node: &str) -> Ipv4Addr {
        let found = self.lab.info().nodes.iter().find(|info| info.name == node);
        found.and_then(|info| info.address).unwrap_or_else(|| panic!("{node} has no address"))
    }

    /// `ipamd` with these arguments, beside the daemon: whether it ended well, and what it said.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn ipamd(&self, node: &str, arguments: &[&str]) -> (bool, String) {
        let program = self.lab.ipamd().unwrap_or_else(|error| panic!("{error}"));
        let ec2 = format!("AWS_EC2_ENDPOINT=http://{EC2_INSIDE}");
        let imds = format!("AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{IMDS}");
        let command = [vec!["env", &ec2, &imds, &program], arguments.to_vec()].concat();
        let output = self.lab.exec(node, &command).unwrap_or_else(|error| panic!("{error}"));
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    /// # Panics
    ///
    /// If the lab refuses.
    pub fn daemon(&mut self, node: &str, action: DaemonAction) {
        self.lab.daemon(node, action).unwrap_or_else(|error| panic!("{}", lab::error::chain(&error)));
    }

    /// Starts both daemons and waits until they have written their conflists.
    pub fn serve(&mut self) {
        for node in NODES {
            self.daemon(node, DaemonAction::Start);
            eventually("the daemon's conflist is in place", || self.is_there(node, CONFLIST));
        }
    }

    #[must_use]
    pub fn is_there(&self, node: &str, path: &str) -> bool {
        self.lab.exec(node, &["test", "-e", path]).is_ok_and(|output| output.status.success())
    }

    /// What its daemon says of the node; null without one.
    #[must_use]
    pub fn status(&self, node: &str) -> Value {
        serde_json::from_str(&self.ipamd(node, &["status", "--json"]).1).unwrap_or_default()
    }

    /// Addresses that pods of the node have by its ledger.
    #[must_use]
    pub fn given(&self, node: &str) -> BTreeSet<Ipv4Addr> {
        let status = self.status(node);
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        pods.iter().filter_map(|pod| pod["address"].as_str()?.parse().ok()).collect()
    }

    /// What pods leave on a node that is not as it should be without any, by `ip`, `iptables` and the daemon's own audit. The
    /// rules and tables of ENIs are there before pods and after.
    #[must_use]
    pub fn left(&self, node: &str, addresses: &BTreeSet<Ipv4Addr>) -> Vec<String> {
        let mut left = Vec::new();
        for (what, command) in [
            ("link", "ip -o link show type veth | grep ': eni' || true"),
            ("route", "ip route show table all | grep 'dev eni' || true"),
            ("namespace", "ls /run/netns | grep -E '^(cni|netns)-' || true"),
        ] {
            let lines = self.run(node, &["sh", "-c", command]);
            left.extend(lines.lines().map(|line| format!("{what} {line}")));
        }
        let rules = self.run(node, &["sh", "-c", "ip rule; iptables-legacy-save; iptables-nft-save"]);
        let names_one = |line: &&str| addresses.iter().any(|address| line.contains(&format!("{address}/32")));
        left.extend(rules.lines().filter(names_one).map(|line| format!("rule {line}")));
        left.extend(self.given(node).iter().map(|address| format!("{address} is a pod's by the ledger")));
        let (clean, said) = self.ipamd(node, &["audit"]);
        left.extend((!clean).then_some(said));
        left
    }

    /// # Panics
    ///
    /// If something stays, with its name.
    pub fn nothing_is_left(&self, addresses: &BTreeSet<Ipv4Addr>) {
        NODES.iter().for_each(|node| self.nothing_is_left_on(node, addresses));
    }

    /// # Panics
    ///
    /// If something stays, with its name.
    pub fn nothing_is_left_on(&self, node: &str, addresses: &BTreeSet<Ipv4Addr>) {
        let mut left = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            left = self.left(node, addresses);
            if left.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("{node}: stays: {left:#?}");
    }

    /// podman on a node, with these arguments.
    ///
    /// # Errors
    ///
    /// What it complains of.
    pub fn podman(&self, node: &str, arguments: &[&str]) -> Result<String, String> {
        let run = self.run_dir(node);
        for (file, text) in [("podman.conf", PODMAN_CONF), ("podman-storage.conf", PODMAN_STORAGE_CONF)] {
            fs::write(run.join(file), text).map_err(|error| format!("{file}: {error}"))?;
        }
        let env = ["env", "CONTAINERS_CONF=/run/podman.conf", "CONTAINERS_STORAGE_CONF=/run/podman-storage.conf"];
        let command = [&env[..], &["podman"], arguments].concat();
        let output = self.lab.exec(node, &command).map_err(|error| lab::error::chain(&error))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    /// CNI's GC, with the sandboxes that the runtime knows: newer runtimes than Debian's send it. It is for a runtime that was
    /// killed between the network of a sandbox and its own note of it.
    ///
    /// # Panics
    ///
    /// If the plugin refuses.
    pub fn collect(&self, containerd: &Containerd, node: &str) {
        let valid = containerd.sandboxes().into_iter();
        let valid = valid.map(|(id, _)| serde_json::json!({ "containerID": id, "ifname": "eth0" })).collect();
        let list: Value = serde_json::from_str(&self.run(node, &["cat", CONFLIST])).expect("a conflist");
        let mut config = list["plugins"][0].clone();
        config["cniVersion"] = "1.1.0".into();
        config["name"] = list["name"].clone();
        config["cni.dev/valid-attachments"] = Value::Array(valid);
        let call = "printf %s \"$1\" | CNI_COMMAND=GC CNI_PATH=/opt/cni/bin /opt/cni/bin/aws-cni";
        self.run(node, &["sh", "-c", call, "sh", &config.to_string()]);
    }

    /// The node's own /run, as it is seen from here: outside of the lab's mounts.
    #[must_use]
    pub fn run_dir(&self, node: &str) -> PathBuf {
        let pid = lab::boot::dir_of(self.lab.name()).map(|dir| fs::read_to_string(dir.join("world.pid")));
        let pid = pid.ok().and_then(Result::ok).expect("the lab notes its process");
        Path::new("/proc").join(pid.trim()).join("root").join("run/nodes").join(node).join("run")
    }

    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.outside.image()
    }

    /// The parent of all control groups of the scene.
    #[must_use]
    pub fn cgroup(&self) -> String {
        format!("/{}", self.outside.0)
    }
}

/// What a scene has outside of the lab, under one name.
struct Outside(String);

impl Outside {
    fn claim(name: &str) -> Self {
        let maker = |path: &Path| path.file_stem()?.to_str()?.rsplit('-').next()?.parse::<u32>().ok();
        let is_dead =
            |path: &PathBuf| maker(path).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
        Self::all().into_iter().filter(is_dead).for_each(|path| remove(&path));
        Self(format!("flatwire-{name}"))
    }

    fn image(&self) -> PathBuf {
        std::env::temp_dir().join(format!("{}.tar", self.0))
    }

    /// Of every scene. Where there is one hierarchy for all (v2), the groups are on the first level.
    fn all() -> Vec<PathBuf> {
        let first = entries(Path::new(CGROUPS));
        let groups = first.iter().flat_map(|hierarchy| entries(hierarchy)).chain(first.iter().cloned());
        let of_a_scene =
            |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("flatwire-"));
        let images =
            entries(&std::env::temp_dir()).into_iter().filter(|path| path.extension().is_some_and(|e| e == "tar"));
        groups.chain(images).filter(of_a_scene).collect()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let ours = Self::all().into_iter().filter(|path| path.file_stem().is_some_and(|stem| *stem == *self.0));
        ours.for_each(|path| remove(&path));
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// A file, or a control group from the leaves up. One whose last process is only just ending refuses for a moment.
fn remove(path: &Path) {
    if path.is_file() {
        let _ = fs::remove_file(path);
        return;
    }
    entries(path).iter().filter(|below| below.is_dir()).for_each(|below| remove(below));
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(20));
            }
            _ => return,
        }
    }
}

/// containerd in a node. It ends with the lab if not before.
pub struct Containerd {
    node: String,
    log: PathBuf,
    process: Child,
    client: RuntimeServiceClient<Channel>,
    cgroup: String,
}

impl Containerd {
    /// Starts it and waits until it answers.
    ///
    /// # Panics
    ///
    /// If it does not start, with the end of its log.
    #[must_use]
    pub fn start(scene: &Scene, node: &str) -> Self {
        let run = scene.run_dir(node);
        fs::write(run.join("containerd.toml"), CONTAINERD_TOML).expect("the configuration is written");
        let socket = run.join(CONTAINERD.trim_start_matches("/run/"));
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("a path of a socket");
        let _entered = runtime().enter();
        let mut containerd = Self {
            node: node.to_owned(),
            log: run.join("containerd.log"),
            process: spawn(scene, node),
            client: RuntimeServiceClient::new(endpoint.timeout(CALL).connect_lazy()),
            cgroup: format!("{}/{node}", scene.cgroup()),
        };
        containerd.wait_until_it_answers();
        containerd.import(scene, &scene.image());
        containerd
    }

    /// An image from a file.
    ///
    /// # Panics
    ///
    /// If it is not taken.
    pub fn import(&self, scene: &Scene, image: &Path) {
        scene.run(&self.node, &["ctr", "-n", "k8s.io", "images", "import", &image.to_string_lossy()]);
    }

    /// Kills the daemon, and it alone: the shims that hold the containers go on.
    ///
    /// # Panics
    ///
    /// If it was not there.
    pub fn kill(&mut self, scene: &Scene) {
        scene.run(&self.node, &["sh", "-c", "kill -9 $(cat /run/containerd.pid)"]);
        let _ = self.process.wait();
    }

    /// # Panics
    ///
    /// As `start`.
    pub fn start_again(&mut self, scene: &Scene) {
        self.process = spawn(scene, &self.node);
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.conditions().is_empty() {
            let ended = self.process.try_wait().ok().flatten();
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(12).collect();
            assert!(ended.is_none(), "containerd ended ({ended:?}); its log, the last line first: {tail:#?}");
            assert!(Instant::now() < deadline, "containerd does not answer within 60 s: {tail:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What it says of itself, with a reason where something is not well; nothing if it does not answer.
    #[must_use]
    pub fn conditions(&self) -> Vec<(String, bool, String)> {
        let mut client = self.client.clone();
        let answer = runtime().block_on(client.status(cri::StatusRequest { verbose: false }));
        let status = answer.ok().and_then(|answer| answer.into_inner().status).unwrap_or_default();
        status.conditions.into_iter().map(|c| (c.r#type, c.status, c.message)).collect()
    }

    /// Whether it has a network for pods.
    #[must_use]
    pub fn has_network(&self) -> bool {
        self.conditions().iter().any(|(kind, holds, _)| kind == "NetworkReady" && *holds)
    }

    /// The version of the conflist that it has read.
    #[must_use]
    pub fn conflist_version(&self) -> Option<String> {
        let mut client = self.client.clone();
        let answer = runtime().block_on(client.status(cri::StatusRequest { verbose: true })).ok()?.into_inner();
        let info: Value = serde_json::from_str(answer.info.get("cniconfig")?).ok()?;
        // The first network is the loopback's.
        let networks = info["Networks"].as_array()?;
        Some(networks.get(1)?["Config"]["CNIVersion"].as_str()?.to_owned())
    }

    /// Runs a pod: its sandbox, with the network, and a container that serves.
    ///
    /// # Errors
    ///
    /// What the runtime says.
    pub fn run_pod(&self, pod: &Pod) -> Result<Running, String> {
        run_pod(self.client.clone(), &self.cgroup, pod)
    }

    /// As `run_pod`, on a thread of its own.
    #[must_use]
    pub fn run_in_background(&self, pod: Pod) -> JoinHandle<Result<Running, String>> {
        let (client, cgroup) = (self.client.clone(), self.cgroup.clone());
        std::thread::spawn(move || run_pod(client, &cgroup, &pod))
    }

    /// What the other side saw when the pod asked it, over UDP and TCP.
    ///
    /// # Errors
    ///
    /// What the container, or the runtime, says.
    pub fn ask(&self, from: &Running, whom: &str) -> Result<String, String> {
        let mut client = self.client.clone();
        let cmd = ["/peer", "ask", whom].map(str::to_owned).to_vec();
        let request = cri::ExecSyncRequest { container_id: from.container.clone(), cmd, timeout: 30 };
        let answer = runtime().block_on(client.exec_sync(request)).map_err(said)?.into_inner();
        match answer.exit_code {
            0 => Ok(String::from_utf8_lossy(&answer.stdout).into_owned()),
            code => Err(format!("ended with {code}: {}", String::from_utf8_lossy(&answer.stderr).trim())),
        }
    }

    /// Stops and removes the sandbox and what runs in it. A kubelet stops more than once, to be sure, and each is a DEL.
    ///
    /// # Errors
    ///
    /// What the runtime says.
    pub fn remove(&self, sandbox: &str) -> Result<(), String> {
        let mut client = self.client.clone();
        let pod_sandbox_id = sandbox.to_owned();
        runtime().block_on(async {
            for _ in 0..2 {
                let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
                client.stop_pod_sandbox(request).await.map_err(said)?;
            }
            client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await.map_err(said)?;
            Ok(())
        })
    }

    /// Every sandbox it knows, with the name of its pod.
    ///
    /// # Panics
    ///
    /// If it does not answer.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<(String, String)> {
        let mut client = self.client.clone();
        let answer = runtime().block_on(client.list_pod_sandbox(cri::ListPodSandboxRequest {}));
        let items = answer.unwrap_or_else(|status| panic!("{}", said(status))).into_inner().items;
        items.into_iter().map(|item| (item.id, item.metadata.unwrap_or_default().name)).collect()
    }
}

fn run_pod(mut client: RuntimeServiceClient<Channel>, cgroup: &str, pod: &Pod) -> Result<Running, String> {
    let config = pod.config(cgroup);
    runtime().block_on(async {
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()) };
        let sandbox = client.run_pod_sandbox(request).await.map_err(said)?.into_inner().pod_sandbox_id;
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone() };
        let status = client.pod_sandbox_status(request).await.map_err(said)?.into_inner().status;
        let address = status.and_then(|status| status.network).map(|network| network.ip).unwrap_or_default();
        let address = address.parse().map_err(|_| format!("the sandbox has the address {address:?}"))?;
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata { name: "serve".to_owned() }),
                image: Some(cri::ImageSpec { image: IMAGE.to_owned() }),
                args: vec!["serve".to_owned()],
            }),
            sandbox_config: Some(config),
        };
        let container = client.create_container(request).await.map_err(said)?.into_inner().container_id;
        let request = cri::StartContainerRequest { container_id: container.clone() };
        client.start_container(request).await.map_err(said)?;
        Ok(Running { sandbox, container, address })
    })
}

/// A pod to be run.
#[derive(Debug, Clone, Default)]
pub struct Pod {
    pub name: String,
    /// How often it was tried before.
    pub attempt: u32,
    /// Ports of the node that lead to the pod's own port, as `(protocol, port)`.
    pub host_ports: Vec<(cri::Protocol, i32)>,
}

/// The port at which a pod of the image serves.
const SERVES: i32 = 7777;

impl Pod {
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// As many, numbered.
    #[must_use]
    pub fn burst(name: &str, count: usize) -> Vec<Self> {
        (0..count).map(|number| Self::named(&format!("{name}-{number}"))).collect()
    }

    fn config(&self, cgroup: &str) -> cri::PodSandboxConfig {
        let mapping = |&(protocol, host_port): &(cri::Protocol, i32)| cri::PortMapping {
            protocol: protocol.into(),
            container_port: SERVES,
            host_port,
        };
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: self.name.clone(),
                uid: format!("uid-of-{}", self.name),
                namespace: "default".to_owned(),
                attempt: self.attempt,
            }),
            hostname: self.name.clone(),
            log_directory: String::new(),
            port_mappings: self.host_ports.iter().map(mapping).collect(),
            linux: Some(cri::LinuxPodSandboxConfig { cgroup_parent: cgroup.to_owned() }),
        }
    }
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Running {
    pub sandbox: String,
    pub container: String,
    pub address: Ipv4Addr,
}

/// A node has no room for files of containerd but in memory: overlays do not stack. The rest is what a machine without systemd
/// and without CAP_SYS_RESOURCE demands, and the folders are those of Kubernetes.
const CONTAINERD_TOML: &str = r#"version = 2
root = "/run/lib/containerd"
state = "/run/containerd"
[plugins."io.containerd.internal.v1.opt"]
  path = "/run/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/peer:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"#;

const PODMAN_CONF: &str = r#"[containers]
default_ulimits = []
oom_score_adj = 0
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "/run/libpod"
"#;

const PODMAN_STORAGE_CONF: &str = r#"[storage]
driver = "overlay"
graphroot = "/run/lib/podman"
runroot = "/run/podman"
"#;

fn spawn(scene: &Scene, node: &str) -> Child {
    let start = "echo $$ > /run/containerd.pid; exec containerd -c /run/containerd.toml >> /run/containerd.log 2>&1";
    Command::new(binary("lab"))
        .args(["exec", "--name", scene.lab.name(), node, "--", "sh", "-c", start])
        .stdin(Stdio::null())
        .spawn()
        .expect("the lab's program starts")
}

fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().expect("a runtime for the calls")
    })
}

fn said(status: tonic::Status) -> String {
    status.message().to_owned()
}
