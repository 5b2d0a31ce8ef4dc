//! ipamd and the network policy agent over their unix sockets. Every call has a deadline.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flatwire_core::error::chain;
use flatwire_proto::cni_backend_client::CniBackendClient;
use flatwire_proto::np_backend_client::NpBackendClient;
use flatwire_proto::{
    AddNetworkReply, AddNetworkRequest, Attachment, CheckNetworkReply, CheckNetworkRequest, DelNetworkReply,
    DelNetworkRequest, DeleteNpRequest, EnforceNpRequest, GcNetworkReply, GcNetworkRequest, StaleAttachment,
    StatusReply, StatusRequest,
};
use tonic::codegen::http::Uri;
use tonic::{Code, Response, Status};

use crate::connection::{Connection, ORIGIN};
use crate::failure::Failure;
use crate::input::Call;
use crate::spec::ValidAttachment;

/// How long ipamd may look for an address before it answers that it has none.
pub const ADD_PATIENCE: Duration = Duration::from_secs(15);
/// Longer than the patience, so that an answer with a reason arrives rather than silence.
pub const ADD_CALL: Duration = Duration::from_secs(17);
/// A release is one journal record.
pub const DEL_CALL: Duration = Duration::from_secs(3);
/// Read from memory.
pub const CHECK_CALL: Duration = Duration::from_secs(3);
pub const STATUS_CALL: Duration = Duration::from_secs(3);
/// One journal record per stale attachment.
pub const GC_CALL: Duration = Duration::from_secs(12);
/// The policy agent loads programs into the kernel.
pub const POLICY_CALL: Duration = Duration::from_secs(2);
/// A unix socket connects at once or not at all, unless the peer's queue is full.
pub const CONNECT: Duration = Duration::from_secs(1);

/// The reason of a release by GC; a pod that is gone, as the add-on would count it.
const STALE: &str = "PodDeleted";
const IPAMD: &str = "ipamd";
pub const POLICY_AGENT: &str = "the network policy agent";

pub struct Daemon {
    client: CniBackendClient<Connection>,
    peer: Peer,
}

/// Who is at the other end, for messages.
struct Peer {
    name: &'static str,
    socket: PathBuf,
}

impl Daemon {
    pub async fn connect(socket: &Path) -> Result<Self, Failure> {
        let peer = Peer { name: IPAMD, socket: socket.to_owned() };
        let connection = peer.connect().await?;
        Ok(Self { client: CniBackendClient::with_origin(connection, Uri::from_static(ORIGIN)), peer })
    }

    pub async fn add(&mut self, call: &Call) -> Result<AddNetworkReply, Failure> {
        let request = AddNetworkRequest {
            pod_name: call.args.pod_name.clone(),
            pod_namespace: call.args.pod_namespace.clone(),
            pod_infra_container_id: call.args.infra_container_id.clone(),
            netns: call.netns.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            if_name: call.if_name.clone(),
            network_name: call.conf.name.clone(),
            container_id: call.container_id.clone(),
            // Every released daemon has the empty version, and refuses another.
            client_version: String::new(),
            requires_multi_nic_attachment: call.conf.wants_multi_nic(),
            pod_uid: call.args.pod_uid.clone(),
            patience_ms: u32::try_from(ADD_PATIENCE.as_millis()).unwrap_or(u32::MAX),
        };
        let reply = self.peer.within("AddNetwork", ADD_CALL, self.client.add_network(request)).await?;
        if reply.success { Ok(reply) } else { Err(Failure::from_daemon("AddNetwork", reply.failure)) }
    }

    pub async fn del(&mut self, call: &Call, reason: &str) -> Result<DelNetworkReply, Failure> {
        let request = DelNetworkRequest {
            pod_name: call.args.pod_name.clone(),
            pod_namespace: call.args.pod_namespace.clone(),
            pod_infra_container_id: call.args.infra_container_id.clone(),
            reason: reason.to_owned(),
            if_name: call.if_name.clone(),
            network_name: call.conf.name.clone(),
            container_id: call.container_id.clone(),
            client_version: String::new(),
            pod_uid: call.args.pod_uid.clone(),
        };
        let reply = self.peer.within("DelNetwork", DEL_CALL, self.client.del_network(request)).await?;
        if reply.success { Ok(reply) } else { Err(Failure::from_daemon("DelNetwork", reply.failure)) }
    }

