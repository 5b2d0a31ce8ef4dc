//! The plugin's socket: the add-on's services and our additions, over a unix socket that only root may use.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flatwire_core::ids::{PodName, SandboxId};
use flatwire_core::ledger::Allocation;
use flatwire_core::netplan::Snat;
use flatwire_core::pool::{self, Answer, Event, Pool};
use flatwire_kube::{AddFailed, Teller};
use flatwire_proto::cni_backend_server::{CniBackend, CniBackendServer};
use flatwire_proto::config_server_backend_server::{ConfigServerBackend, ConfigServerBackendServer};
use flatwire_proto::{
    AddNetworkReply, AddNetworkRequest, CheckNetworkReply, CheckNetworkRequest, DelNetworkReply, DelNetworkRequest,
    Failure, GcNetworkReply, GcNetworkRequest, IpAllocationMetadata, NetworkPolicyAgentConfigReply, Reason,
    StaleAttachment, StatusReply, StatusRequest,
};
use ipnet::IpNet;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::driver::{Handle, Unavailable};
use crate::metrics::Metrics;

#[cfg(test)]
mod tests;

/// The longest a plugin may ask to wait.
const MAX_PATIENCE_MS: u32 = 60_000;
/// No name of a runtime or of Kubernetes is longer, and all of them stand in the ledger.
const MAX_NAME_BYTES: usize = 256;
/// The add-on's text for a DEL of a sandbox it does not know; its plugin looks for exactly this and then succeeds.
const UNKNOWN_POD: &str = "datastore: unknown pod";

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("prepare the socket {path}", path = path.display())]
    Prepare { path: PathBuf, source: std::io::Error },
    #[error("another ipamd answers on {path}; stop that one first", path = path.display())]
    InUse { path: PathBuf },
}

#[derive(Clone)]
pub struct Service {
    pub pool: Handle,
    pub metrics: Arc<Metrics>,
    pub network_policy_mode: String,
    /// Who tells the API server; `None`: nobody.
    pub teller: Option<Teller>,
}

/// Makes the socket, mode 0660, in a folder of mode 0755. A socket that nobody listens on is a dead daemon's and is replaced.
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let prepare = |source| SocketError::Prepare { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(prepare)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(SocketError::InUse { path: path.to_owned() });
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(prepare(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(prepare)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(prepare)?;
    Ok(listener)
}

/// Serves until `stop` resolves, then lets what is under way finish.
pub async fn serve(
    listener: UnixListener,
    service: Service,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    // The empty name and this one are what the add-on's probes ask for; both say that the daemon answers, which is all a
    // liveness probe may hang on. Whether an address can be had is STATUS and the readiness page.
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    reporter.set_service_status("grpc.health.v1.aws-node", tonic_health::ServingStatus::Serving).await;
    Server::builder()
        .add_service(health)
        .add_service(CniBackendServer::new(service.clone()))
        .add_service(ConfigServerBackendServer::new(service))
        .serve_with_incoming_shutdown(trusted(listener), stop)
        .await
}

/// Connections of root, or of whoever runs this daemon. The mode of the socket says the same; this holds if it is changed.
fn trusted(listener: UnixListener) -> impl Stream<Item = std::io::Result<UnixStream>> {
    let own = own_uid();
    tokio_stream::wrappers::UnixListenerStream::new(listener).filter(move |stream| {
        let Ok(stream) = stream else { return true };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || Some(peer.uid()) == own => true,
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), pid = peer.pid(), "refused a caller that is not root");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "refused a caller without credentials");
                false
            }
        }
    })
}

/// Our own user, from /proc, where the kernel says it without a system call of our own.
fn own_uid() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").ok().map(|meta| meta.uid())
}

#[tonic::async_trait]
impl CniBackend for Service {
    async fn add_network(&self, request: Request<AddNetworkRequest>) -> Result<Response<AddNetworkReply>, Status> {
        let request = request.into_inner();
        let started = Instant::now();
        self.metrics.add_requests.inc();
        check_version(&request.client_version)?;
        let pod = PodName { namespace: request.pod_namespace.clone(), name: request.pod_name.clone() };
        let reply = self.add(request).await;
        self.tell(pod, reply.failure.as_ref());
        let outcome = if reply.success { "ok" } else { "failed" };
        self.metrics.add_seconds.with_label_values(&[outcome]).observe(started.elapsed().as_secs_f64());
        Ok(Response::new(reply))
    }

