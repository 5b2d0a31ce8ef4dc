//! The runtime's side: calls the built plugin as a runtime does and reads its answers with readers that are not ours.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rscni_types::types::{CNIResultWithVersion, ErrorResult};
use serde_json::{Map, Value, json};

use super::ipamd::Ipamd;
use super::node::Node;

pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A node with a daemon, and a runtime that keeps nothing to itself.
pub struct World {
    pub node: Node,
    pub ipamd: Ipamd,
    plugin: PathBuf,
}

impl World {
    pub fn new() -> Self {
        let plugin = flatwire_tests::binary("aws-cni");
        let node = Node::new();
        let ipamd = Ipamd::start(node.dir());
        Self { node, ipamd, plugin }
    }

    pub fn queue(&self) -> PathBuf {
        self.node.dir().join("releases")
    }

    /// The files in the release queue, decoded.
    pub fn queued(&self) -> Vec<Value> {
        let Ok(entries) = std::fs::read_dir(self.queue()) else { return Vec::new() };
        let paths = entries.map(|entry| entry.expect("an entry").path());
        paths.map(|path| serde_json::from_slice(&std::fs::read(path).expect("readable")).expect("JSON")).collect()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.node.dir().join("log/plugin.log")).unwrap_or_default()
    }

    pub fn conf(&self, version: &str) -> Value {
        let path = |name: &str| self.node.dir().join(name).to_str().expect("a text path").to_owned();
        json!({
            "cniVersion": version,
            "name": "aws-cni",
            "type": "aws-cni",
            "vethPrefix": "eni",
            "mtu": "9001",
            "pluginLogFile": path("log/plugin.log"),
            "pluginLogLevel": "DEBUG",
            "ipamdSocket": path("ipamd.sock"),
            "npaSocket": path("npa.sock"),
            "releaseQueueDir": path("releases"),
        })
    }

    /// A call with every variable set, for container `id` whose namespace is `netns`; the pod is `default/<id>`.
    pub fn call(&self, verb: &str, id: &str, netns: &Path) -> Call<'_> {
        let args = format!("K8S_POD_NAME={id};IgnoreUnknown=1;K8S_POD_UID=uid-{id};K8S_POD_NAMESPACE=default");
        let args = format!("{args};K8S_POD_INFRA_CONTAINER_ID={id}");
        let vars = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", id),
            ("CNI_NETNS", netns.to_str().expect("a text path")),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &args),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        let vars = vars.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Call { world: self, vars, conf: self.conf("1.1.0"), stdin: None }
    }

    /// A call without attachment: GC, STATUS, VERSION.
    pub fn plain(&self, verb: &str) -> Call<'_> {
        let mut call = self.call(verb, "none", Path::new("/none"));
        call.vars.retain(|name, _| name == "CNI_COMMAND" || name == "CNI_PATH");
        call
    }
}

/// One execution of the plugin, before it happens.
pub struct Call<'a> {
    world: &'a World,
    vars: BTreeMap<String, String>,
    conf: Value,
    stdin: Option<Vec<u8>>,
}

impl Call<'_> {
    pub fn version(self, version: &str) -> Self {
        self.key("cniVersion", json!(version))
    }

    pub fn key(mut self, key: &str, value: Value) -> Self {
        self.conf[key] = value;
        self
    }

    pub fn without_key(mut self, key: &str) -> Self {
        self.conf.as_object_mut().expect("an object").remove(key);
        self
    }

    pub fn var(mut self, name: &str, value: &str) -> Self {
        self.vars.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.vars.remove(name);
        self
    }

    pub fn prev_result(self, result: &Value) -> Self {
        let version = result["cniVersion"].as_str().expect("a version").to_owned();
        self.key("prevResult", result.clone()).version(&version)
    }

    pub fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = Some(bytes.to_owned());
        self
    }

    pub fn command(&self) -> Command {
        let mut command = self.world.node.command(&self.world.plugin);
        command.env_clear().envs(&self.vars).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(self) -> Outcome {
        self.start().wait()
    }

    pub fn start(self) -> Running {
        let started = Instant::now();
        let mut child = self.command().spawn().expect("nsenter starts");
        let bytes = self.stdin.unwrap_or_else(|| self.conf.to_string().into_bytes());
        // A plugin that has read enough may close its end.
        let _ = child.stdin.take().expect("a pipe").write_all(&bytes);
        Running { child, version: self.conf["cniVersion"].as_str().unwrap_or_default().to_owned(), started }
    }
}

/// One execution of the plugin, under way.
pub struct Running {
    child: Child,
    version: String,
    started: Instant,
}

