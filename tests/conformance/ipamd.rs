//! A stand-in for ipamd and for the network policy agent: the real protocol on real unix sockets, with a pool of a few
//! addresses and knobs for everything a daemon may answer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flatwire_proto::cni_backend_server::{CniBackend, CniBackendServer};
use flatwire_proto::np_backend_server::{NpBackend, NpBackendServer};
use flatwire_proto::*;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// Network, container id, interface name.
pub type Key = (String, String, String);

type Hook = Box<dyn Fn() + Send>;

#[derive(Default)]
pub struct State {
    pub held: BTreeMap<Key, Vec<IpAllocationMetadata>>,
    next: u8,

    pub adds: Vec<AddNetworkRequest>,
    pub dels: Vec<DelNetworkRequest>,
    pub gcs: Vec<GcNetworkRequest>,
    pub enforced: Vec<EnforceNpRequest>,
    pub forgotten: Vec<DeleteNpRequest>,

    /// ADD and STATUS are refused with this.
    pub refuse: Option<Failure>,
    /// ADD is refused the way a daemon without reasons does it.
    pub refuse_without_reason: bool,
    /// DEL ends in this gRPC error.
    pub del_error: Option<Status>,
    /// GC tells this beside what it names.
    pub gc_failure: Option<Failure>,
    /// Calls that only Flatwire has end in "unimplemented", as with the add-on's daemon.
    pub is_the_add_on: bool,
    pub policy_mode: String,
    pub policy_refuses: bool,
    pub v6: bool,
    pub vlan: i32,
    /// Answer ADD with these instead.
    pub answer: Option<Vec<IpAllocationMetadata>>,
    pub on_add: Option<Hook>,
    pub on_del: Option<Hook>,
}

/// A running daemon. It is gone when this is dropped.
pub struct Ipamd {
    state: Arc<Mutex<State>>,
    dir: PathBuf,
    runtime: Option<Runtime>,
}

#[derive(Clone)]
struct Server(Arc<Mutex<State>>);

impl Ipamd {
    /// Serves `ipamd.sock` and `npa.sock` in a folder.
    pub fn start(dir: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let state = Arc::new(Mutex::new(State::default()));
        let ipamd = Self { state, dir: dir.to_owned(), runtime: Some(runtime) };
        ipamd.serve();
        ipamd
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The daemon dies: its sockets refuse from now on.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
        }
    }

    pub fn held(&self, container_id: &str, if_name: &str) -> Vec<IpAddr> {
        let key = ("aws-cni".to_owned(), container_id.to_owned(), if_name.to_owned());
        let texts = |entry: &IpAllocationMetadata| [entry.ipv4_addr.clone(), entry.ipv6_addr.clone()];
        let state = self.state();
        state.held.get(&key).into_iter().flatten().flat_map(texts).filter_map(|text| text.parse().ok()).collect()
    }

    fn serve(&self) {
        let runtime = self.runtime.as_ref().expect("running");
        let _inside = runtime.enter();
        let listen = |name: &str| UnixListenerStream::new(UnixListener::bind(self.dir.join(name)).expect("a socket"));
        let server = Server(self.state.clone());
        let cni = tonic::transport::Server::builder().add_service(CniBackendServer::new(server.clone()));
        runtime.spawn(cni.serve_with_incoming(listen("ipamd.sock")));
        let policy = tonic::transport::Server::builder().add_service(NpBackendServer::new(server));
        runtime.spawn(policy.serve_with_incoming(listen("npa.sock")));
    }
}

impl Drop for Ipamd {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl State {
    fn allocate(&mut self, interfaces: usize) -> Vec<IpAllocationMetadata> {
        let mut out = Vec::new();
        for device in (0..).take(interfaces) {
            self.next += 1;
            let v4 = format!("10.77.{device}.{}", self.next);
            let v6 = format!("2001:db8::{}", self.next);
            out.push(IpAllocationMetadata {
                ipv4_addr: if self.v6 { String::new() } else { v4 },
                ipv6_addr: if self.v6 { v6 } else { String::new() },
                device_number: device,
                route_table_id: if device == 0 { 254 } else { device + 1 },
                egress_ipv4_addr: String::new(),
            });
        }
        out
    }
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl CniBackend for Server {
    async fn add_network(&self, request: Request<AddNetworkRequest>) -> Result<Response<AddNetworkReply>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.adds.push(request.clone());
        if let Some(hook) = &state.on_add {
            hook();
        }
        if let Some(failure) = state.refuse.clone() {
            return Ok(Response::new(AddNetworkReply { failure: Some(failure), ..Default::default() }));
        }
        if state.refuse_without_reason {
            return Ok(Response::new(AddNetworkReply::default()));
        }
        let interfaces = if request.requires_multi_nic_attachment { 2 } else { 1 };
        let granted = match state.answer.clone() {
            Some(answer) => answer,
            None => state.allocate(interfaces),
        };
        state.held.insert((request.network_name, request.container_id, request.if_name), granted.clone());
        Ok(Response::new(AddNetworkReply {
            success: true,
            ip_allocation_metadata: granted,
            network_policy_mode: state.policy_mode.clone(),
            pod_vlan_id: state.vlan,
            ..Default::default()
        }))
    }