    async fn del_network(&self, request: Request<DelNetworkRequest>) -> Result<Response<DelNetworkReply>, Status> {
        let request = request.into_inner();
        check_version(&request.client_version)?;
        let reason = if request.reason == "SetupNSFailed" { "SetupNSFailed" } else { "PodDeleted" };
        self.metrics.del_requests.with_label_values(&[reason]).inc();
        let sandbox = match sandbox(&request.network_name, &request.container_id, &request.if_name) {
            Ok(sandbox) => sandbox,
            Err(failure) => return Ok(Response::new(DelNetworkReply { failure: Some(failure), ..Default::default() })),
        };
        let pod = PodName { namespace: request.pod_namespace, name: request.pod_name };
        let asked = sandbox.clone();
        match self.pool.ask(move |request| Event::Del { request, sandbox }).await {
            Ok(Answer::Deleted(allocation)) => {
                tracing::info!(sandbox = %asked, %pod, address = %allocation.address, "released");
                self.tell(pod, None);
                Ok(Response::new(DelNetworkReply {
                    success: true,
                    ip_allocation_metadata: vec![metadata(&allocation)],
                    network_policy_mode: self.network_policy_mode.clone(),
                    ..Default::default()
                }))
            }
            Ok(Answer::Unknown) => Err(Status::not_found(UNKNOWN_POD)),
            Ok(other) => Ok(Response::new(DelNetworkReply { failure: Some(failure_of(other)), ..Default::default() })),
            Err(error) => Err(unavailable(&error)),
        }
    }

    async fn check_network(
        &self,
        request: Request<CheckNetworkRequest>,
    ) -> Result<Response<CheckNetworkReply>, Status> {
        let request = request.into_inner();
        let sandbox = match sandbox(&request.network_name, &request.container_id, &request.if_name) {
            Ok(sandbox) => sandbox,
            Err(failure) => {
                return Ok(Response::new(CheckNetworkReply { failure: Some(failure), ..Default::default() }));
            }
        };
        let asked = sandbox.clone();
        let held = self.pool.look(move |pool, _| pool.ledger().pods.get(&asked).cloned()).await;
        let reply = match held.map_err(|e| unavailable(&e))? {
            Some(allocation) => {
                CheckNetworkReply { success: true, ip_allocation_metadata: vec![metadata(&allocation)], failure: None }
            }
            None => CheckNetworkReply {
                failure: Some(Failure {
                    reason: Reason::UnknownSandbox.into(),
                    message: format!("the ledger has no address for {sandbox}; delete the pod and let it be made anew"),
                    retryable: false,
                }),
                ..Default::default()
            },
        };
        Ok(Response::new(reply))
    }

    async fn gc_network(&self, request: Request<GcNetworkRequest>) -> Result<Response<GcNetworkReply>, Status> {
        let request = request.into_inner();
        let valid: BTreeSet<(String, String)> =
            request.valid_attachments.into_iter().map(|a| (a.container_id, a.if_name)).collect();
        let network = request.network_name;
        match self.pool.ask(move |request| Event::Gc { request, network, valid }).await {
            Ok(Answer::Stale(stale)) => {
                for allocation in &stale {
                    tracing::info!(sandbox = %allocation.sandbox, address = %allocation.address, "stale, says the runtime");
                }
                let stale = stale.into_iter().map(|a| StaleAttachment {
                    container_id: a.sandbox.container_id.clone(),
                    if_name: a.sandbox.if_name.clone(),
                    pod_name: a.pod.name.clone(),
                    pod_namespace: a.pod.namespace.clone(),
                    ip_allocation_metadata: vec![metadata(&a)],
                });
                Ok(Response::new(GcNetworkReply { stale: stale.collect(), failure: None }))
            }
            Ok(other) => Ok(Response::new(GcNetworkReply { stale: Vec::new(), failure: Some(failure_of(other)) })),
            Err(error) => Err(unavailable(&error)),
        }
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let status = self.pool.status().await.map_err(|e| unavailable(&e))?;
        let failure = status.failure.filter(|_| !status.ready).map(wire_failure);
        Ok(Response::new(StatusReply { ready: status.ready, failure, free_addresses: status.free }))
    }
}

