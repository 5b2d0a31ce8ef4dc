//! What an ADD costs at least: the netlink messages of the wiring, and one call of ipamd, each sent by a process that runs
//! already, over connections that stand.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Instant;

use flatwire_kernel::Netlink;
use flatwire_kernel::pod::{PodWiring, wire_bare};
use flatwire_proto::cni_backend_client::CniBackendClient;
use flatwire_proto::{AddNetworkRequest, DelNetworkRequest, StatusRequest};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::measure::Spread;
use super::pods::ms;
use crate::error::{Doing, Error, Result};
use crate::fabric::VPC_MTU;
use crate::ns::Place;

const SOCKET: &str = "/var/run/aws-node/ipamd.sock";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FloorTimes {
    /// The messages that make the pair and configure both ends.
    pub netlink_ms: Spread,
    /// AddNetwork, ipamd's record on disk included.
    pub grpc_add_ms: Spread,
    /// Status, which ipamd answers from memory: the bare round trip.
    pub grpc_status_ms: Spread,
    /// p50 of the netlink messages and of AddNetwork together.
    pub total_ms: f64,
}

/// Connections that stand, and what was measured over them.
pub struct Floor {
    runtime: Runtime,
    host: Netlink,
    ipamd: CniBackendClient<Channel>,
    /// Namespaces that were wired; they go when the floor does.
    pods: Vec<Place>,
    granted: Vec<String>,
    netlink: Vec<f64>,
    add: Vec<f64>,
    status: Vec<f64>,
}

impl Floor {
    pub fn of(node: &Place) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.doing(|| "start a runtime".into())?;
        // The socket's path is one of the node's own files.
        let channel = node
            .run(|| runtime.block_on(async { Endpoint::from_shared(format!("unix://{SOCKET}"))?.connect().await }))?;
        let ipamd = channel.map_err(|error| Error::refused(format!("ipamd: {}", crate::error::chain(&error))))?;
        Ok(Self {
            host: Netlink::in_namespace(&node.netns()?)?,
            ipamd: CniBackendClient::new(ipamd),
            runtime,
            pods: Vec::new(),
            granted: Vec::new(),
            netlink: Vec::new(),
            add: Vec::new(),
            status: Vec::new(),
        })
    }

    /// Each part once.
    pub fn turn(&mut self, number: u32) -> Result<()> {
        let pod = Place::new()?;
        let (netns, inside) = (pod.netns()?, Netlink::in_namespace(&pod.netns()?)?);
        let wiring = PodWiring {
            netns: "floor".into(),
            pod_if: "eth0".into(),
            host_if: format!("floor{number}"),
            mtu: VPC_MTU,
            // Of no VPC (RFC 2544), so that it is nobody's.
            address: Ipv4Addr::from(0xc612_0000 + number).into(),
            second: None,
            gateway_index: 0,
            seed: format!("floor-{number}"),
        };
        let id = format!("f100{number:060x}");
        let (host, ipamd) = (&self.host, &mut self.ipamd);
        let times = self.runtime.block_on(async {
            let start = Instant::now();
            wire_bare(host, &inside, &wiring, &netns).await?;
            let netlink = start.elapsed();
            let start = Instant::now();
            let reply = ipamd.add_network(add(&id)).await.map_err(refused)?.into_inner();
            let added = start.elapsed();
            if !reply.success {
                return Err(Error::refused(format!("ipamd gave no address: {:?}", reply.failure)));
            }
            let start = Instant::now();
            ipamd.status(StatusRequest {}).await.map_err(refused)?;
            Ok([netlink, added, start.elapsed()].map(ms))
        })?;
        let [netlink, added, status] = times;
        self.netlink.push(netlink);
        self.add.push(added);
        self.status.push(status);
        self.pods.push(pod);
        self.granted.push(id);
        Ok(())
    }

    /// Gives the addresses back, and says what was measured.
    pub fn times(&mut self) -> Result<FloorTimes> {
        for id in self.granted.drain(..) {
            self.runtime.block_on(self.ipamd.del_network(del(&id))).map_err(refused)?;
        }
        let [netlink_ms, grpc_add_ms, grpc_status_ms] =
            [&mut self.netlink, &mut self.add, &mut self.status].map(|times| Spread::of(std::mem::take(times)));
        let total_ms = netlink_ms.p50 + grpc_add_ms.p50;
        Ok(FloorTimes { netlink_ms, grpc_add_ms, grpc_status_ms, total_ms })
    }
}

fn add(id: &str) -> AddNetworkRequest {
    AddNetworkRequest {
        pod_name: id.chars().rev().take(8).collect(),
        pod_namespace: "floor".into(),
        pod_infra_container_id: id.into(),
        netns: Path::new("/run/netns").join(id).display().to_string(),
        if_name: "eth0".into(),
        network_name: "aws-cni".into(),
        container_id: id.into(),
        ..Default::default()
    }
}

fn del(id: &str) -> DelNetworkRequest {
    let add = add(id);
    DelNetworkRequest {
        pod_name: add.pod_name,
        pod_namespace: add.pod_namespace,
        pod_infra_container_id: add.pod_infra_container_id,
        reason: "PodDeleted".into(),
        if_name: add.if_name,
        network_name: add.network_name,
        container_id: add.container_id,
        ..Default::default()
    }
}

fn refused(status: tonic::Status) -> Error {
    Error::refused(format!("ipamd: {status}"))
}
