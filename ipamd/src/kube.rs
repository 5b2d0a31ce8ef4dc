//! The daemon as the API server's adapter sees it, and the adapter as the daemon's metrics see it.

use std::sync::Arc;

use flatwire_core::pool::{PoolStatus, Said};
use flatwire_kube::{Adapter, Config, Observer, PodAddresses, Report, WriteKind, WriteOutcome};

use crate::driver::Handle;
use crate::metrics::Metrics;

/// Starts the adapter, or says why the API server is not called.
pub fn start(config: Result<Config, &'static str>, pool: Handle, metrics: Arc<Metrics>) -> Option<Adapter> {
    match config {
        Ok(config) => {
            tracing::info!(server = config.server, node = config.node, "the API server is called");
            Some(Adapter::start(config, Arc::new(Pool(pool)), metrics))
        }
        Err(why) => {
            tracing::info!(why, "the API server is not called");
            None
        }
    }
}

struct Pool(Handle);

impl flatwire_kube::Daemon for Pool {
    fn hear(&self, said: Said) {
        self.0.said(said);
    }

    async fn report(&self) -> Option<Report> {
        self.0.status().await.ok().map(report)
    }
}

fn report(status: PoolStatus) -> Report {
    let v6_only = status.settings.families.is_v6_only();
    let most = match (&status.node, v6_only) {
        (None, _) => 0,
        // A prefix has more addresses than anybody has pods.
        (Some(_), true) => status.settings.max_pods,
        (Some(_), false) => status.max_addresses.min(status.settings.max_pods),
    };
    let pods = status.pods.into_iter().map(|allocation| PodAddresses {
        // What a pod of an IPv6 cluster reaches IPv4 with is not its address.
        addresses: allocation.addresses().take(if v6_only { 1 } else { 2 }).collect(),
        pod: allocation.pod,
        since: allocation.at,
    });
    Report {
        shortage: status.failure.filter(|_| !status.ready),
        total: status.counts.total,
        most,
        pods: pods.collect(),
    }
}

impl Observer for Metrics {
    fn listed(&self, resource: &'static str) {
        self.kube_lists.with_label_values(&[resource]).inc();
    }

    fn failed(&self, resource: &'static str) {
        self.kube_failures.with_label_values(&[resource]).inc();
    }

    fn wrote(&self, kind: WriteKind, outcome: WriteOutcome) {
        self.kube_writes.with_label_values(&[kind.to_string(), outcome.to_string()]).inc();
    }

    fn complaints(&self, count: usize) {
        self.kube_complaints.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