    async fn del_network(&self, request: Request<DelNetworkRequest>) -> Result<Response<DelNetworkReply>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.dels.push(request.clone());
        if let Some(hook) = &state.on_del {
            hook();
        }
        if let Some(status) = state.del_error.clone() {
            return Err(status);
        }
        let key = (request.network_name, request.container_id, request.if_name);
        Ok(Response::new(match state.held.remove(&key) {
            Some(released) => DelNetworkReply {
                success: true,
                ip_allocation_metadata: released,
                network_policy_mode: state.policy_mode.clone(),
                ..Default::default()
            },
            None => DelNetworkReply { failure: Some(unknown_sandbox()), ..Default::default() },
        }))
    }

    async fn check_network(
        &self,
        request: Request<CheckNetworkRequest>,
    ) -> Result<Response<CheckNetworkReply>, Status> {
        let request = request.into_inner();
        let state = self.state();
        if state.is_the_add_on {
            return Err(Status::unimplemented("unknown method CheckNetwork"));
        }
        let key = (request.network_name, request.container_id, request.if_name);
        Ok(Response::new(match state.held.get(&key) {
            Some(held) => CheckNetworkReply { success: true, ip_allocation_metadata: held.clone(), failure: None },
            None => CheckNetworkReply { failure: Some(unknown_sandbox()), ..Default::default() },
        }))
    }

    async fn gc_network(&self, request: Request<GcNetworkRequest>) -> Result<Response<GcNetworkReply>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.gcs.push(request.clone());
        if state.is_the_add_on {
            return Err(Status::unimplemented("unknown method GcNetwork"));
        }
        let live = |key: &Key| request.valid_attachments.iter().any(|a| a.container_id == key.1 && a.if_name == key.2);
        let stale: Vec<Key> =
            state.held.keys().filter(|key| key.0 == request.network_name && !live(key)).cloned().collect();
        let mut named = Vec::new();
        for key in stale {
            let asked = state.adds.iter().rev().find(|add| add.container_id == key.1).cloned().unwrap_or_default();
            named.push(StaleAttachment {
                ip_allocation_metadata: state.held.get(&key).cloned().unwrap_or_default(),
                container_id: key.1,
                if_name: key.2,
                pod_name: asked.pod_name,
                pod_namespace: asked.pod_namespace,
            });
        }
        Ok(Response::new(GcNetworkReply { stale: named, failure: state.gc_failure.clone() }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let state = self.state();
        if state.is_the_add_on {
            return Err(Status::unimplemented("unknown method Status"));
        }
        let ready = state.refuse.is_none();
        Ok(Response::new(StatusReply { ready, failure: state.refuse.clone(), free_addresses: u32::from(ready) }))
    }
}

#[tonic::async_trait]
impl NpBackend for Server {
    async fn enforce_np_to_pod(&self, request: Request<EnforceNpRequest>) -> Result<Response<EnforceNpReply>, Status> {
        let mut state = self.state();
        state.enforced.push(request.into_inner());
        Ok(Response::new(EnforceNpReply { success: !state.policy_refuses }))
    }

    async fn delete_pod_np(&self, request: Request<DeleteNpRequest>) -> Result<Response<DeleteNpReply>, Status> {
        self.state().forgotten.push(request.into_inner());
        Ok(Response::new(DeleteNpReply { success: true }))
    }
}

pub fn failure(reason: Reason, retryable: bool, message: &str) -> Failure {
    Failure { reason: reason.into(), message: message.into(), retryable }
}

fn unknown_sandbox() -> Failure {
    failure(Reason::UnknownSandbox, false, "no allocation is known for this sandbox")
}
