//! `make e2e`: Flatwire in a Kubernetes cluster on the lab, from the chart to its removal, each step judged and timed.
//! `make cluster`: the same cluster without Flatwire, to put it there by hand.

#![allow(clippy::unwrap_used, reason = "what fails is a failed step")]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flatwire_tests::runtimes::{CONFLIST, NODES, obstacle};
use flatwire_tests::within;
use lab::ctl::{Called, Request};
use lab::fabric::EC2_INSIDE;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use cluster::{CONTROL, Cluster, Pod};

mod cluster;

/// Where pods serve.
const PORT: u16 = 7777;
const SYSTEM: [&str; 2] = ["-n", "kube-system"];

type Step = fn(&mut Cluster) -> String;

const STEPS: [(&str, Step); 10] = [
    ("a node is Ready once an address can be served, and not before", ready_when_served),
    ("the plain manifest is accepted as it is", plain_manifest),
    ("a Deployment over both nodes is Ready", deployment),
    ("pods of both nodes talk, TCP and UDP, each under its own address", traffic),
    ("a Service by its cluster address and by its node port", service),
    ("a pod without an address says why, and its node is told apart; settings of the node hold", shortage),
    ("0 to many pods and back to 0; the audit is clean, nothing stays", scale),
    ("a node is drained; its pods go to the other", drain),
    ("the DaemonSet is rolled while pods come and go", roll),
    ("uninstalled: no file, rule or table of ours on a node", uninstall),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (what, programs, python) = match &arguments[..] {
        [what, programs, python] if ["judge", "stay"].contains(&what.as_str()) => (what, programs, python),
        _ => {
            eprintln!("usage: e2e judge|stay FOLDER-OF-KUBERNETES PYTHON (tests/e2e/run.sh finds both)");
            return ExitCode::from(2);
        }
    };
    if let Some(reason) = obstacle() {
        eprintln!("e2e: containers cannot be run here: {reason}");
        return ExitCode::from(2);
    }
    let peer = std::env::current_exe().unwrap().with_file_name("peer");
    let start = || Cluster::start(Path::new(programs), Path::new(python), &peer);
    if what == "judge" { judge(start) } else { stay(start) }
}

/// A cluster for somebody at the keyboard.
fn stay(start: impl FnOnce() -> Cluster) -> ExitCode {
    println!("cluster: starting a control plane and two nodes; some twenty seconds");
    let cluster = start();
    println!("{}", cluster.welcome());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).unwrap();
        tokio::select! {
            _ = tokio::signal::ctrl_c() => (),
            _ = terminate.recv() => (),
        }
    });
    println!("cluster: ends, and leaves nothing");
    ExitCode::SUCCESS
}

