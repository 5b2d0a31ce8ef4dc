//! The data path on the lab, by packets: beside kube-proxy's rules, out of the VPC and back, and behind other plugins.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use flatwire_tests::{binary, name_of, programs};
use lab::api::element;
use lab::client::Lab;
use lab::ctl::{EniInfo, Info, NodeInfo, NodeSpec, PodInfo, Request, Spec};
use lab::fabric::IMDS;
use serde_json::json;

/// Three ENIs of four addresses: the fourth pod is on a secondary ENI.
const NODE_TYPE: &str = "t3.small";
const PEER_CIDR: &str = "10.99.0.0/16";

/// A lab with a node per list of variables.
fn start(of: &str, nodes: &[&[(&str, &str)]]) -> Lab {
    let node = |env: &&[(&str, &str)]| NodeSpec {
        instance_type: NODE_TYPE.to_owned(),
        env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        ..NodeSpec::default()
    };
    let nodes = nodes.iter().map(node).collect();
    flatwire_tests::start(&Spec { name: name_of(of), nodes, bin_dir: Some(programs()), ..Spec::default() })
}

fn machine(lab: &mut Lab, name: &str) -> NodeInfo {
    let info: Info = lab.ask(&Request::Info).unwrap();
    info.nodes.into_iter().find(|node| node.name == name).expect("the machine is there")
}

/// A pod on the primary ENI of the node, and one on a secondary.
fn pods(lab: &mut Lab, node: &str) -> [PodInfo; 2] {
    let mut found: BTreeMap<bool, PodInfo> = BTreeMap::new();
    for number in 0..8 {
        let pod = lab.pod_add(node, &format!("pod-{number}")).unwrap();
        let primary = machine(lab, node).enis.iter().any(|eni| eni.device == 0 && has_alone(eni, &pod));
        found.insert(primary, pod);
        if found.len() == 2 {
            break;
        }
    }
    lab.settle().unwrap();
    [found.remove(&true).expect("a pod on the primary ENI"), found.remove(&false).expect("a pod on a secondary ENI")]
}

/// True where the ENI holds the pod's address as one of its secondary ones.
fn has_alone(eni: &EniInfo, pod: &PodInfo) -> bool {
    pod.ipv4().is_some_and(|address| eni.secondary.contains(&address))
}

/// Whom a machine or address sees when the pod calls, over UDP and TCP; both must agree.
fn seen(lab: &mut Lab, pod: &PodInfo, to: &str) -> Option<IpAddr> {
    let probe = lab.probe(&format!("{}/{}", pod.node, pod.name), &[to]).unwrap().remove(0);
    assert_eq!(probe.seen, probe.seen_tcp, "{probe:?}");
    probe.seen
}

fn python(lab: &Lab, place: &str, script: &str) -> String {
    lab.run(place, &["python3", "-c", script]).unwrap()
}

#[test]
fn every_way_works_beside_kube_proxy_in_each_of_its_modes() {
    let everything = ["IPv4, over IPv4", "dual stack, over IPv4", "dual stack, over IPv6", "IPv6 only, over IPv6"];
    // The mark is another one in the second run, so that it is honoured by packets too.
    for (families, modes, mark, tables) in [
        ("v4,dual,v6", "legacy,nft,nftables", "0x80", everything.as_slice()),
        ("dual", "nft", "0x1001", &everything[1..3]),
    ] {
        let output = Command::new(binary("lab"))
            .args(["matrix", "--families", families, "--modes", modes, "--name", &name_of("matrix")])
            .args(["--env", &format!("AWS_VPC_K8S_CNI_CONNMARK={mark}"), "--bin-dir"])
            .arg(programs())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        println!("{said}");
        assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
        let titles: Vec<&str> = said.lines().filter(|line| everything.contains(line)).collect();
        assert_eq!(titles, tables, "{said}");
        assert!(said.lines().last().unwrap_or_default().starts_with("matrix: passed="), "{said}");
    }
}