impl Running {
    pub fn wait(self) -> Outcome {
        let output = self.child.wait_with_output().expect("the plugin ends");
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("text"),
            stderr: String::from_utf8(output.stderr).expect("text"),
            version: self.version,
            took: self.started.elapsed(),
        }
    }

    pub fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it has ended");
    }
}

/// What the plugin answered.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub version: String,
    pub took: Duration,
}

impl Outcome {
    /// The result of an ADD, after it has passed both readers.
    pub fn result(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert_eq!(self.stderr, "");
        let result: Value = serde_json::from_str(&self.stdout).expect("one JSON object");
        let version = result["cniVersion"].as_str().expect("a version");
        assert_eq!(version, self.version);
        if version < "0.3.0" {
            check_schema_0_2(&result);
        } else {
            check_schema(&result, version);
            let read: CNIResultWithVersion = serde_json::from_str(&self.stdout).expect("readable by another program");
            assert_eq!(read.cni_version().to_string(), version);
            assert!(read.result().ips.iter().all(|ip| ip.address.prefix_len() == ip.address.max_prefix_len()));
        }
        result
    }

    /// Success with nothing to say.
    pub fn silent(&self) {
        assert_eq!((self.code, self.stdout.as_str(), self.stderr.as_str()), (Some(0), "", ""), "{self:?}");
    }

    /// The error object, after it has passed both readers; its code must be this one.
    pub fn error(&self, code: u32) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.stderr, "", "{self:?}");
        let _: ErrorResult = serde_json::from_str(&self.stdout).expect("readable by another program");
        let object: Map<String, Value> = serde_json::from_str(&self.stdout).expect("one JSON object");
        for key in object.keys() {
            assert!(["cniVersion", "code", "msg", "details"].contains(&key.as_str()), "{key} in {self:?}");
        }
        let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        assert!(VERSIONS.contains(&text("cniVersion").as_str()), "{self:?}");
        assert!(!text("msg").is_empty() && !text("msg").contains('\n'), "{self:?}");
        assert!(!text("details").is_empty(), "an error says what to do: {self:?}");
        assert_eq!(object.get("code"), Some(&json!(code)), "{self:?}");
        text("msg")
    }
}

/// The shape of a result from 0.3.0 on, written down from section 5 and nothing else.
fn check_schema(result: &Value, version: &str) {
    only_keys(result, &["cniVersion", "interfaces", "ips", "routes", "dns"]);
    let interfaces = list(result, "interfaces");
    for interface in interfaces {
        only_keys(interface, &["name", "mac", "sandbox", "mtu"]);
        assert!(interface["name"].as_str().is_some_and(|name| !name.is_empty()), "{result}");
        assert!(version >= "1.1.0" || interface.get("mtu").is_none(), "mtu came with 1.1.0: {result}");
        assert!(interface.get("mtu").is_none_or(Value::is_u64), "{result}");
    }
    for ip in list(result, "ips") {
        only_keys(ip, &["interface", "address", "gateway", "version"]);
        let index = ip["interface"].as_u64().and_then(|at| usize::try_from(at).ok()).expect("an index");
        assert!(index < interfaces.len(), "{result}");
        assert!(ip["address"].as_str().is_some_and(|text| text.contains('/')), "{result}");
        // Removed by 1.0.0, required before.
        assert_eq!(ip.get("version").is_some(), version < "1.0.0", "{result}");
    }
    for route in list(result, "routes") {
        let newest: &[&str] = if version >= "1.1.0" { &["mtu", "advmss", "priority", "table", "scope"] } else { &[] };
        only_keys(route, &[&["dst", "gw"], newest].concat());
        assert!(route["dst"].as_str().is_some_and(|text| text.contains('/')), "{result}");
    }
}

/// The shape before 0.3.0: one address of each family.
fn check_schema_0_2(result: &Value) {
    only_keys(result, &["cniVersion", "ip4", "ip6", "dns"]);
    assert!(result.get("ip4").is_some() || result.get("ip6").is_some(), "{result}");
    for key in ["ip4", "ip6"] {
        if let Some(entry) = result.get(key) {
            only_keys(entry, &["ip", "gateway", "routes"]);
            assert!(entry["ip"].as_str().is_some_and(|text| text.contains('/')), "{result}");
            list(entry, "routes").iter().for_each(|route| only_keys(route, &["dst", "gw"]));
        }
    }
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).map(|list| list.as_array().expect("a list").as_slice()).unwrap_or_default()
}

fn only_keys(value: &Value, allowed: &[&str]) {
    for key in value.as_object().expect("an object").keys() {
        assert!(allowed.contains(&key.as_str()), "unexpected key {key} in {value}");
    }
}