impl Service {
    /// That a pod has come or gone, or was refused. Waits for nobody.
    fn tell(&self, pod: PodName, failure: Option<&Failure>) {
        let Some(teller) = &self.teller else { return };
        match failure {
            Some(failure) => {
                let (reason, message) = (name_of(failure.reason()), failure.message.clone());
                teller.add_failed(AddFailed { pod, reason, message });
            }
            None => teller.changed(),
        }
    }

    async fn add(&self, request: AddNetworkRequest) -> AddNetworkReply {
        let failed = |failure: Failure| AddNetworkReply { failure: Some(failure), ..Default::default() };
        if request.requires_multi_nic_attachment {
            return failed(Failure {
                reason: Reason::Unsupported.into(),
                message:
                    "pods on several network cards (multi-nic-attachment) are not supported; remove the annotation \
                          k8s.amazonaws.com/nicConfig"
                        .to_owned(),
                retryable: false,
            });
        }
        let sandbox = match sandbox(&request.network_name, &request.container_id, &request.if_name) {
            Ok(sandbox) => sandbox,
            Err(failure) => return failed(failure),
        };
        let pod = match pod(request.pod_namespace, request.pod_name) {
            Ok(pod) => pod,
            Err(failure) => return failed(failure),
        };
        let patience_ms = match request.patience_ms.min(MAX_PATIENCE_MS) {
            0 => None,
            ms => Some(u64::from(ms)),
        };
        let (asked, name) = (sandbox.clone(), pod.clone());
        let add = move |request| Event::Add { request, sandbox, pod, patience_ms };
        let answer = self.pool.ask_and(add, |answer, pool| (answer, AboutNode::of(pool))).await;
        let (allocation, AboutNode { external_snat, vpc_cidrs }) = match answer {
            Ok((Answer::Added(allocation), node)) => (allocation, node),
            Ok((other, _)) => {
                let failure = failure_of(other);
                self.metrics.no_address.inc();
                let reason = name_of(failure.reason());
                self.metrics.add_failures.with_label_values(&[reason.as_str()]).inc();
                tracing::warn!(sandbox = %asked, pod = %name, reason, why = failure.message, "no address");
                return failed(failure);
            }
            Err(error) => {
                let reason = Reason::Starting.into();
                return failed(Failure { reason, message: error.to_string(), retryable: true });
            }
        };
        tracing::info!(sandbox = %asked, pod = %name, address = %allocation.address, eni = %allocation.eni, "assigned");
        let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = vpc_cidrs.into_iter().partition(|cidr| cidr.addr().is_ipv4());
        let texts = |cidrs: &[IpNet]| cidrs.iter().map(ToString::to_string).collect();
        AddNetworkReply {
            success: true,
            ip_allocation_metadata: vec![metadata(&allocation)],
            use_external_snat: external_snat,
            vpc_v4_cidrs: texts(&v4),
            vpc_v6_cidrs: texts(&v6),
            network_policy_mode: self.network_policy_mode.clone(),
            ..Default::default()
        }
    }
}

/// What an answer to ADD says of the node; the add-on's plugin reads it.
struct AboutNode {
    external_snat: bool,
    vpc_cidrs: Vec<IpNet>,
}

impl AboutNode {
    fn of(pool: &Pool) -> Self {
        let vpc_cidrs = pool.ledger().node.as_ref().map(|node| node.vpc_cidrs.clone()).unwrap_or_default();
        Self { external_snat: pool.settings().snat == Snat::External, vpc_cidrs }
    }
}

#[tonic::async_trait]
impl ConfigServerBackend for Service {
    async fn get_network_policy_configs(
        &self,
        _: Request<()>,
    ) -> Result<Response<NetworkPolicyAgentConfigReply>, Status> {
        let status = self.pool.status().await.map_err(|e| unavailable(&e))?;
        let node = status.node.ok_or_else(|| Status::unavailable("the instance metadata has not been read yet"))?;
        let primary = status.enis.iter().find(|eni| eni.id == node.primary_eni);
        Ok(Response::new(NetworkPolicyAgentConfigReply {
            // The agent refuses to start on anything but none, strict or standard.
            network_policy_mode: match self.network_policy_mode.as_str() {
                "" => "none".to_owned(),
                mode => mode.to_owned(),
            },
            multi_nic_enabled: false,
            node_ipv4: primary.map(|eni| eni.primary_ipv4.to_string()).unwrap_or_default(),
            node_ipv6: String::new(),
            instance_id: node.instance.to_string(),
            region: node.region,
        }))
    }
}