    /// What the ledger holds, or nothing from a daemon that does not offer the call.
    pub async fn check(&mut self, call: &Call) -> Result<Option<CheckNetworkReply>, Failure> {
        let request = CheckNetworkRequest {
            network_name: call.conf.name.clone(),
            container_id: call.container_id.clone(),
            if_name: call.if_name.clone(),
        };
        match self.peer.within("CheckNetwork", CHECK_CALL, self.client.check_network(request)).await {
            Ok(reply) if reply.success => Ok(Some(reply)),
            Ok(reply) => Err(Failure::from_daemon("CheckNetwork", reply.failure)),
            Err(Failure::PeerTooOld { .. }) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    pub async fn gc(&mut self, network: &str, valid: Vec<ValidAttachment>) -> Result<GcNetworkReply, Failure> {
        let valid_attachments =
            valid.into_iter().map(|a| Attachment { container_id: a.container_id, if_name: a.ifname }).collect();
        let request = GcNetworkRequest { network_name: network.to_owned(), valid_attachments };
        self.peer.within("GcNetwork", GC_CALL, self.client.gc_network(request)).await
    }

    /// Releases an attachment that GC has taken down.
    pub async fn release_stale(&mut self, network: &str, stale: &StaleAttachment) -> Result<(), Failure> {
        let request = DelNetworkRequest {
            pod_name: stale.pod_name.clone(),
            pod_namespace: stale.pod_namespace.clone(),
            reason: STALE.to_owned(),
            if_name: stale.if_name.clone(),
            network_name: network.to_owned(),
            container_id: stale.container_id.clone(),
            ..Default::default()
        };
        let reply = self.peer.within("DelNetwork", DEL_CALL, self.client.del_network(request)).await?;
        if reply.success { Ok(()) } else { Err(Failure::from_daemon("DelNetwork", reply.failure)) }
    }

    /// Whether an ADD could be served, or nothing from a daemon that does not offer the call: it answers, which is all
    /// that is known of it.
    pub async fn status(&mut self) -> Result<Option<StatusReply>, Failure> {
        match self.peer.within("Status", STATUS_CALL, self.client.status(StatusRequest {})).await {
            Ok(reply) => Ok(Some(reply)),
            Err(Failure::PeerTooOld { .. }) => Ok(None),
            Err(failure) => Err(failure),
        }
    }
}

/// Asks the network policy agent to guard the pod before it starts.
pub async fn enforce_policy(socket: &Path, call: &Call, mode: &str, interfaces: usize) -> Result<(), Failure> {
    let peer = Peer { name: POLICY_AGENT, socket: socket.to_owned() };
    let mut client = NpBackendClient::with_origin(peer.connect().await?, Uri::from_static(ORIGIN));
    let request = EnforceNpRequest {
        pod_name: call.args.pod_name.clone(),
        pod_namespace: call.args.pod_namespace.clone(),
        network_policy_mode: mode.to_owned(),
        interface_count: i32::try_from(interfaces).unwrap_or(i32::MAX),
    };
    let reply = peer.within("EnforceNpToPod", POLICY_CALL, client.enforce_np_to_pod(request)).await?;
    let pod = format!("{}/{}", call.args.pod_namespace, call.args.pod_name);
    if reply.success { Ok(()) } else { Err(Failure::PolicyRefused { pod }) }
}

/// Tells the network policy agent that the pod is gone.
pub async fn delete_policy(socket: &Path, call: &Call) -> Result<(), Failure> {
    let peer = Peer { name: POLICY_AGENT, socket: socket.to_owned() };
    let mut client = NpBackendClient::with_origin(peer.connect().await?, Uri::from_static(ORIGIN));
    let request =
        DeleteNpRequest { pod_name: call.args.pod_name.clone(), pod_namespace: call.args.pod_namespace.clone() };
    peer.within("DeletePodNp", POLICY_CALL, client.delete_pod_np(request)).await.map(drop)
}

impl Peer {
    async fn connect(&self) -> Result<Connection, Failure> {
        match tokio::time::timeout(CONNECT, Connection::open(&self.socket)).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(self.away(chain(error.as_ref()))),
            Err(_) => Err(self.away(format!("no connection within {CONNECT:?}"))),
        }
    }

    async fn within<T>(
        &self,
        call: &'static str,
        after: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        let peer = self.name;
        let status = match tokio::time::timeout(after, answer).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => status,
            Err(_) => return Err(Failure::PeerLate { peer, call, after }),
        };
        // A status that came over the wire has no source; one with a source stands for a connection that broke.
        if std::error::Error::source(&status).is_some() {
            return Err(self.away(chain(&status)));
        }
        Err(match status.code() {
            Code::Unavailable | Code::Cancelled => self.away(status.message().to_owned()),
            Code::DeadlineExceeded => Failure::PeerLate { peer, call, after },
            Code::Unimplemented => Failure::PeerTooOld { peer, call },
            code => Failure::PeerRefused { peer, call, message: format!("{code:?}: {}", status.message()) },
        })
    }

    fn away(&self, why: String) -> Failure {
        Failure::PeerAway { peer: self.name, socket: self.socket.clone(), why }
    }
}