fn judge(start: impl Fn() -> Cluster) -> ExitCode {
    let started = Instant::now();
    let (mut passed, mut cluster) = (0, None);
    // What a step says as it fails belongs into its row.
    static SAID: Mutex<String> = Mutex::new(String::new());
    std::panic::set_hook(Box::new(|panic| {
        let mut said = SAID.lock().unwrap();
        *said = format!("{said} {panic}").replace('\n', " ");
    }));
    let mut judge = |name: &str, step: &mut dyn FnMut() -> String| {
        let from = Instant::now();
        SAID.lock().unwrap().clear();
        let done = catch_unwind(AssertUnwindSafe(step));
        let (verdict, said) = match &done {
            Ok(said) => ("PASS", said.clone()),
            Err(_) => ("FAIL", SAID.lock().unwrap().clone()),
        };
        println!(
            "{verdict}  {:>4} s  {name}{}{said}",
            from.elapsed().as_secs(),
            if said.is_empty() { "" } else { ": " }
        );
        passed += usize::from(done.is_ok());
        done.is_ok()
    };
    let up = judge("a control plane and two nodes on the lab", &mut || {
        cluster = Some(start());
        "Kubernetes 1.20.2, containerd, kube-proxy in iptables mode".to_owned()
    });
    if let (true, Some(cluster)) = (up, &mut cluster) {
        for (name, step) in STEPS {
            if !judge(name, &mut || step(cluster)) {
                println!("{}", cluster.last_words());
                break;
            }
        }
    }
    drop(cluster);
    let steps = STEPS.len() + 1;
    println!("e2e: passed={passed}/{steps} secs={}", started.elapsed().as_secs());
    if passed == steps { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// On one node EC2 cannot be reached at first: the daemon runs there, and has no address to give.
fn ready_when_served(cluster: &mut Cluster) -> String {
    let [one, two] = NODES;
    let bare = cluster.ready();
    assert!(bare.iter().all(|(_, ready, why)| !ready && why.contains("cni")), "without Flatwire: {bare:?}");
    let ec2 = format!("{EC2_INSIDE}/32");
    cluster.scene.run(two, &["ip", "route", "add", "unreachable", &ec2]);
    cluster.apply(&include_str!("../../deploy/chart/crds/eniconfig.yaml"));
    cluster.apply(&cluster.chart(&json!({})));
    let from = Instant::now();
    within(120, "the node that can serve is Ready", || cluster.is_ready(one));
    let took = from.elapsed();
    within(60, "the daemon runs on the other, too", || daemons(cluster) == 2);
    assert!(!cluster.is_ready(two), "{two} is Ready and has no address to give");
    assert!(!cluster.scene.is_there(two, CONFLIST), "there is a conflist on {two}");
    cluster.scene.run(two, &["ip", "route", "del", "unreachable", &ec2]);
    within(120, "the other is Ready once EC2 answers", || cluster.is_ready(two));
    for node in NODES {
        assert!(cluster.scene.is_there(node, CONFLIST));
    }
    format!("{:.1} s after the chart was applied; the other only when EC2 answered it", took.as_secs_f64())
}

/// Pods of the DaemonSet whose daemon runs.
fn daemons(cluster: &Cluster) -> usize {
    let list = cluster.json(&[&SYSTEM[..], &["get", "pods", "-l", "k8s-app=aws-node"]].concat());
    let running = |pod: &&Value| !pod["status"]["containerStatuses"][0]["state"]["running"].is_null();
    list["items"].as_array().unwrap().iter().filter(running).count()
}

fn plain_manifest(cluster: &mut Cluster) -> String {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/flatwire.yaml");
    let said = cluster.must(&["apply", "--dry-run=server", "-f", &manifest.to_string_lossy()]);
    format!("{} objects", said.lines().count())
}

/// `millicores` of the processor are its own.
fn web(app: &str, replicas: usize, millicores: u32) -> Value {
    let labels = json!({ "app": app });
    let spread = json!([{
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": { "matchLabels": labels },
    }]);
    let container = json!({
        "name": "serve",
        "image": flatwire_tests::runtimes::IMAGE,
        "imagePullPolicy": "Never",
        "args": ["serve"],
        "resources": { "requests": { "cpu": format!("{millicores}m") } },
        "readinessProbe": { "tcpSocket": { "port": PORT }, "periodSeconds": 5 },
    });
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": { "name": app },
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "containers": [container],
                    "topologySpreadConstraints": spread,
                    "terminationGracePeriodSeconds": 1,
                    "automountServiceAccountToken": false,
                },
            },
        },
    })
}

fn scale_to(cluster: &Cluster, count: usize) {
    cluster.must(&["scale", "deployment/web", &format!("--replicas={count}")]);
}

fn deployment(cluster: &mut Cluster) -> String {
    cluster.apply(&web("web", 6, 1));
    let pods = cluster.settle("web", 6, 120);
    Cluster::distinct(&pods);
    let of = |node: &str| pods.iter().filter(|pod| pod.node == node).count();
    assert!(NODES.iter().all(|node| of(node) > 0), "{pods:?}");
    format!("{} on {}, {} on {}", of(NODES[0]), NODES[0], of(NODES[1]), NODES[1])
}

fn saw(who: Ipv4Addr) -> String {
    format!("udp {who}\ntcp {who}")
}