/// Every released add-on sends the empty version; a caller that names one must be of ours.
fn check_version(client: &str) -> Result<(), Status> {
    let own = env!("CARGO_PKG_VERSION");
    if client.is_empty() || client == own {
        return Ok(());
    }
    Err(Status::failed_precondition(format!("wrong client version {client:?} (!= {own:?})")))
}

fn sandbox(network: &str, container_id: &str, if_name: &str) -> Result<SandboxId, Failure> {
    let fields = [("network_name", network), ("container_id", container_id), ("if_name", if_name)];
    if let Some((field, _)) = fields.iter().find(|(_, value)| value.is_empty() || value.len() > MAX_NAME_BYTES) {
        return Err(invalid(format!("{field} is missing or longer than {MAX_NAME_BYTES} bytes")));
    }
    Ok(SandboxId { network: network.to_owned(), container_id: container_id.to_owned(), if_name: if_name.to_owned() })
}

/// The names may be missing: not every runtime is Kubernetes'.
fn pod(namespace: String, name: String) -> Result<PodName, Failure> {
    let fields = [("pod_namespace", &namespace), ("pod_name", &name)];
    if let Some((field, _)) = fields.iter().find(|(_, value)| value.len() > MAX_NAME_BYTES) {
        return Err(invalid(format!("{field} is longer than {MAX_NAME_BYTES} bytes")));
    }
    Ok(PodName { namespace, name })
}

fn invalid(message: String) -> Failure {
    Failure { reason: Reason::InvalidRequest.into(), message, retryable: false }
}

fn metadata(allocation: &Allocation) -> IpAllocationMetadata {
    let text = |address: Option<IpAddr>| address.map_or_else(String::new, |address| address.to_string());
    let (ipv4, ipv6, egress) = match allocation.address {
        IpAddr::V4(_) => (Some(allocation.address), allocation.second, None),
        // What a pod of an IPv6 cluster reaches IPv4 with is not its address.
        IpAddr::V6(_) => (None, Some(allocation.address), allocation.second),
    };
    IpAllocationMetadata {
        ipv4_addr: text(ipv4),
        ipv6_addr: text(ipv6),
        device_number: i32::try_from(allocation.device.0).unwrap_or(i32::MAX),
        route_table_id: i32::try_from(allocation.table.0).unwrap_or(i32::MAX),
        egress_ipv4_addr: text(egress),
    }
}

/// `subnet_empty`, as the pool says it, for `REASON_SUBNET_EMPTY`.
fn name_of(reason: Reason) -> String {
    reason.as_str_name().trim_start_matches("REASON_").to_ascii_lowercase()
}

fn unavailable(error: &Unavailable) -> Status {
    Status::unavailable(error.to_string())
}

fn failure_of(answer: Answer) -> Failure {
    match answer {
        Answer::Failed(failure) => wire_failure(failure),
        other => Failure {
            reason: Reason::Unspecified.into(),
            message: format!("the pool gave an answer of another kind: {other:?}"),
            retryable: true,
        },
    }
}

fn wire_failure(failure: pool::Failure) -> Failure {
    let reason = match failure.reason {
        pool::Reason::Starting => Reason::Starting,
        pool::Reason::Assigning => Reason::Assigning,
        pool::Reason::Attaching => Reason::Attaching,
        pool::Reason::Cooling => Reason::Cooling,
        pool::Reason::SubnetEmpty => Reason::SubnetEmpty,
        pool::Reason::Fragmented => Reason::Fragmented,
        pool::Reason::Throttled => Reason::Throttled,
        pool::Reason::Denied => Reason::Denied,
        pool::Reason::InstanceLimit => Reason::InstanceLimit,
        pool::Reason::CloudUnavailable => Reason::CloudUnavailable,
        pool::Reason::ProvisioningDisabled => Reason::ProvisioningDisabled,
        pool::Reason::Ledger => Reason::Ledger,
    };
    Failure { reason: reason.into(), message: failure.message, retryable: failure.retryable }
}
