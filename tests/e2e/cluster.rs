//! Kubernetes on the lab: a control plane on a machine of the VPC, two nodes with containerd, kubelet and kube-proxy, and
//! kubectl.
//!
//! Every process runs on a node of the lab and ends with it. What a kubelet would set for the whole machine it sets in files
//! laid over /proc/sys on its node.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use flatwire_tests::runtimes::{Containerd, IMAGE, NODES, Scene};
use flatwire_tests::{binary, within};
use lab::fabric::{EC2_INSIDE, IMDS};
use serde_json::{Value, json};

/// The machine of the control plane: one of the VPC, which runs no pods.
pub const CONTROL: &str = "node-3";
/// Cluster addresses of Services, as EKS chooses them for a VPC of 10/8.
const SERVICES: &str = "172.20.0.0/16";
const SERVICES_FIRST: &str = "172.20.0.1";
const TOKEN: &str = "an-administrators";

pub struct Cluster {
    pub scene: Scene,
    pub containerds: Vec<Containerd>,
    /// Keys, configurations and logs.
    dir: tempfile::TempDir,
    programs: PathBuf,
    python: PathBuf,
    processes: Vec<Child>,
}

impl Cluster {
    /// Starts everything but Flatwire, and waits until both nodes are known to the API server.
    pub fn start(programs: &Path, python: &Path, peer: &Path) -> Self {
        let scene = Scene::bare("e2e", 3, peer);
        let dir = tempfile::tempdir().expect("a folder");
        let api = scene.address(CONTROL);
        let mut cluster = Self {
            scene,
            containerds: Vec::new(),
            dir,
            programs: programs.to_owned(),
            python: python.to_owned(),
            processes: Vec::new(),
        };
        cluster.make_keys(api);
        cluster.start_control_plane(api);
        let image = cluster.make_image();
        for node in NODES {
            let containerd = Containerd::start(&cluster.scene, node);
            containerd.import(&cluster.scene, &image);
            cluster.containerds.push(containerd);
            cluster.start_node(node);
        }
        within(60, "both nodes are known", || cluster.ready().len() == NODES.len());
        cluster
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn make_keys(&self, api: Ipv4Addr) {
        let names = format!("subjectAltName=IP:{api},IP:{SERVICES_FIRST},IP:127.0.0.1,DNS:kubernetes.default.svc");
        let script = r#"
            exec 2>openssl.log
            openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=ca
            openssl req -newkey rsa:2048 -nodes -keyout api.key -out api.csr -subj /CN=kube-apiserver
            echo "$1" >names
            openssl x509 -req -in api.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out api.crt
            openssl genrsa -out sa.key 2048
            openssl rsa -in sa.key -pubout -out sa.pub"#;
        let mut made = Command::new("bash");
        made.args(["-eu", "-c", script, "bash", &names]).current_dir(self.dir.path());
        assert!(made.status().is_ok_and(|status| status.success()), "openssl: {}", self.log("openssl"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "lab", "cluster": {
                "server": format!("https://{api}:6443"), "certificate-authority": self.path("ca.crt"),
            }}],
            "users": [{ "name": "admin", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": "admin" } }],
            "current-context": "lab",
        });
        self.write("kubeconfig", &config.to_string());
        self.write("tokens.csv", &format!("{TOKEN},admin,admin,system:masters\n"));
    }

    fn start_control_plane(&mut self, api: Ipv4Addr) {
        let (data, config) = (self.path("etcd"), format!("--kubeconfig={}", self.path("kubeconfig")));
        self.spawn(CONTROL, "etcd", "etcd", &[&format!("--data-dir={data}"), "--unsafe-no-fsync"]);
        let at = |flag: &str, file: &str| format!("--{flag}={}", self.path(file));
        let (range, advertised) =
            (format!("--service-cluster-ip-range={SERVICES}"), format!("--advertise-address={api}"));
        let (ca, crt, key) =
            (at("client-ca-file", "ca.crt"), at("tls-cert-file", "api.crt"), at("tls-private-key-file", "api.key"));
        let (tokens, verify) = (at("token-auth-file", "tokens.csv"), at("service-account-key-file", "sa.pub"));
        let (sign, root) = (at("service-account-signing-key-file", "sa.key"), at("root-ca-file", "ca.crt"));
        let private = at("service-account-private-key-file", "sa.key");
        let flags = [
            "--etcd-servers=http://127.0.0.1:2379",
            "--secure-port=6443",
            &range,
            &advertised,
            &ca,
            &crt,
            &key,
            &tokens,
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            &verify,
            &sign,
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
        ];
        self.spawn_kubernetes(CONTROL, "kube-apiserver", &flags);
        within(90, "the API server is ready", || self.kubectl(&["get", "--raw", "/readyz"]).is_ok());
        let flags = [
            &config,
            &private,
            &root,
            "--leader-elect=false",
            "--port=0",
            // 200 pods in one go are not to wait for the controller's own manners.
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ];
        self.spawn_kubernetes(CONTROL, "kube-controller-manager", &flags);
        let flags = [&config, "--leader-elect=false", "--port=0", "--kube-api-qps=200", "--kube-api-burst=400"];
        self.spawn_kubernetes(CONTROL, "kube-scheduler", &flags);
    }

    /// The image as `docs/install.md` makes it.
    fn make_image(&self) -> PathBuf {
        let image = self.dir.path().join("flatwire.tar");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image.py");
        let mut made = Command::new("python3");
        made.arg(script).arg(&image).arg("--programs").args(binary("ipamd").parent()).stdout(Stdio::null());
        assert!(made.status().is_ok_and(|status| status.success()), "deploy/image.py failed");
        image
    }

    fn start_node(&mut self, node: &str) {
        let cgroup = format!("{}/{node}", self.scene.cgroup());
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": cgroup,
            "enforceNodeAllocatable": [],
            "failSwapOn": false,
            // Where root lacks CAP_SYS_RESOURCE neither can be had.
            "oomScoreAdj": 0,
            "maxOpenFiles": 20000,
            "evictionHard": { "memory.available": "50Mi" },
            "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
            "authorization": { "mode": "AlwaysAllow" },
            "resolvConf": "",
            "syncFrequency": "5s",
            "kubeAPIQPS": 50,
            "kubeAPIBurst": 100,
        });
        self.write(&format!("kubelet-{node}.yaml"), &config.to_string());
        self.scene.run(node, &["bash", "-eu", "-c", PREPARE, "bash", &cgroup]);
        let socket = "unix:///run/containerd/containerd.sock";
        let flags = [
            &format!("--config={}", self.path(&format!("kubelet-{node}.yaml"))),
            &format!("--kubeconfig={}", self.path("kubeconfig")),
            "--container-runtime=remote",
            &format!("--container-runtime-endpoint={socket}"),
            &format!("--image-service-endpoint={socket}"),
            &format!("--hostname-override={node}"),
            &format!("--node-ip={}", self.scene.address(node)),
            &format!("--pod-infra-container-image={IMAGE}"),
        ];
        self.spawn_kubernetes(node, "kubelet", &flags);
        let config = format!("--kubeconfig={}", self.path("kubeconfig"));
        let name = format!("--hostname-override={node}");
        // The limits of connection tracking are the machine's.
        let flags = [
            config.as_str(),
            &name,
            "--proxy-mode=iptables",
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
        ];
        self.spawn_kubernetes(node, "kube-proxy", &flags);
    }

    fn spawn_kubernetes(&mut self, node: &str, program: &str, flags: &[&str]) {
        let path = self.programs.join(program);
        self.spawn(node, program, &path.to_string_lossy(), flags);
    }

    fn spawn(&mut self, node: &str, name: &str, program: &str, arguments: &[&str]) {
        let log = File::create(self.path(&format!("{name}-{node}.log"))).expect("a log");
        let child = Command::new(binary("lab"))
            .args(["exec", "--name", self.scene.lab.name(), node, "--", program])
            .args(arguments)
            // The cloud provider's credentials are none of the kubelet's business.
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn();
        self.processes.push(child.expect("the lab's program starts"));
    }

    /// What somebody at the keyboard needs. Makes the two programs that it names.
    pub fn welcome(&self) -> String {
        let lab = format!("{} exec --name {}", binary("lab").display(), self.scene.lab.name());
        let kubectl = format!(
            "#!/bin/sh\nexec {lab} {CONTROL} -- {}/kubectl --kubeconfig {} \"$@\"\n",
            self.programs.display(),
            self.path("kubeconfig")
        );
        let render = format!("#!/bin/sh\nexec {} {} \"$@\"\n", self.python.display(), render().display());
        for (name, script) in [("kubectl", kubectl), ("chart", render)] {
            self.write(name, &script);
            let executable = fs::Permissions::from_mode(0o755);
            fs::set_permissions(self.path(name), executable).expect("a program of the cluster");
        }
        format!(
            r#"
Kubernetes 1.20.2 without a CNI: {} and {} are not Ready. Flatwire's image is on both of them, as flatwire:{}, where the chart looks.
From here on docs/install.md leads, at its step 3; a role is not needed, and EC2 and IMDS are the lab's.

  kubectl            {}
  helm template      {} '{{"env": {}}}'
  a node's shell     {lab} {} -- bash

Ctrl-C ends it."#,
            NODES[0],
            NODES[1],
            env!("CARGO_PKG_VERSION"),
            self.path("kubectl"),
            self.path("chart"),
            lab_variables(),
            NODES[0],
        )
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).expect("a file of the cluster");
    }

    fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// kubectl beside the control plane, by an administrator.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        let (program, config) = (self.programs.join("kubectl"), self.path("kubeconfig"));
        let program = program.to_string_lossy();
        let command = [&[&*program, "--kubeconfig", &config], arguments].concat();
        let output = self.scene.lab.exec(CONTROL, &command).map_err(|error| lab::error::chain(&error))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        Err(format!("kubectl {}: {} {}", arguments.join(" "), text(&output.stdout), text(&output.stderr)))
    }

    /// As `kubectl`, for what has to work.
    pub fn must(&self, arguments: &[&str]) -> String {
        self.kubectl(arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.must(&[arguments, &["-o", "json"]].concat());
        serde_json::from_str(&text).expect("kubectl's JSON")
    }

    /// Applies a manifest, or an object.
    pub fn apply(&self, manifest: &impl ToString) {
        self.write("manifest.yaml", &manifest.to_string());
        self.must(&["apply", "-f", &self.path("manifest.yaml")]);
    }

    /// The chart, rendered with the lab's endpoints and these values.
    pub fn chart(&self, values: &Value) -> String {
        let mut values = values.clone();
        values["env"] = lab_variables();
        let output = Command::new(&self.python).arg(render()).arg(values.to_string()).output().expect("python starts");
        assert!(output.status.success(), "render.py: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Every node by name, with whether it is Ready and why not.
    pub fn ready(&self) -> Vec<(String, bool, String)> {
        let Ok(text) = self.kubectl(&["get", "nodes", "-o", "json"]) else { return Vec::new() };
        let list: Value = serde_json::from_str(&text).unwrap_or_default();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let one = |node: &Value| {
            let conditions = node["status"]["conditions"].as_array()?;
            let ready = conditions.iter().find(|condition| condition["type"] == "Ready")?;
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            Some((text(&node["metadata"]["name"]), ready["status"] == "True", text(&ready["message"])))
        };
        items.iter().filter_map(one).collect()
    }

    pub fn is_ready(&self, node: &str) -> bool {
        self.ready().iter().any(|(name, ready, _)| name == node && *ready)
    }

    /// A condition of a node.
    pub fn condition(&self, node: &str, kind: &str) -> Value {
        let node = self.json(&["get", "node", node]);
        let mut conditions = node["status"]["conditions"].as_array().into_iter().flatten();
        conditions.find(|one| one["type"] == kind).cloned().unwrap_or_default()
    }

    /// Of every object and namespace.
    pub fn events(&self) -> Vec<Value> {
        self.json(&["get", "events", "-A"])["items"].as_array().cloned().unwrap_or_default()
    }

    /// The pods of a Deployment that are Ready and not about to end.
    pub fn pods(&self, app: &str) -> Vec<Pod> {
        let Ok(text) = self.kubectl(&["get", "pods", "-l", &format!("app={app}"), "-o", "json"]) else {
            return Vec::new();
        };
        let list: Value = serde_json::from_str(&text).unwrap_or_default();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let one = |pod: &Value| {
            let conditions = pod["status"]["conditions"].as_array()?;
            let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
            if !ready || !pod["metadata"]["deletionTimestamp"].is_null() {
                return None;
            }
            let text = |value: &Value| value.as_str().map(str::to_owned);
            Some(Pod {
                name: text(&pod["metadata"]["name"])?,
                node: text(&pod["spec"]["nodeName"])?,
                address: pod["status"]["podIP"].as_str()?.parse().ok()?,
            })
        };
        items.iter().filter_map(one).collect()
    }

    /// Waits until as many pods of a Deployment are Ready, and there is no other.
    pub fn settle(&self, app: &str, count: usize, secs: u64) -> Vec<Pod> {
        let all = || self.must(&["get", "pods", "-l", &format!("app={app}"), "-o", "name"]).lines().count();
        within(secs, &format!("{count} pods of {app} are Ready, and no other"), || {
            self.pods(app).len() == count && all() == count
        });
        self.pods(app)
    }

    /// What the other side saw when a pod asked it.
    pub fn ask(&self, from: &Pod, whom: &str) -> Result<String, String> {
        self.kubectl(&["exec", &from.name, "--", "/peer", "ask", whom])
    }

    /// What stands here when a step has failed.
    pub fn last_words(&self) -> String {
        let objects = self.kubectl(&["get", "nodes,pods,daemonsets,deployments", "-A", "-o", "wide"]);
        let events = self.kubectl(&["get", "events", "-A", "--sort-by=.lastTimestamp"]).unwrap_or_default();
        let events: Vec<&str> = events.lines().collect();
        let mut said = vec![objects.unwrap_or_else(|error| error)];
        said.push(events[events.len().saturating_sub(20)..].join("\n"));
        for node in NODES {
            said.push(format!("kubelet of {node}:\n{}", self.log(&format!("kubelet-{node}"))));
        }
        said.join("\n\n")
    }

    /// The addresses of pods, each of which has its own.
    pub fn distinct(pods: &[Pod]) -> BTreeSet<Ipv4Addr> {
        let addresses: BTreeSet<Ipv4Addr> = pods.iter().map(|pod| pod.address).collect();
        assert_eq!(addresses.len(), pods.len(), "an address twice: {pods:?}");
        addresses
    }
}

/// What the daemon has to be told on the lab and nowhere else, prefixes, and pods with their addresses.
fn lab_variables() -> Value {
    json!({
        "AWS_EC2_ENDPOINT": format!("http://{EC2_INSIDE}"),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": format!("http://{IMDS}"),
        "ENABLE_PREFIX_DELEGATION": "true",
        "ANNOTATE_POD_IP": "true",
    })
}

fn render() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/render.py")
}

/// A pod that is Ready.
#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub node: String,
    pub address: Ipv4Addr,
}

/// On a node, before its kubelet: files in the place of settings of the whole machine, and its control groups. A cpuset without
/// processors takes no process.
const PREPARE: &str = r#"
    mkdir -p /run/sysctls
    for key in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
      file=/run/sysctls/${key//\//.}
      cat /proc/sys/$key >$file
      mount --bind $file /proc/sys/$key
    done
    for hierarchy in /sys/fs/cgroup/*/; do
      [ -e $hierarchy/cgroup.procs ] || continue
      mkdir -p $hierarchy$1
      for key in cpus mems; do
        [ ! -e $hierarchy/cpuset.$key ] || for group in ${1%/*} $1; do cat $hierarchy/cpuset.$key >$hierarchy$group/cpuset.$key; done
      done
    done
"#;
