//! The daemon in Kubernetes: a real ipamd on a node of the lab, beside an API server that the test pretends, over TLS.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod api_server;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use api_server::{ApiServer, Call, PORT};
use flatwire_tests::{eventually, name_of, programs, within};
use lab::boot;
use lab::client::Lab;
use lab::ctl::{DaemonAction, Entrance, Info, NodeSpec, Request, Spec};
use lab::ns::Place;
use serde_json::{Value, json};

const NODE: &str = "node-1";
const CREDENTIALS: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const LOG: &str = "/var/log/aws-routed-eni/ipamd.log";
const RESOURCE: &str = "flatwire.io/pod-addresses";

/// A lab of one machine whose daemon is to call an API server, which is not there yet.
fn start_lab(node: &str, vars: &[(&str, &str)]) -> Lab {
    let mut node: NodeSpec = node.parse().unwrap();
    let port = PORT.to_string();
    let of_a_pod = [
        ("KUBERNETES_SERVICE_HOST", "127.0.0.1"),
        ("KUBERNETES_SERVICE_PORT", port.as_str()),
        ("MY_POD_NAME", "aws-node-x"),
    ];
    let vars = of_a_pod.iter().chain(vars);
    node.env = vars.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    flatwire_tests::start(&Spec {
        name: name_of("kube"),
        nodes: vec![node],
        bin_dir: Some(programs()),
        ..Spec::default()
    })
}

/// An API server on the node's loopback address, and the credentials of the daemon's pod on the node.
fn start_api_server(lab: &mut Lab) -> ApiServer {
    let entrance: Entrance = lab.ask(&Request::Enter { place: NODE.to_owned() }).unwrap();
    let world = std::fs::read_to_string(boot::dir_of(lab.name()).unwrap().join("world.pid")).unwrap();
    let place = Place::of_process(world.trim().parse().unwrap(), entrance.net_fd, None).unwrap();
    let server = ApiServer::start(|| place.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap()).unwrap());
    let (authority, token) = server.credentials();
    let write = format!(
        "mkdir -p {CREDENTIALS}; echo '{authority}' > {CREDENTIALS}/ca.crt; echo {token} > {CREDENTIALS}/token"
    );
    lab.run(NODE, &["bash", "-c", &write]).unwrap();
    server
}

fn start(node: &str, vars: &[(&str, &str)]) -> (Lab, ApiServer) {
    let mut lab = start_lab(node, vars);
    let server = start_api_server(&mut lab);
    server.put("nodes", this_node(json!({}), json!({})));
    (lab, server)
}

fn this_node(labels: Value, annotations: Value) -> Value {
    let metadata = json!({ "name": NODE, "uid": "uid-of-node", "labels": labels, "annotations": annotations });
    let conditions = json!([{ "type": "Ready", "status": "True", "reason": "KubeletReady" }]);
    let capacity = json!({ "cpu": "2", "pods": "110" });
    json!({ "metadata": metadata, "spec": {}, "status": { "capacity": capacity, "conditions": conditions } })
}

/// A pod as large as they are.
fn pod(node: &str, name: &str, host_network: bool) -> Value {
    let metadata = json!({
        "name": name, "namespace": "default", "uid": format!("uid-of-{name}"),
        "annotations": { "example.com/long": "x".repeat(8_000) },
    });
    json!({ "metadata": metadata, "spec": { "nodeName": node, "hostNetwork": host_network }, "status": { "phase": "Pending" } })
}

