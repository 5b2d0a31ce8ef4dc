//! Metrics on 61678 and introspection on 127.0.0.1:61679, at the add-on's paths, with our own beside them: `/v1/status`,
//! `/v1/audit` and `/v1/explain/…`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use flatwire_core::ids::{EniId, PodName};
use flatwire_core::netplan::{PortChoice, Snat};
use flatwire_core::pool::{Answer, Event, PoolStatus, Question};
use flatwire_core::target::Policy;
use flatwire_kube::Adapter;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::driver::Handle;
use crate::metrics::Metrics;

/// A port that is taken is tried again, up to this far apart; the pool does not wait for it.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Pages {
    pub pool: Handle,
    pub metrics: Arc<Metrics>,
    /// `None`: the API server is not called.
    pub kubernetes: Option<Adapter>,
}

pub fn metrics_pages(pages: Pages) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(pages)
}

pub fn introspection_pages(pages: Pages) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/audit", get(audit))
        .route("/v1/explain/pod/{namespace}/{name}", get(explain_pod))
        .route("/v1/explain/address/{address}", get(explain_address))
        .route("/v1/explain/eni/{eni}", get(explain_eni))
        .route("/v1/explain/target", get(|pages| explain(pages, Question::Target)))
        .route("/v1/enis", get(enis))
        .route("/v1/eni-configs", get(eni_configs))
        .route("/v1/networkutils-env-settings", get(network_settings))
        .route("/v1/ipamd-env-settings", get(ipamd_settings))
        .fallback(get(index))
        .with_state(pages)
}

/// Binds once before it returns, and serves for as long as the daemon lives. Never fatal: pods come first.
pub async fn start(name: &'static str, address: SocketAddr, pages: Router) {
    let bound = TcpListener::bind(address).await;
    tokio::spawn(serve(name, address, pages, bound));
}

