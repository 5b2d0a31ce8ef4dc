//! How soon a daemon that starts again with a full ledger answers its first ADD, with EC2 out of reach: a figure.
//!
//! From the order to start it to the answer on its socket, with 250 real pods on the node; the median of several lives, each
//! of which ends by SIGKILL.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use flatwire_proto::cni_backend_client::CniBackendClient;
use flatwire_proto::{AddNetworkRequest, DelNetworkRequest};
use flatwire_tests::{name_of, programs, start};
use hyper_util::rt::TokioIo;
use lab::client::Lab;
use lab::ctl::{DaemonAction, NodeSpec, PodInfo, Request, Spec};
use lab::error::chain;
use lab::fabric::EC2_INSIDE;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

const NODE: &str = "node-1";
const PODS: usize = 250;
const LIVES: u32 = 7;
/// Generous: the figure is what counts, this only says that it does not wait for EC2.
const DEADLINE: Duration = Duration::from_secs(5);

#[test]
fn a_restarted_daemon_with_250_pods_answers_while_ec2_is_out_of_reach() {
    let keep = tempfile::tempdir().unwrap();
    let mut node: NodeSpec = "m5.4xlarge:17".parse().unwrap();
    node.env.insert("MAX_PODS".to_owned(), "300".to_owned());
    let (name, bin_dir, keep) = (name_of("restart"), Some(programs()), Some(keep.path().to_owned()));
    let mut lab = start(&Spec { name, nodes: vec![node], bin_dir, keep, ..Spec::default() });
    add_pods(&lab);
    let socket = lab.info().nodes[0].files.join("run/aws-node/ipamd.sock");
    cut_off_ec2(&lab);
    lab.daemon(NODE, DaemonAction::Kill).unwrap();
    let calls = lab.status().unwrap().calls;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut took: Vec<f64> = (0..LIVES).map(|life| first_add_ms(&mut lab, &runtime, &socket, life)).collect();
    assert_eq!(lab.status().unwrap().calls, calls, "EC2 was within reach");
    took.sort_by(f64::total_cmp);
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    println!("restart: pods={PODS} lives={LIVES} first_add_ms={median:.1} longest_ms={longest:.1}");
}

fn add_pods(lab: &Lab) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let mut control = lab.connect().unwrap();
            let next = &next;
            scope.spawn(move || {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= PODS {
                        return;
                    }
                    let add = Request::PodAdd { node: NODE.to_owned(), name: format!("pod-{n}") };
                    control.ask::<PodInfo>(&add).unwrap_or_else(|error| panic!("pod {n}: {}", chain(&error)));
                }
            });
        }
    });
}

/// Packets to EC2 go to a hardware address that nobody has, and nobody says so.
fn cut_off_ec2(lab: &Lab) {
    let ec2 = EC2_INSIDE.to_string();
    lab.run(NODE, &["ip", "route", "replace", &ec2, "dev", "eth0"]).unwrap();
    lab.run(NODE, &["ip", "neighbour", "replace", &ec2, "lladdr", "02:00:00:00:de:ad", "dev", "eth0"]).unwrap();
}

/// One life: started, asked, undone, killed.
fn first_add_ms(lab: &mut Lab, runtime: &tokio::runtime::Runtime, socket: &Path, life: u32) -> f64 {
    let mut control = lab.connect().unwrap();
    let started = Instant::now();
    let starting = std::thread::spawn(move || {
        control.ask::<()>(&Request::Daemon { node: NODE.to_owned(), action: DaemonAction::Start }).unwrap();
    });
    let took = runtime.block_on(async {
        let mut client = connected(socket, started).await;
        let sandbox = format!("sandbox-{life}");
        let request = AddNetworkRequest {
            network_name: "aws-cni".to_owned(),
            container_id: sandbox.clone(),
            if_name: "eth0".to_owned(),
            pod_namespace: "default".to_owned(),
            pod_name: sandbox.clone(),
            ..Default::default()
        };
        let reply = client.add_network(request).await.unwrap().into_inner();
        let took = started.elapsed();
        assert!(reply.success, "no address: {:?}", reply.failure);
        let request = DelNetworkRequest {
            network_name: "aws-cni".to_owned(),
            container_id: sandbox,
            if_name: "eth0".to_owned(),
            ..Default::default()
        };
        assert!(client.del_network(request).await.unwrap().into_inner().success);
        took
    });
    assert!(took < DEADLINE, "the first ADD took {} ms", took.as_millis());
    starting.join().unwrap();
    lab.daemon(NODE, DaemonAction::Kill).unwrap();
    took.as_secs_f64() * 1e3
}

async fn connected(socket: &Path, started: Instant) -> CniBackendClient<Channel> {
    loop {
        let path = socket.to_owned();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        match Endpoint::from_static("http://ipamd").connect_with_connector(connect).await {
            Ok(channel) => return CniBackendClient::new(channel),
            Err(error) => assert!(started.elapsed() < DEADLINE, "ipamd does not listen: {error}"),
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
}