#[test]
fn exclusions_external_translation_and_external_services_are_followed() {
    let mut lab = start(
        "snat",
        &[
            &[("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", PEER_CIDR), ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "none")],
            &[("AWS_VPC_K8S_CNI_EXTERNALSNAT", "true")],
            &[("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", PEER_CIDR), ("AWS_EXTERNAL_SERVICE_CIDRS", PEER_CIDR)],
        ],
    );
    let with_exclusions = pods(&mut lab, "node-1");
    for pod in &with_exclusions {
        assert_eq!(seen(&mut lab, pod, "peer"), Some(pod.address), "excluded");
        let public = machine(&mut lab, "node-1").public.map(IpAddr::from);
        assert_eq!(seen(&mut lab, pod, "internet"), public);
    }
    for pod in pods(&mut lab, "node-2") {
        assert_eq!(seen(&mut lab, &pod, "peer"), Some(pod.address), "somebody else translates");
        assert_eq!(seen(&mut lab, &pod, "internet"), None, "a pod's address is not public");
    }
    let node = machine(&mut lab, "node-3").address.map(IpAddr::from);
    let [on_primary, on_secondary] = pods(&mut lab, "node-3");
    assert_eq!(seen(&mut lab, &on_primary, "peer"), Some(on_primary.address), "excluded");
    // Its way is main's, which leads to the primary ENI, where its address is not valid.
    assert_eq!(seen(&mut lab, &on_secondary, "peer"), node);
    let rules = lab.run("node-3", &["ip", "rule", "show", "pref", "1535"]).unwrap();
    assert!(rules.contains(&format!("to {PEER_CIDR} lookup main")), "{rules}");

    // Without randomisation the port is the pod's own.
    std::thread::scope(|scope| {
        let lab = &lab;
        let server = scope.spawn(|| {
            python(
                lab,
                "internet",
                "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 9000)); s.settimeout(20)\n\
                 d, a = s.recvfrom(64); s.sendto(b'heard', a); print(a[1])",
            )
        });
        python(
            lab,
            &format!("node-1/{}", with_exclusions[1].name),
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 5555)); s.settimeout(0.2)\n\
             for _ in range(100):\n\
             \x20try: s.sendto(b'port', ('192.0.2.10', 9000)); s.recv(64); break\n\
             \x20except OSError: pass\n\
             else: raise SystemExit('never heard')",
        );
        assert_eq!(server.join().unwrap().trim(), "5555");
    });
}

#[test]
fn a_cidr_that_joins_the_vpc_is_no_longer_translated_to() {
    let mut lab = start("cidr", &[&[]]);
    let [pod, _] = pods(&mut lab, "node-1");
    let info: Info = lab.ask(&Request::Info).unwrap();
    let node = machine(&mut lab, "node-1").address.unwrap();
    let zone = info.vpc.subnets[0].availability_zone.clone();
    let associated =
        lab.ec2().call("AssociateVpcCidrBlock", &[("VpcId", &info.vpc.id), ("CidrBlock", "100.64.0.0/16")]).unwrap();
    assert!(element(&associated, "cidrBlock").is_some(), "{associated}");
    let subnet = [("VpcId", info.vpc.id.as_str()), ("CidrBlock", "100.64.0.0/20"), ("AvailabilityZone", zone.as_str())];
    lab.ec2().call("CreateSubnet", &subnet).unwrap();
    lab.settle().unwrap();

    // The VPC's router has the subnet's gateway, and tells whom it hears.
    let ask = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)\n\
               s.sendto(b'who', ('100.64.0.1', 9001)); print(s.recv(64).decode())";
    let tell = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('100.64.0.1', 9001))\n\
                while True:\n\
                \x20d, a = s.recvfrom(64); s.sendto(a[0].encode(), a)\n\
                \x20if d == b'end': break";
    std::thread::scope(|scope| {
        let lab = &lab;
        let server = scope.spawn(|| python(lab, "vpc", tell));
        let mut heard = Vec::new();
        // The metadata of the instance is read once a minute.
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline && heard.last() != Some(&pod.address.to_string()) {
            let output = lab.exec(&format!("node-1/{}", pod.name), &["python3", "-c", ask]).unwrap();
            let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            if !said.is_empty() && heard.last() != Some(&said) {
                heard.push(said);
            }
        }
        python(
            lab,
            "vpc",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'end', ('100.64.0.1', 9001))",
        );
        server.join().unwrap();
        assert_eq!(heard, [node.to_string(), pod.address.to_string()], "first from outside, then from within");
    });
}