async fn serve(name: &'static str, address: SocketAddr, pages: Router, mut bound: std::io::Result<TcpListener>) {
    let mut wait = Duration::from_secs(1);
    loop {
        let outcome = match bound {
            Ok(listener) => axum::serve(listener, pages.clone()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::warn!(name, %address, %error, retry_secs = wait.as_secs(), "cannot serve");
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_RETRY);
        bound = TcpListener::bind(address).await;
    }
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let status = pages.pool.status().await.ok();
    let health = pages.kubernetes.as_ref().map(Adapter::health);
    let text = pages.metrics.render(status.as_ref(), health.as_ref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn ready(State(pages): State<Pages>) -> Response {
    match pages.pool.status().await {
        Ok(status) if status.ready => (StatusCode::OK, "ready\n".to_owned()).into_response(),
        Ok(status) => {
            let why = status.failure.map_or_else(|| "starting".to_owned(), |failure| failure.message);
            unavailable(why)
        }
        Err(error) => unavailable(error),
    }
}

async fn index() -> Response {
    json_page(&json!({ "AvailableCommands": [
        "/v1/enis", "/v1/eni-configs", "/v1/networkutils-env-settings", "/v1/ipamd-env-settings", "/v1/status",
        "/v1/audit", "/v1/explain/pod/{namespace}/{name}", "/v1/explain/address/{address}", "/v1/explain/eni/{eni}",
        "/v1/explain/target",
    ]}))
}

async fn status(State(pages): State<Pages>) -> Response {
    with_status(&pages, |status| {
        let mut page = serde_json::to_value(status).unwrap_or_default();
        if let Some(kubernetes) = &pages.kubernetes {
            page["kubernetes"] = serde_json::to_value(kubernetes.health()).unwrap_or_default();
        }
        page
    })
    .await
}

/// Reads EC2 and the kernel before it answers.
async fn audit(State(pages): State<Pages>) -> Response {
    match pages.pool.ask(|request| Event::Audit { request }).await {
        Ok(Answer::Audited(report)) => {
            pages.metrics.audited(&report);
            json_page(&serde_json::to_value(report).unwrap_or_default())
        }
        Ok(Answer::Failed(failure)) => unavailable(failure.message),
        Ok(other) => unavailable(format!("the pool gave an answer of another kind: {other:?}")),
        Err(error) => unavailable(error),
    }
}

async fn explain_pod(pages: State<Pages>, Path((namespace, name)): Path<(String, String)>) -> Response {
    explain(pages, Question::Pod(PodName { namespace, name })).await
}

async fn explain_address(pages: State<Pages>, Path(address): Path<IpAddr>) -> Response {
    explain(pages, Question::Address(address)).await
}

async fn explain_eni(pages: State<Pages>, Path(eni): Path<EniId>) -> Response {
    explain(pages, Question::Eni(eni)).await
}

async fn explain(State(pages): State<Pages>, question: Question) -> Response {
    match pages.pool.look(move |pool, now| pool.explain(&question, now)).await {
        Ok(answer) => json_page(&serde_json::to_value(answer).unwrap_or_default()),
        Err(error) => unavailable(error),
    }
}

async fn enis(State(pages): State<Pages>) -> Response {
    with_status(&pages, add_on_enis).await
}

/// The name of this node's ENIConfig.
async fn eni_configs(State(pages): State<Pages>) -> Response {
    match pages.kubernetes.and_then(|adapter| adapter.health().eni_config) {
        Some(name) => json_page(&json!(name)),
        None => (StatusCode::NOT_FOUND, "no ENIConfig of the API server is in use\n").into_response(),
    }
}

async fn network_settings(State(pages): State<Pages>) -> Response {
    with_status(&pages, |status| {
        let settings = &status.settings;
        let cidrs: Vec<String> = settings.exclude_snat.iter().map(ToString::to_string).collect();
        json!({
            "AWS_VPC_K8S_CNI_CONNMARK": settings.marks.primary,
            "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS": cidrs,
            "AWS_VPC_K8S_CNI_EXTERNALSNAT": settings.snat == Snat::External,
            "AWS_VPC_ENI_MTU": settings.mtu,
            "AWS_VPC_K8S_CNI_VETHPREFIX": settings.veth_prefix,
            "AWS_VPC_CNI_NODE_PORT_SUPPORT": settings.node_port,
            "AWS_VPC_K8S_CNI_RANDOMIZESNAT": match settings.snat {
                Snat::ToPrimary(PortChoice::Keep) => 0,
                Snat::ToPrimary(PortChoice::Random) => 1,
                Snat::ToPrimary(PortChoice::FullyRandom) | Snat::External => 2,
            },
        })
    })
    .await
}

async fn ipamd_settings(State(pages): State<Pages>) -> Response {
    with_status(&pages, |status| match status.settings.policy {
        Policy::AddOn(warm) => json!({
            "WARM_ENI_TARGET": warm.warm_eni,
            "WARM_IP_TARGET": warm.warm_ip,
            "MINIMUM_IP_TARGET": warm.minimum_ip,
            "WARM_PREFIX_TARGET": warm.warm_prefix,
        }),
        Policy::Demand => json!({ "policy": "demand" }),
    })
    .await
}

async fn with_status(pages: &Pages, page: impl FnOnce(&PoolStatus) -> Value) -> Response {
    match pages.pool.status().await {
        Ok(status) => json_page(&page(&status)),
        Err(error) => unavailable(error),
    }
}

fn unavailable(why: impl std::fmt::Display) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}

fn json_page(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response()
}

/// The add-on's shape: by network card, then by ENI, with container ids blanked.
fn add_on_enis(status: &PoolStatus) -> Value {
    let mut by_eni = serde_json::Map::new();
    for eni in &status.enis {
        let mut cidrs = serde_json::Map::new();
        for slot in &eni.slots {
            let Ok(net) = slot.parse::<ipnet::IpNet>() else { continue };
            let mut addresses = serde_json::Map::new();
            for pod in status.pods.iter().filter(|pod| net.contains(&pod.address)) {
                let entry = json!({
                    "Address": pod.address,
                    "IPAMKey": { "networkName": pod.sandbox.network, "containerID": "", "ifName": "" },
                    "IPAMMetadata": { "k8sPodNamespace": pod.pod.namespace, "k8sPodName": pod.pod.name },
                });
                addresses.insert(pod.address.to_string(), entry);
            }
            let cidr = json!({
                "Cidr": { "IP": net.network(), "Mask": net.netmask().to_string() },
                "IPAddresses": addresses,
                "IsPrefix": net.prefix_len() != net.max_prefix_len(),
                "AddressFamily": "",
            });
            cidrs.insert(slot.clone(), cidr);
        }
        let row = json!({
            "ID": eni.id,
            "IsPrimary": eni.device.0 == 0,
            "IsTrunk": false,
            "IsEFA": false,
            "DeviceNumber": eni.device,
            "AvailableIPv4Cidrs": cidrs,
            "IPv6Cidrs": {},
            "IsExcludedForPodIPs": false,
            "RouteTableID": eni.table,
            "SubnetID": eni.subnet,
        });
        by_eni.insert(eni.id.to_string(), row);
    }
    let card = json!({ "TotalIPs": status.counts.total, "AssignedIPs": status.counts.assigned, "ENIs": by_eni });
    json!({ "0": card })
}