fn traffic(cluster: &mut Cluster) -> String {
    let pods = cluster.pods("web");
    let (mut asked, mut across) = (0, 0);
    for from in &pods {
        for to in pods.iter().filter(|to| to.name != from.name) {
            assert_eq!(cluster.ask(from, &to.address.to_string()), Ok(saw(from.address)), "{from:?} asks {to:?}");
            asked += 1;
            across += usize::from(from.node != to.node);
        }
    }
    format!("{asked} pairs, {across} of them across the nodes")
}

fn service(cluster: &mut Cluster) -> String {
    let port =
        |name: &str, protocol: &str| json!({ "name": name, "protocol": protocol, "port": 80, "targetPort": PORT });
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "web" },
        "spec": { "type": "NodePort", "selector": { "app": "web" }, "ports": [port("udp", "UDP"), port("tcp", "TCP")] },
    });
    cluster.apply(&service.to_string());
    let made = cluster.json(&["get", "service", "web"]);
    let address: Ipv4Addr = made["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
    let ports: Vec<u16> = made["spec"]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| port["nodePort"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap())
        .collect();
    for pod in cluster.pods("web") {
        // Whichever pod answers, itself too: by a translated address where it would see itself.
        within(30, "the Service answers a pod", || cluster.ask(&pod, &format!("{address}:80")).is_ok());
    }
    for node in NODES {
        let node = cluster.scene.address(node);
        let whom: Vec<SocketAddr> = ports.iter().map(|port| SocketAddr::new(node.into(), *port)).collect();
        within(30, "the node port answers a machine of the VPC", || {
            let called = cluster.scene.lab.call(CONTROL, &whom).unwrap();
            called[0].udp.is_some() && called[1].tcp.is_some()
        });
    }
    format!("{address}:80 from every pod, ports {ports:?} of both nodes")
}

/// Two nodes take 110 pods each, less those of the DaemonSet and some for what is being replaced. `PODS` says fewer.
/// One node is told to leave EC2 alone, and gets more pods than it has addresses.
fn shortage(cluster: &mut Cluster) -> String {
    const TOO_MANY: u64 = 3;
    let node = NODES[1];
    cluster.must(&["annotate", "node", node, "flatwire.io/level=no-cloud", "flatwire.io/warm-ip-target=many"]);
    let refused = |event: &Value| event["reason"] == "InvalidSetting" && event["involvedObject"]["name"] == node;
    within(60, "an event names the setting that is not allowed", || cluster.events().iter().any(refused));
    let status = || cluster.scene.status(node);
    within(60, "the level is followed", || status()["node_state"]["level"] == "no-cloud");
    let counts = &status()["counts"];
    let free = counts["total"].as_u64().unwrap() - counts["assigned"].as_u64().unwrap();
    let count = usize::try_from(free + TOO_MANY).unwrap();
    let mut many = web("many", count, 0);
    many["spec"]["template"]["spec"]["nodeSelector"] = json!({ "kubernetes.io/hostname": node });
    cluster.apply(&many);
    let why = |event: &Value| {
        let of_one = event["involvedObject"]["name"].as_str().is_some_and(|name| name.starts_with("many-"));
        of_one && event["reason"] == "ProvisioningDisabled" && event["reportingComponent"] == "flatwire.io/ipamd"
    };
    within(120, "every pod without an address has an event", || {
        cluster.events().iter().filter(|event| why(event)).count() >= usize::try_from(TOO_MANY).unwrap()
    });
    let pressure = || cluster.condition(node, "PodAddressPressure");
    within(120, "the node says so", || pressure()["status"] == "True");
    assert_eq!(pressure()["reason"], "ProvisioningDisabled");
    assert_eq!(cluster.condition(NODES[0], "PodAddressPressure")["status"], "False");
    let one = &cluster.pods("many")[0];
    let noted = cluster.json(&["get", "pod", &one.name]);
    assert_eq!(noted["metadata"]["annotations"]["vpc.amazonaws.com/pod-ips"], one.address.to_string());
    cluster.must(&["annotate", "node", node, "flatwire.io/level-", "flatwire.io/warm-ip-target-"]);
    cluster.settle("many", count, 120);
    cluster.must(&["delete", "deployment", "many"]);
    cluster.settle("many", 0, 120);
    let room = cluster.json(&["get", "node", node])["status"]["allocatable"]["flatwire.io/pod-addresses"].clone();
    format!("{TOO_MANY} of {count} pods waited; {node} says it has {} addresses", room.as_str().unwrap())
}