/// The far side of a connection, as it tells: what a segment may hold, and how much came.
#[test]
fn downloads_and_uploads_come_through_where_icmp_is_lost() {
    let mut lab = start("mss", &[&[], &[("FLATWIRE_OUTSIDE_MTU", "9001")]]);
    // The server's link is wide and the way to it is not, and nobody tells. What a link gets in one piece it also passes
    // on in one piece, so the server sends packets as they are.
    let widen =
        "for l in $(ip -o link | grep -o 'vpc-[^@:]*'); do ip link set $l mtu 9001 gso_max_segs 1; done; ip link";
    let links = lab.run("internet", &["sh", "-c", widen]).unwrap();
    assert!(links.contains("mtu 9001"), "{links}");
    let silence = "table ip silence { chain out { type filter hook output priority 0; \
                   icmp type destination-unreachable icmp code frag-needed drop; }; }";
    lab.run("vpc", &["nft", silence]).unwrap();
    let serve = "import socket, sys\n\
                 s = socket.create_server(('', 9002)); s.settimeout(30)\n\
                 for _ in range(2):\n\
                 \x20c, _a = s.accept(); c.settimeout(3)\n\
                 \x20try:\n\
                 \x20 m = c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG); n = 0\n\
                 \x20 while n < 300000: n += len(c.recv(65536)) or 300000\n\
                 \x20 c.sendall(b'x' * 300000); c.shutdown(socket.SHUT_WR); c.recv(1); print('done', m)\n\
                 \x20except OSError as e: print('stuck', m)";
    let talk = "import socket, time\n\
                for _ in range(100):\n\
                \x20try: c = socket.create_connection(('192.0.2.10', 9002), 5); break\n\
                \x20except OSError: time.sleep(0.05)\n\
                c.settimeout(3); c.sendall(b'x' * 300000); n = 0\n\
                while n < 300000:\n\
                \x20d = c.recv(65536)\n\
                \x20if not d: break\n\
                \x20n += len(d)\n\
                print(n)";
    for (node, comes_through) in [("node-1", true), ("node-2", false)] {
        let pods = pods(&mut lab, node);
        std::thread::scope(|scope| {
            let lab = &lab;
            let server = scope.spawn(|| python(lab, "internet", serve));
            for pod in &pods {
                let said = lab.exec(&format!("{node}/{}", pod.name), &["python3", "-c", talk]).unwrap();
                let got = String::from_utf8_lossy(&said.stdout).trim() == "300000";
                assert_eq!(got, comes_through, "{node}/{}: {said:?}", pod.name);
            }
            let told = server.join().unwrap();
            for line in told.lines() {
                let (outcome, segment) = line.split_once(' ').unwrap();
                let segment: u32 = segment.parse().unwrap();
                // Less the twelve bytes of a timestamp, where it has one.
                assert_eq!((outcome == "done", segment <= 1460), (comes_through, comes_through), "{node}: {told}");
            }
            assert_eq!(told.lines().count(), 2, "{told}");
        });
    }
}

#[test]
fn pods_reach_the_instance_metadata_unless_they_are_kept_away() {
    let mut lab = start("imds", &[&[], &[("FLATWIRE_BLOCK_IMDS", "true")]]);
    let token = format!(
        "import urllib.request as u\n\
         r = u.Request('http://{IMDS}/latest/api/token', method='PUT', headers={{'X-aws-ec2-metadata-token-ttl-seconds': '60'}})\n\
         print(len(u.urlopen(r, timeout=3).read()))"
    );
    for (node, reaches) in [("node-1", true), ("node-2", false)] {
        for pod in pods(&mut lab, node) {
            let output = lab.exec(&format!("{node}/{}", pod.name), &["python3", "-c", &token]).unwrap();
            let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.success(), reaches, "{node}/{}: {complaint}", pod.name);
            assert!(reaches || complaint.contains("No route to host"), "refused at once, not lost: {complaint}");
        }
        python(&lab, node, &token);
    }
}