fn status(lab: &Lab) -> Value {
    let ipamd = lab.ipamd().unwrap();
    let output = lab.exec(NODE, &[&ipamd, "status", "--json"]).unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

fn status_text(lab: &Lab) -> String {
    let output = lab.exec(NODE, &[&lab.ipamd().unwrap(), "status"]).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn scheduled(lab: &Lab) -> Option<u64> {
    status(lab)["node_state"]["scheduled_pods"].as_u64()
}

fn held(lab: &Lab) -> u64 {
    status(lab)["counts"]["total"].as_u64().unwrap_or(0)
}

fn metric(lab: &Lab, name: &str) -> Option<f64> {
    let ask = "exec 3<>/dev/tcp/127.0.0.1/61678; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
    let page = lab.run(NODE, &["bash", "-c", ask]).unwrap();
    page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

fn log(lab: &Lab) -> String {
    lab.run(NODE, &["cat", LOG]).unwrap()
}

fn condition(server: &ApiServer) -> Option<Value> {
    let node = server.get("nodes", NODE)?;
    node["status"]["conditions"].as_array()?.iter().find(|one| one["type"] == "PodAddressPressure").cloned()
}

fn events(server: &ApiServer, about: &str) -> Vec<Value> {
    server.all("events").into_iter().filter(|event| event["regarding"]["name"] == about).collect()
}

#[test]
fn pods_bound_to_the_node_raise_its_pool_before_they_ask() {
    let (mut lab, server) = start("m5.large", &[]);
    eventually("the node is seen", || status(&lab)["kubernetes"]["watches"]["nodes"]["synced"] == true);
    let before = held(&lab);
    assert!(before < 16, "{before} addresses and no pod");
    server.put_all("pods", (0..16).map(|n| pod(NODE, &format!("web-{n}"), false)));
    server.put_all("pods", (0..5).map(|n| pod(NODE, &format!("host-{n}"), true)));
    server.put_all("pods", (0..40).map(|n| pod("elsewhere", &format!("far-{n}"), false)));
    eventually("the pods are counted", || scheduled(&lab) == Some(16));
    eventually("their addresses are there", || held(&lab) >= 16);
    assert_eq!(status(&lab)["counts"]["assigned"], 0, "nobody has asked yet");
    let text = status_text(&lab);
    assert!(text.contains("said   scheduled_pods 16: its pods in the API server"), "{text}");
    assert!(text.contains("api    https://127.0.0.1:6443: nodes heard of"), "{text}");

    // The first pods ask for what lies ready.
    lab.pod_add(NODE, "web-0").unwrap();
    // One ends, which the server's selector shows as gone; one is deleted.
    let mut ended = pod(NODE, "web-1", false);
    ended["status"]["phase"] = json!("Succeeded");
    server.put("pods", ended);
    server.delete("pods", "default/web-2");
    eventually("they are no longer counted", || scheduled(&lab) == Some(14));

    // An operator's file wins where it speaks, and only there.
    server.put("nodes", this_node(json!({}), json!({ "flatwire.io/level": "no-cloud" })));
    eventually("the annotation is followed", || status(&lab)["node_state"]["level"] == "no-cloud");
    let (ipamd, level) = (lab.ipamd().unwrap(), "no-release");
    lab.run(NODE, &[&ipamd, "level", level]).unwrap();
    eventually("the file wins", || status(&lab)["node_state"]["level"] == level);
    assert_eq!(scheduled(&lab), Some(14));
    let text = status_text(&lab);
    assert!(text.contains("said   level no-release: the node's file"), "{text}");

    server.put("nodes", {
        let mut cordoned = this_node(json!({}), json!({}));
        cordoned["spec"] = json!({ "taints": [{ "key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule" }] });
        cordoned
    });
    eventually("the node is cordoned", || status(&lab)["node_state"]["unschedulable"] == true);
}

#[test]
fn an_api_server_that_is_away_cut_or_forgetful_costs_nothing_but_news() {
    let mut lab = start_lab("m5.large", &[]);
    // Nobody is there, and there are not even credentials: pods are served all the same.
    lab.pod_add(NODE, "early").unwrap();
    let text = status_text(&lab);
    assert!(text.contains("api    https://127.0.0.1:6443") && text.contains("read the credentials"), "{text}");
    assert_eq!(scheduled(&lab), None);

    let server = start_api_server(&mut lab);
    server.put("nodes", this_node(json!({}), json!({})));
    server.put_all("pods", (0..3).map(|n| pod(NODE, &format!("a-{n}"), false)));
    within(60, "it is found later", || scheduled(&lab) == Some(3));

    // A cut watch goes on where it was, without another list.
    let lists = server.lists("pods");
    server.cut();
    server.put("pods", pod(NODE, "a-3", false));
    eventually("the watch goes on", || scheduled(&lab) == Some(4));
    assert_eq!(server.lists("pods"), lists, "nothing was listed again");
    assert!(metric(&lab, "flatwire_kube_failures_total{resource=\"pods\"}").unwrap() >= 1.0);

    // What was deleted while the server forgot is seen by a list.
    server.away(true);
    server.delete("pods", "default/a-0");
    server.delete("pods", "default/a-1");
    lab.pod_add(NODE, "meanwhile").unwrap();
    assert_eq!(scheduled(&lab), Some(4), "what was said last holds");
    server.forget_the_past();
    server.away(false);
    within(60, "it is listed again", || scheduled(&lab) == Some(2));
    assert!(server.lists("pods") > lists);
    eventually("every list is counted", || {
        metric(&lab, "flatwire_kube_lists_total{resource=\"pods\"}") == Some(f64::from(server.lists("pods")))
    });

    // A restart in the same minute, with the server away once more.
    server.away(true);
    lab.daemon(NODE, DaemonAction::Kill).unwrap();
    lab.daemon(NODE, DaemonAction::Start).unwrap();
    lab.pod_add(NODE, "restarted").unwrap();
    assert_eq!(scheduled(&lab), None);
    server.away(false);
    within(60, "it is found again", || scheduled(&lab) == Some(2));
    assert!(metric(&lab, "flatwire_kube_silence_seconds{resource=\"pods\"}").unwrap() < 30.0);
}

#[test]
fn an_eni_config_is_chosen_by_label_and_by_annotation_and_its_absence_is_explained() {
    let custom = [
        ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true"),
        ("ENI_CONFIG_LABEL_DEF", "topology.kubernetes.io/zone"),
        ("ANNOTATE_POD_IP", "true"),
    ];
    let (mut lab, server) = start("m5.large", &custom);
    let info: Info = lab.ask(&Request::Info).unwrap();
    let machine = &info.nodes[0];
    let zone = machine.availability_zone.clone();
    let vpc = info.vpc.id.clone();
    lab.ec2().call("AssociateVpcCidrBlock", &[("VpcId", &vpc), ("CidrBlock", "100.64.0.0/16")]).unwrap();
    let make = |cidr: &str| {
        let parameters = [("VpcId", vpc.as_str()), ("CidrBlock", cidr), ("AvailabilityZone", zone.as_str())];
        lab::api::element(&lab.ec2().call("CreateSubnet", &parameters).unwrap(), "subnetId").unwrap()
    };
    let (of_zone, of_node) = (make("100.64.0.0/20"), make("100.64.16.0/20"));

    let said = || status(&lab)["node_state"]["sources"]["eni_config"].as_str().unwrap_or_default().to_owned();
    eventually("its absence is told", || said().contains("there is no ENIConfig default"));
    eventually("as an event of the node", || {
        events(&server, NODE).iter().any(|event| event["reason"] == "ENIConfigUnusable")
    });

    let config = |name: &str, subnet: &str| json!({ "metadata": { "name": name, "uid": format!("uid-of-{name}") }, "spec": { "subnet": subnet } });
    server.put("eniconfigs", config(&zone, &of_zone));
    server.put("eniconfigs", config("mine", &of_node));
    server.put("nodes", this_node(json!({ "topology.kubernetes.io/zone": zone }), json!({})));
    eventually("the label is followed", || status(&lab)["node_state"]["eni_config"]["subnet"] == json!(of_zone));
    assert!(said().contains("by label topology.kubernetes.io/zone"), "{}", said());
    server.put("pods", pod(NODE, "web", false));
    let web = lab.pod_add(NODE, "web").unwrap();
    assert!("100.64.0.0/20".parse::<ipnet::Ipv4Net>().unwrap().contains(&ipv4(web.address)), "{}", web.address);

    // The annotation wins over the label.
    let labels = json!({ "topology.kubernetes.io/zone": zone });
    server.put("nodes", this_node(labels, json!({ "k8s.amazonaws.com/eniConfig": "mine" })));
    eventually("the annotation is followed", || status(&lab)["node_state"]["eni_config"]["subnet"] == json!(of_node));
    let page = "exec 3<>/dev/tcp/127.0.0.1/61679; printf 'GET /v1/eni-configs HTTP/1.0\\r\\n\\r\\n' >&3; tail -1 <&3";
    assert_eq!(lab.run(NODE, &["bash", "-c", page]).unwrap().trim(), "\"mine\"");

    // The pod has its address as an annotation while it has the address.
    let annotation = |name: &str| {
        let pod = server.get("pods", &format!("default/{name}")).unwrap();
        pod["metadata"]["annotations"]["vpc.amazonaws.com/pod-ips"].as_str().map(str::to_owned)
    };
    eventually("the pod is annotated", || annotation("web") == Some(web.address.to_string()));
    lab.pod_del(NODE, "web").unwrap();
    eventually("the annotation is emptied", || annotation("web").as_deref() == Some(""));

    // With everything switched on the daemon calls what the chart's role allows with everything switched on.
    let everything: BTreeSet<Call> = role(include_str!("../../../deploy/chart/templates/rbac.yaml"));
    let always = role(include_str!("../../../deploy/flatwire.yaml"));
    let optional: BTreeSet<Call> = everything.difference(&always).cloned().collect();
    assert_eq!(server.calls().difference(&always).cloned().collect::<BTreeSet<_>>(), optional);
}

fn ipv4(address: std::net::IpAddr) -> Ipv4Addr {
    match address {
        std::net::IpAddr::V4(address) => address,
        std::net::IpAddr::V6(address) => panic!("{address} is no IPv4 address"),
    }
}

#[test]
fn a_failed_add_is_an_event_on_its_pod_and_a_lasting_shortage_a_condition_of_the_node() {
    // Nothing may be taken from EC2, so there are no addresses and none will come.
    let (mut lab, server) = start("m5.large", &[("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true")]);
    server.put("pods", pod(NODE, "web", false));
    eventually("the pod is counted", || scheduled(&lab) == Some(1));
    eventually("nothing is wrong at first", || condition(&server).is_some_and(|it| it["status"] == "False"));
    let capacity = |server: &ApiServer| server.get("nodes", NODE).unwrap()["status"]["capacity"][RESOURCE].clone();
    let first = capacity(&server);
    let failed_at = Instant::now();
    assert!(lab.pod_add(NODE, "web").is_err(), "there is no address");
    eventually("there is an event", || !events(&server, "web").is_empty());
    let event = events(&server, "web").remove(0);
    assert_eq!((&event["reason"], &event["type"]), (&json!("ProvisioningDisabled"), &json!("Warning")));
    assert_eq!(event["regarding"]["uid"], "uid-of-web", "kubectl describe finds it by that");
    assert_eq!(event["reportingInstance"], "aws-node-x");
    assert!(event["note"].as_str().unwrap().contains("DISABLE_NETWORK_RESOURCE_PROVISIONING"), "{event}");

    within(60, "the shortage has lasted", || condition(&server).is_some_and(|it| it["status"] == "True"));
    let told = condition(&server).unwrap();
    assert_eq!(told["reason"], "ProvisioningDisabled", "{told}");
    eventually("what is held is all there is", || capacity(&server) != first);
    assert_eq!(capacity(&server), json!(held(&lab).to_string()));
    let node = server.get("nodes", NODE).unwrap();
    assert_eq!(node["status"]["allocatable"][RESOURCE], node["status"]["capacity"][RESOURCE]);
    assert!(node["status"]["conditions"].as_array().unwrap().iter().any(|it| it["type"] == "Ready"), "{node}");

    // The same failure again is the same event, counted up once a minute.
    within(150, "it is counted up", || {
        let _ = lab.pod_add(NODE, "web");
        events(&server, "web").iter().any(|event| event["series"]["count"].as_u64().is_some_and(|count| count >= 2))
    });
    assert_eq!(events(&server, "web").len(), 1);
    assert!(failed_at.elapsed() >= Duration::from_secs(60), "once a minute");

    // Without options the daemon calls exactly what the rendered role allows.
    assert_eq!(server.calls(), role(include_str!("../../../deploy/flatwire.yaml")));
}

/// What the ClusterRole of this text allows. Lines of a template that are no YAML are passed over.
fn role(text: &str) -> BTreeSet<Call> {
    let role = text.split("kind: ClusterRole\n").nth(1).expect("there is a role");
    let role = role.split("\nrules:").nth(1).unwrap().split("\n---").next().unwrap();
    let listed = |line: &str, key: &str| -> Option<Vec<String>> {
        let items = line.trim().trim_start_matches("- ").strip_prefix(key)?.trim().trim_matches(['[', ']']);
        Some(items.split(", ").map(|item| item.trim_matches('"').to_owned()).collect())
    };
    let (mut calls, mut groups, mut resources) = (BTreeSet::new(), Vec::new(), Vec::new());
    for line in role.lines() {
        if let Some(found) = listed(line, "apiGroups:") {
            groups = found;
        } else if let Some(found) = listed(line, "resources:") {
            resources = found;
        } else if let Some(verbs) = listed(line, "verbs:") {
            for group in &groups {
                for (resource, verb) in resources.iter().flat_map(|r| verbs.iter().map(move |v| (r, v))) {
                    calls.insert((verb.clone(), group.clone(), resource.clone()));
                }
            }
        }
    }
    calls
}

#[test]
fn a_nodes_own_settings_size_its_pool_and_a_bad_one_is_told_and_set_aside() {
    let (lab, server) = start("m5.large", &[("WARM_IP_TARGET", "2")]);
    eventually("the environment holds", || held(&lab) == 2);
    let labels = json!({ "flatwire.io/warm-ip-target": "6", "flatwire.io/max-eni": "many" });
    server.put("nodes", this_node(labels, json!({})));
    eventually("the node's own target holds", || held(&lab) >= 6);
    let state = status(&lab);
    assert_eq!(state["settings"]["policy"]["add_on"]["warm_ip"], 6, "{}", state["settings"]);
    assert_eq!(state["settings"]["max_pods"], 110, "the kubelet's");
    eventually("the bad one is an event", || {
        events(&server, NODE).iter().any(|event| {
            event["reason"] == "InvalidSetting" && event["note"].as_str().unwrap().contains("MAX_ENI=\"many\"")
        })
    });
    assert_eq!(metric(&lab, "flatwire_kube_invalid_settings"), Some(1.0));
    assert!(status_text(&lab).contains("api    set aside: "), "{}", status_text(&lab));
    assert!(log(&lab).contains("said of this node, and set aside"));
    server.put("nodes", this_node(json!({}), json!({})));
    eventually("the environment holds again", || status(&lab)["settings"]["policy"]["add_on"]["warm_ip"] == 2);
    eventually("nothing is set aside", || metric(&lab, "flatwire_kube_invalid_settings") == Some(0.0));
}

/// KiB of memory that the node's daemon has resident, and of these what is its own.
#[derive(Debug, Clone, Copy)]
struct Resident {
    all: u64,
    own: u64,
}

/// The most of a few looks: what is held for a moment counts too.
fn most_resident(lab: &Lab) -> Resident {
    let read = "grep -E 'VmRSS|RssAnon' /proc/$(pgrep -n -x ipamd)/status";
    let mut most = Resident { all: 0, own: 0 };
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        let text = lab.run(NODE, &["bash", "-c", read]).unwrap();
        let of = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        most = Resident { all: most.all.max(of("VmRSS")), own: most.own.max(of("RssAnon")) };
    }
    most
}

const MIB: u64 = 1_024;
/// What the operators' page promises, the program's pages included.
const MOST_KIB: u64 = 40 * MIB;
/// Foreign pods cost nothing; an allocator's pages come and go.
const NOISE_KIB: u64 = 2 * MIB;

#[test]
fn memory_stays_small_and_does_not_grow_with_the_pods_of_others() {
    if std::env::var_os("FLATWIRE_BIN_DIR").is_none() {
        println!(
            "SKIPPED the daemon's memory: FLATWIRE_BIN_DIR is not set, and an unoptimised program is twice as large"
        );
        return;
    }
    let (mut lab, server) = start("m5.large:8", &[("ANNOTATE_POD_IP", "true")]);
    server.put_all("pods", (0..110).map(|n| pod(NODE, &format!("web-{n}"), false)));
    within(60, "the pods are counted", || scheduled(&lab) == Some(110));
    for n in 0..110 {
        lab.pod_add(NODE, &format!("web-{n}")).unwrap();
    }
    let annotated = |server: &ApiServer| {
        let pods = server.all("pods");
        pods.iter().filter(|pod| pod["metadata"]["annotations"]["vpc.amazonaws.com/pod-ips"].is_string()).count()
    };
    within(60, "every pod is annotated", || annotated(&server) == 110);
    let fresh = most_resident(&lab);
    let restart = |lab: &mut Lab, pods: u64| {
        lab.daemon(NODE, DaemonAction::Stop).unwrap();
        lab.daemon(NODE, DaemonAction::Start).unwrap();
        eventually("the restarted daemon has counted", || scheduled(lab) == Some(pods));
        most_resident(lab)
    };
    let restarted = restart(&mut lab, 110);

    let foreign = |n: usize| pod(&format!("node-{}", 2 + n % 100), &format!("far-{n}"), false);
    server.put_all("pods", (0..5_000).map(foreign));
    // They come, change, and are there when everything is listed again and when the daemon starts.
    server.put_all("pods", (0..5_000).map(foreign));
    let lists = server.lists("pods");
    server.forget_the_past();
    within(60, "it was listed again", || server.lists("pods") > lists);
    server.put("pods", pod(NODE, "last", false));
    eventually("the watch goes on", || scheduled(&lab) == Some(111));
    let among_many = most_resident(&lab);
    let restarted_among_many = restart(&mut lab, 111);
    println!(
        "ipamd with 110 pods and the watch on, in KiB: fresh {fresh:?}, restarted {restarted:?}; among 5,000 foreign \
         pods {among_many:?}, restarted {restarted_among_many:?}"
    );
    for resident in [fresh, restarted, among_many, restarted_among_many] {
        assert!(resident.all < MOST_KIB, "{resident:?}: more than {MOST_KIB} KiB");
    }
    let alone = fresh.own.max(restarted.own);
    for resident in [among_many, restarted_among_many] {
        assert!(resident.own < alone + NOISE_KIB, "grown from {alone} KiB to {resident:?}");
    }
}

/// Nothing of this is needed: where no API server is named the daemon is what it was.
#[test]
fn a_switch_keeps_the_daemon_from_the_api_server() {
    let (lab, server) = start("m5.large", &[("FLATWIRE_KUBERNETES", "false")]);
    eventually("the daemon serves", || held(&lab) > 0);
    assert_eq!(status(&lab).get("kubernetes"), None);
    assert!(log(&lab).contains("FLATWIRE_KUBERNETES is false"));
    assert_eq!(server.calls(), BTreeSet::new());
}