fn scale(cluster: &mut Cluster) -> String {
    let many =
        std::env::var("PODS").map_or(200, |text| text.parse().unwrap_or_else(|_| panic!("PODS={text}: not a number")));
    scale_to(cluster, 0);
    cluster.settle("web", 0, 120);
    let from = Instant::now();
    scale_to(cluster, many);
    let pods = cluster.settle("web", many, 900);
    let up = from.elapsed().as_secs();
    let addresses = Cluster::distinct(&pods);
    let whom: Vec<SocketAddr> = addresses.iter().map(|address| SocketAddr::new((*address).into(), PORT)).collect();
    let called = cluster.scene.lab.call(CONTROL, &whom).unwrap();
    let silent = called.iter().filter(|called| called.tcp.is_none() || called.udp.is_none()).count();
    assert_eq!(silent, 0, "so many pods do not answer");
    for node in NODES {
        let (clean, said) = cluster.scene.ipamd(node, &["audit"]);
        assert!(clean, "{node} with its pods: {said}");
    }
    let from = Instant::now();
    scale_to(cluster, 0);
    cluster.settle("web", 0, 900);
    let down = from.elapsed().as_secs();
    cluster.scene.nothing_is_left(&addresses);
    format!("{many} Ready after {up} s, every one answered; gone after {down} s")
}

fn drain(cluster: &mut Cluster) -> String {
    scale_to(cluster, 8);
    let before = cluster.settle("web", 8, 120);
    let [one, two] = NODES;
    let drained = ["drain", two, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"];
    cluster.must(&drained);
    let after = cluster.settle("web", 8, 120);
    assert!(after.iter().all(|pod| pod.node == one), "{after:?}");
    let gone: BTreeSet<Ipv4Addr> = before.iter().filter(|pod| pod.node == two).map(|pod| pod.address).collect();
    cluster.scene.nothing_is_left_on(two, &gone);
    cluster.must(&["uncordon", two]);
    Cluster::distinct(&after);
    format!("{} pods moved", gone.len())
}

/// A pod that nobody touches is asked all the time, a Deployment grows and shrinks, and both daemons are replaced.
fn roll(cluster: &mut Cluster) -> String {
    cluster.apply(&web("steady", 2, 200));
    let steady = cluster.settle("steady", 2, 60);
    let before = cluster.json(&[&SYSTEM[..], &["get", "pods", "-l", "k8s-app=aws-node"]].concat());
    let done = AtomicBool::new(false);
    let whom: Vec<SocketAddr> = steady.iter().map(|pod| SocketAddr::new(pod.address.into(), PORT)).collect();
    let mut control = cluster.scene.lab.connect().unwrap();
    let ((asked, worst), turns) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let (mut asked, mut answered, mut worst) = (0, Instant::now(), Duration::ZERO);
            while !done.load(Ordering::Relaxed) {
                let request = Request::Call { from: CONTROL.to_owned(), to: whom.clone() };
                let called: Vec<Called> = control.ask(&request).unwrap();
                worst = worst.max(answered.elapsed());
                if called.iter().all(|called| called.tcp.is_some() && called.udp.is_some()) {
                    answered = Instant::now();
                }
                asked += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            (asked, worst)
        });
        let churning = scope.spawn(|| {
            let mut turns = 0;
            while !done.load(Ordering::Relaxed) {
                scale_to(cluster, if turns % 2 == 0 { 24 } else { 8 });
                turns += 1;
                std::thread::sleep(Duration::from_secs(3));
            }
            turns
        });
        let rolled = catch_unwind(AssertUnwindSafe(|| {
            cluster.must(&[&SYSTEM[..], &["rollout", "restart", "daemonset/aws-node"]].concat());
            cluster.must(&[&SYSTEM[..], &["rollout", "status", "daemonset/aws-node", "--timeout=180s"]].concat());
        }));
        done.store(true, Ordering::Relaxed);
        let counted =
            (asking.join().expect("the steady pods answer"), churning.join().expect("the Deployment is scaled"));
        assert!(rolled.is_ok(), "the DaemonSet is not rolled within 180 s");
        counted
    });
    // Two processors carry two nodes here: an answer may be slow, and a pod that is cut off does not answer at all.
    assert!(worst < Duration::from_secs(3), "pods that nobody touched did not answer for {worst:?}");
    let after = cluster.json(&[&SYSTEM[..], &["get", "pods", "-l", "k8s-app=aws-node"]].concat());
    let names = |list: &serde_json::Value| -> BTreeSet<String> {
        list["items"].as_array().unwrap().iter().map(|pod| pod["metadata"]["name"].to_string()).collect()
    };
    assert!(names(&before).is_disjoint(&names(&after)), "a daemon was not replaced");
    scale_to(cluster, 12);
    let mut pods: Vec<Pod> = cluster.settle("web", 12, 180);
    pods.extend(cluster.pods("steady"));
    Cluster::distinct(&pods);
    for node in NODES {
        within(60, "the audit is clean", || cluster.scene.ipamd(node, &["audit"]).0);
    }
    let worst = worst.as_millis();
    format!("{turns} times more or fewer pods; of two others, asked {asked} times, the longest silence was {worst} ms")
}

