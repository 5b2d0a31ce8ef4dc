//! A container runtime of the smallest kind: sandboxes that are network namespaces, wired by CNI plugins as containerd
//! would call them. No processes run in a pod; its reflector answers for it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flatwire_kernel::Netlink;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::ctl::PodInfo;
use crate::error::{Doing, Error, Result};
use crate::node::Node;
use crate::ns::Place;
use crate::probe::Reflector;

pub(crate) const CONFLIST: &str = "/etc/cni/net.d/10-aws.conflist";
/// Where plugins are: the node's own, and those of the machine's distribution.
pub(crate) const BIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];
const IF_NAME: &str = "eth0";
const NAMESPACE: &str = "default";

/// The kubelet gives up on a sandbox after two minutes; so does this.
const PLUGIN_SECS: u64 = 120;

/// The sandboxes of one node.
#[derive(Debug, Default)]
pub struct Pods {
    all: Mutex<BTreeMap<String, Pod>>,
}

#[derive(Debug)]
struct Pod {
    id: String,
    place: Place,
    path: PathBuf,
    capabilities: Capabilities,
    result: Value,
    info: PodInfo,
    _reflector: Reflector,
}

/// What plugins that declare a capability are told of the pod, by its name.
pub type Capabilities = BTreeMap<String, Value>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Check,
    Del,
    Version,
}

impl Verb {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Version => "VERSION",
        }
    }
}

impl Pods {
    pub fn list(&self) -> Vec<PodInfo> {
        self.lock().values().map(|pod| pod.info.clone()).collect()
    }