/// Puts plugins behind ours in a node's configuration.
fn chain(lab: &Lab, node: &str, plugins: &[serde_json::Value]) {
    let path = "/etc/cni/net.d/10-aws.conflist";
    let mut conflist: serde_json::Value = serde_json::from_str(&lab.run(node, &["cat", path]).unwrap()).unwrap();
    let all = conflist["plugins"].as_array_mut().unwrap();
    all.truncate(1);
    all.extend(plugins.iter().cloned());
    lab.run(
        node,
        &["python3", "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path, &conflist.to_string()],
    )
    .unwrap();
}

#[test]
fn host_ports_bandwidth_and_tuning_work_behind_ours_and_a_failing_plugin_leaks_nothing() {
    let mut lab = start("chain", &[&[], &[]]);
    let plugins = [
        json!({ "type": "portmap", "snat": true, "capabilities": { "portMappings": true } }),
        json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } }),
    ];
    chain(&lab, "node-1", &plugins);
    let (node, peer) = (machine(&mut lab, "node-1"), machine(&mut lab, "peer").address);
    let (address, public) = (node.address.unwrap(), node.public.unwrap());
    let other = machine(&mut lab, "node-2").address;
    let mut on = Vec::new();
    for number in 0..4u16 {
        let name = format!("web-{number}");
        let port = 8080 + number;
        let mappings =
            ["tcp", "udp"].map(|protocol| json!({ "hostPort": port, "containerPort": 7777, "protocol": protocol }));
        let capabilities = BTreeMap::from([
            ("portMappings".to_owned(), json!(mappings)),
            ("bandwidth".to_owned(), json!({ "ingressRate": 80_000_000, "ingressBurst": 8_000_000 })),
        ]);
        let pod = lab.pod_add_with("node-1", &name, capabilities).unwrap();
        lab.settle().unwrap();
        let enis = machine(&mut lab, "node-1").enis;
        let eni = enis.iter().find(|eni| has_alone(eni, &pod)).unwrap();
        on.push(eni.device);

        let somaxconn = lab.run(&format!("node-1/{name}"), &["cat", "/proc/sys/net/core/somaxconn"]).unwrap();
        assert_eq!(somaxconn.trim(), "500");
        let mut targets = vec![("node-2", address, other), ("peer", address, peer)];
        // At the address of a secondary ENI too.
        targets.extend(enis.iter().filter(|eni| eni.device > 0).map(|eni| ("peer", eni.primary, peer)));
        targets.push(("internet", public, Some("192.0.2.10".parse().unwrap())));
        for (from, to, caller) in targets {
            let called = lab.call(from, &[SocketAddr::new(to.into(), port)]).unwrap()[0];
            let caller = caller.map(IpAddr::from);
            assert_eq!((called.udp, called.tcp), (caller, caller), "{from} → {to}:{port}, ENI {}", eni.device);
        }
        // The pod by its own host port.
        let itself = lab.call(&format!("node-1/{name}"), &[SocketAddr::new(address.into(), port)]).unwrap()[0];
        assert!(itself.udp.is_some() && itself.tcp.is_some(), "{itself:?}");
    }
    assert!(on.contains(&0) && on.iter().any(|device| *device > 0), "{on:?}");
    let shaped = lab.run("node-1", &["tc", "qdisc", "show"]).unwrap();
    assert_eq!(shaped.matches("qdisc tbf").count(), 4, "{shaped}");

    // Without host ports: Debian's portmap asks for the rules of both families where it has any.
    let plain =
        BTreeMap::from([("bandwidth".to_owned(), json!({ "ingressRate": 80_000_000, "ingressBurst": 8_000_000 }))]);
    lab.pod_add_with("node-1", "plain", plain).unwrap();
    lab.pod_check("node-1", "plain").unwrap();
    lab.run("node-1/plain", &["ip", "link", "set", "eth0", "mtu", "1400"]).unwrap();
    let error = lab.pod_check("node-1", "plain").unwrap_err().to_string();
    assert!(error.contains("1400"), "{error}");

    // A plugin behind ours fails: the runtime undoes the pod, and nothing of it is left.
    let kernel = |lab: &Lab| {
        lab.run("node-1", &["sh", "-c", "ip route | sort; ip -br link | cut -d' ' -f1 | sort; iptables -t nat -S"])
            .unwrap()
    };
    let before = kernel(&lab);
    let mut broken = plugins.to_vec();
    broken.push(json!({ "type": "tuning", "sysctl": { "net.ipv4.no_such_knob": "1" } }));
    chain(&lab, "node-1", &broken);
    let mappings = json!([{ "hostPort": 9090, "containerPort": 7777, "protocol": "tcp" }]);
    let told = BTreeMap::from([("portMappings".to_owned(), mappings)]);
    let error = lab.pod_add_with("node-1", "broken", told).unwrap_err();
    assert!(error.to_string().contains("no_such_knob"), "{error}");
    assert_eq!(kernel(&lab), before);
    let ipamd = lab.ipamd().unwrap();
    let status: serde_json::Value =
        serde_json::from_str(&lab.run("node-1", &[&ipamd, "status", "--json"]).unwrap()).unwrap();
    assert_eq!(status["counts"]["assigned"], 5, "{status}");

    chain(&lab, "node-1", &plugins);
    for name in ["web-0", "web-1", "web-2", "web-3", "plain"] {
        lab.pod_del("node-1", name).unwrap();
    }
    let left = lab.run("node-1", &["sh", "-c", "iptables -t nat -S; ip route"]).unwrap();
    assert!(!left.contains("7777") && !left.contains(" dev eni"), "{left}");
}