fn uninstall(cluster: &mut Cluster) -> String {
    cluster.must(&["scale", "deployment/steady", "--replicas=1"]);
    cluster.must(&["delete", "services", "-l", "!component"]);
    cluster.must(&["delete", "deployment/web"]);
    cluster.settle("web", 0, 120);
    let last = cluster.settle("steady", 1, 120).remove(0);
    // What `helm upgrade` does: the new objects, and away with those that are in the chart no more.
    let away = cluster.chart(&json!({ "uninstall": true, "purge": true }));
    cluster.apply(&away);
    cluster.must(&[&SYSTEM[..], &["delete", "daemonset", "aws-node", "--wait=true"]].concat());
    // A pod that is forgotten holds it up, and can still be deleted.
    let of_node = format!("spec.nodeName={}", last.node);
    let pod = || {
        let query = ["get", "pods", "-l", "k8s-app=aws-node-uninstall", "--field-selector", &of_node, "-o", "name"];
        cluster.must(&[&SYSTEM[..], &query].concat())
    };
    let names_it = || {
        let said = cluster.kubectl(&[&SYSTEM[..], &["logs", &pod(), "-c", "uninstall"]].concat());
        said.is_ok_and(|said| said.contains(&format!("default/{}", last.name)))
    };
    within(120, "the removal names the pod that is left", names_it);
    assert!(cluster.scene.is_there(&last.node, CONFLIST), "the runtime needs it to delete the pod");
    cluster.must(&["delete", "deployment/steady", "--wait=true"]);
    cluster.settle("steady", 0, 120);
    cluster.must(&[&SYSTEM[..], &["rollout", "status", "daemonset/aws-node-uninstall", "--timeout=180s"]].concat());
    cluster.must(&[&SYSTEM[..], &["delete", "daemonset", "aws-node-uninstall", "--wait=true"]].concat());
    for node in NODES {
        let script = "ls /opt/cni/bin/aws-cni /etc/cni/net.d/* /var/run/aws-node/* 2>/dev/null; ip rule | \
            grep -E '^(512|1024|1536|32765):'; ip route show table all | grep -E 'table [0-9]+' | grep -v 'table 255'; \
            nft list tables | grep flatwire; true";
        let stays = cluster.scene.run(node, &["sh", "-c", script]);
        assert!(stays.is_empty(), "{node} still has: {stays}");
    }
    within(60, "nodes without a conflist take no pods", || cluster.ready().iter().all(|(_, ready, _)| !ready));
    "a pod that was left was named first; nodes take no pods any more".to_owned()
}