    pub fn find(&self, name: &str) -> Option<(Place, Vec<IpAddr>)> {
        self.lock().get(name).map(|pod| (pod.place.clone(), pod.info.addresses.clone()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Pod>> {
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Creates a sandbox on the node and has the node's plugins wire it.
pub async fn add(node: &Node, name: &str, capabilities: Capabilities) -> Result<PodInfo> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(Error::refused(format!("{name:?} is no name for a pod")));
    }
    if node.pods.find(name).is_some() {
        return Err(Error::refused(format!("{} has a pod {name} already", node.name)));
    }
    let id = sandbox_id(&node.name, name);
    let path = PathBuf::from(format!("/var/run/netns/cni-{}", id.get(..12).unwrap_or(&id)));
    let place = node.place().new_at(&path)?;
    Netlink::in_namespace(&place.netns()?)?.set_up("lo").await?;

    let attachment = Attachment { pod: name, id: &id, netns: &path, capabilities: &capabilities };
    let start = Instant::now();
    let added = chain(node, Verb::Add, &attachment, None).await;
    let took = start.elapsed();
    let wired = added.and_then(|result| Ok((addresses_of(&result)?, result)));
    let ((address, addresses), result) = match wired {
        Ok(wired) => wired,
        Err(error) => {
            // As a runtime does after a failed ADD. The first error is the one to tell.
            let _ = chain(node, Verb::Del, &attachment, None).await;
            let _ = node.place().unmount(&path);
            return Err(error);
        }
    };
    let reflector = Reflector::start(&place)?;
    let info = PodInfo {
        node: node.name.clone(),
        name: name.to_owned(),
        address,
        addresses,
        netns: path.display().to_string(),
        add_ms: took.as_secs_f64() * 1e3,
    };
    let pod = Pod { id, place, path, capabilities, result, info: info.clone(), _reflector: reflector };
    node.pods.lock().insert(name.to_owned(), pod);
    Ok(info)
}

/// Has every plugin look whether the sandbox is as it made it.
pub async fn check(node: &Node, name: &str) -> Result<()> {
    let (id, path, capabilities, result) = {
        let pods = node.pods.lock();
        let pod = pods.get(name).ok_or_else(|| Error::refused(format!("{} has no pod {name}", node.name)))?;
        (pod.id.clone(), pod.path.clone(), pod.capabilities.clone(), pod.result.clone())
    };
    let attachment = Attachment { pod: name, id: &id, netns: &path, capabilities: &capabilities };
    chain(node, Verb::Check, &attachment, Some(&result)).await.map(drop)
}

/// Has the plugins let go of the sandbox, then removes it. Returns how long the plugins took, in milliseconds.
pub async fn del(node: &Node, name: &str) -> Result<f64> {
    let pod = node.pods.lock().remove(name);
    let pod = pod.ok_or_else(|| Error::refused(format!("{} has no pod {name}", node.name)))?;
    let start = Instant::now();
    let attachment = Attachment { pod: name, id: &pod.id, netns: &pod.path, capabilities: &pod.capabilities };
    let deleted = chain(node, Verb::Del, &attachment, Some(&pod.result)).await;
    let took = start.elapsed();
    if let Err(error) = deleted {
        node.pods.lock().insert(name.to_owned(), pod);
        return Err(error);
    }
    let path = pod.path.clone();
    // The reflector's sockets hold the namespace too.
    drop(pod);
    node.place().unmount(&path)?;
    Ok(took.as_secs_f64() * 1e3)
}

/// 64 hex digits, as containerd's ids are; a name used again gets another one.
fn sandbox_id(node: &str, name: &str) -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    hex::encode(Sha256::digest(format!("{node}/{name}/{count}")))
}

/// The sandbox that a chain is run for.
struct Attachment<'a> {
    pod: &'a str,
    id: &'a str,
    netns: &'a Path,
    capabilities: &'a Capabilities,
}

/// Runs the plugins of the node's configuration: in reverse for DEL, in order otherwise.
async fn chain(node: &Node, verb: Verb, attachment: &Attachment<'_>, last: Option<&Value>) -> Result<Value> {
    let text = node.place().run(|| std::fs::read_to_string(CONFLIST))?.doing(|| format!("read {CONFLIST}"))?;
    let conflist: Value = serde_json::from_str(&text).doing(|| CONFLIST.into())?;
    let plugins = conflist["plugins"].as_array().cloned().unwrap_or_default();
    let mut result = last.cloned();
    let ordered: Vec<Value> = match verb {
        Verb::Del => plugins.into_iter().rev().collect(),
        Verb::Add | Verb::Check | Verb::Version => plugins,
    };
    for mut config in ordered {
        config["cniVersion"] = conflist["cniVersion"].clone();
        config["name"] = conflist["name"].clone();
        if let Some(result) = &result {
            config["prevResult"] = result.clone();
        }
        let annotations = ("io.kubernetes.cri.pod-annotations".to_owned(), json!({}));
        let told: serde_json::Map<String, Value> = (attachment.capabilities.clone().into_iter().chain([annotations]))
            .filter(|(capability, _)| config["capabilities"][capability] == json!(true))
            .collect();
        if !told.is_empty() {
            config["runtimeConfig"] = Value::Object(told);
        }
        let made = call(node, verb, attachment, &config).await?;
        if verb == Verb::Add {
            result = Some(made);
        }
    }
    Ok(result.unwrap_or(Value::Null))
}

async fn call(node: &Node, verb: Verb, attachment: &Attachment<'_>, config: &Value) -> Result<Value> {
    let Attachment { pod, id, netns, .. } = attachment;
    let kind = config["type"].as_str().unwrap_or_default().to_owned();
    let failed =
        |code, message: String| Error::Cni { verb: verb.name(), pod: format!("{}/{pod}", node.name), code, message };
    let mut child = node
        .place()
        .run_in_runtime(|| {
            Command::from(plugin(&BIN_DIRS.map(Path::new), &kind, verb, pod, id, netns))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
        })?
        .doing(|| format!("start the plugin {kind}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that ends without reading has its say on standard output.
        let _ = stdin.write_all(config.to_string().as_bytes()).await;
    }
    let output = tokio::time::timeout(Duration::from_secs(PLUGIN_SECS), child.wait_with_output())
        .await
        .map_err(|_| Error::Deadline { what: format!("{} by {kind}", verb.name()), seconds: PLUGIN_SECS })?
        .doing(|| format!("wait for the plugin {kind}"))?;
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    if output.status.success() {
        return Ok(said);
    }
    let text = |key: &str| said[key].as_str().unwrap_or_default().to_owned();
    let message = match (text("msg"), text("details")) {
        (msg, _) if msg.is_empty() => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        (msg, details) if details.is_empty() => msg,
        (msg, details) => format!("{msg}; {details}"),
    };
    Err(failed(said["code"].as_i64().unwrap_or(-1), message))
}

/// The call of one plugin as containerd makes it; the configuration is to come by standard input.
pub(crate) fn plugin(
    bin_dirs: &[&Path],
    kind: &str,
    verb: Verb,
    pod: &str,
    id: &str,
    netns: &Path,
) -> std::process::Command {
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={pod};K8S_POD_INFRA_CONTAINER_ID={id};\
         K8S_POD_UID={}",
        uid(id)
    );
    let places: Vec<PathBuf> = bin_dirs.iter().map(|dir| dir.join(kind)).collect();
    let program = places.iter().find(|place| place.is_file()).or(places.first()).cloned().unwrap_or_default();
    let mut command = std::process::Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("CNI_COMMAND", verb.name())
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", IF_NAME)
        .env("CNI_PATH", std::env::join_paths(bin_dirs).unwrap_or_default())
        .env("CNI_ARGS", args);
    command
}

fn uid(id: &str) -> String {
    let part = |range: std::ops::Range<usize>| id.get(range).unwrap_or_default().to_owned();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

/// The pod's first address, and all there are.
fn addresses_of(result: &Value) -> Result<(IpAddr, Vec<IpAddr>)> {
    let texts = result["ips"].as_array().into_iter().flatten().map(|ip| ip["address"].as_str().unwrap_or_default());
    let parsed = texts.map(|text| text.split('/').next().unwrap_or_default().parse().ok());
    match parsed.collect::<Option<Vec<IpAddr>>>() {
        Some(addresses) if !addresses.is_empty() => Ok((addresses[0], addresses)),
        _ => Err(Error::refused(format!("the plugin's result carries no address, or none that is one: {result}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_addresses_are_those_of_the_result() {
        let result =
            json!({ "ips": [{ "interface": 1, "address": "10.0.17.25/32" }, { "address": "2001:db8::7/128" }] });
        let (first, all) = addresses_of(&result).unwrap();
        assert_eq!(first, IpAddr::from([10, 0, 17, 25]));
        assert_eq!(all, [first, "2001:db8::7".parse().unwrap()]);
        assert!(addresses_of(&json!({})).is_err());
        assert!(addresses_of(&json!({ "ips": [{ "address": "nowhere/32" }] })).is_err());
    }

    #[test]
    fn ids_look_like_containerds() {
        let (a, b) = (sandbox_id("n", "p"), sandbox_id("n", "p"));
        assert_eq!(a.len(), 64);
        assert_ne!(a, b);
        assert_eq!(uid(&a).len(), 36);
    }
}
