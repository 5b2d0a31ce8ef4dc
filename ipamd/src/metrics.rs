//! Counters and gauges under the add-on's names, so that dashboards and its metrics helper keep working, and ours beside them.

use std::time::Duration;

use flatwire_cloud::CallObserver;
use flatwire_core::audit::AuditReport;
use flatwire_core::pool::{Level, PoolStatus};
use flatwire_core::ports::{CloudError, RepairKind};
use flatwire_kube::Health;
use ipnet::IpNet;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

pub struct Metrics {
    registry: Registry,
    pub add_requests: IntCounter,
    pub del_requests: IntCounterVec,
    pub no_address: IntCounter,
    pub add_failures: IntCounterVec,
    pub cooldown_yielded: IntCounter,
    repairs: IntCounterVec,
    contested: IntGaugeVec,
    pub cloud_repairs: IntCounter,
    pub dead_sandboxes: IntCounter,
    eni_events: IntCounterVec,
    leaked_enis: IntCounterVec,
    released: IntCounterVec,
    findings: IntGaugeVec,
    reason: IntGaugeVec,
    errors: IntCounterVec,
    api_requests: IntCounterVec,
    api_errors: IntCounterVec,
    api_latency: HistogramVec,
    eni_max: IntGauge,
    ip_max: IntGauge,
    enis: IntGauge,
    total: IntGauge,
    assigned: IntGauge,
    cooling: IntGauge,
    free: IntGauge,
    waiting: IntGauge,
    level: IntGauge,
    prefixes: IntGauge,
    per_eni: IntGaugeVec,
    pub kube_lists: IntCounterVec,
    pub kube_failures: IntCounterVec,
    pub kube_writes: IntCounterVec,
    pub kube_complaints: IntGauge,
    kube_age: IntGaugeVec,
    pub add_seconds: HistogramVec,
}

impl Metrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let buckets = vec![0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0];
        let histogram = |name: &str, help: &str, labels: &[&str]| -> Result<HistogramVec, prometheus::Error> {
            let metric = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.clone()), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let per_eni = gauges("awscni_assigned_ip_per_eni", "pods on each ENI", &["eni"])?;
        let build = gauges("awscni_build_info", "1, labelled with the version", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            add_requests: counter("awscni_add_ip_req_count", "ADD requests")?,
            del_requests: counters("awscni_del_ip_req_count", "DEL requests", &["reason"])?,
            no_address: counter("awscni_no_available_ip_addresses", "ADDs that ended without an address")?,
            add_failures: counters("flatwire_add_failures_total", "ADDs that failed, by cause", &["reason"])?,
            cooldown_yielded: counter("flatwire_cooldown_yielded_total", "cooling addresses given early")?,
            repairs: counters("flatwire_kernel_repairs_total", "things put right in the kernel", &["kind"])?,
            contested: gauges(
                "flatwire_kernel_contested",
                "things in the kernel that somebody keeps changing",
                &["kind"],
            )?,
            cloud_repairs: counter("flatwire_cloud_repairs_total", "differences between EC2 and the ledger put right")?,
            dead_sandboxes: counter(
                "flatwire_dead_sandboxes_total",
                "sandboxes released because the kernel lost them",
            )?,
            eni_events: counters("flatwire_eni_events_total", "steps of ENIs on their way in and out", &["event"])?,
            leaked_enis: counters("flatwire_leaked_enis_total", "unattached ENIs of the cluster, by step", &["event"])?,
            released: counters("flatwire_released_total", "addresses and prefixes given back to EC2", &["kind"])?,
            findings: gauges("flatwire_audit_findings", "differences that the last audit found", &["kind"])?,
            reason: gauges(
                "flatwire_no_address_reason",
                "1 for why an ADD that came now would not be served at once",
                &["reason"],
            )?,
            errors: counters("awscni_ipamd_error_count", "errors by where they arose", &["fn"])?,
            api_requests: counters("awscni_ec2api_req_count", "calls to EC2 and IMDS", &["fn"])?,
            api_errors: counters("awscni_aws_api_error_count", "failed calls by error class", &["api", "error"])?,
            api_latency: histogram("flatwire_aws_api_seconds", "time of a call with its attempts", &["api"])?,
            eni_max: gauge("awscni_eni_max", "ENIs this node may use")?,
            ip_max: gauge("awscni_ip_max", "addresses this node could hold")?,
            enis: gauge("awscni_eni_allocated", "ENIs in use")?,
            total: gauge("awscni_total_ip_addresses", "addresses held")?,
            assigned: gauge("awscni_assigned_ip_addresses", "addresses of pods")?,
            cooling: gauge("flatwire_cooling_ip_addresses", "addresses freed too recently to be reused")?,
            free: gauge("flatwire_free_ip_addresses", "addresses that could be given this moment")?,
            waiting: gauge("flatwire_waiting_adds", "ADDs waiting for an address")?,
            level: gauge("flatwire_level", "what the daemon may do in EC2: 0 all, 1 no release, 2 nothing")?,
            prefixes: gauge("awscni_total_ipv4_prefixes", "/28 prefixes held")?,
            per_eni,
            kube_lists: counters(
                "flatwire_kube_lists_total",
                "lists of the API server: each watch begins with one",
                &["resource"],
            )?,
            kube_failures: counters("flatwire_kube_failures_total", "lists and watches that failed", &["resource"])?,
            kube_writes: counters("flatwire_kube_writes_total", "writes to the API server", &["kind", "outcome"])?,
            kube_complaints: gauge("flatwire_kube_invalid_settings", "what the API server says and cannot be used")?,
            kube_age: gauges(
                "flatwire_kube_silence_seconds",
                "since the API server was last heard of, by what is watched",
                &["resource"],
            )?,
            add_seconds: histogram("flatwire_add_seconds", "time to answer an ADD", &["outcome"])?,
            registry,
        })
    }

    pub fn error(&self, place: &str) {
        self.errors.with_label_values(&[place]).inc();
    }

    pub fn repaired(&self, kind: RepairKind) {
        self.repairs.with_label_values(&[kind.as_str()]).inc();
    }

    /// `event` is one of the few that the pool names.
    pub fn eni_event(&self, event: &'static str) {
        self.eni_events.with_label_values(&[label(event).as_str()]).inc();
    }

    pub fn leaked_eni(&self, event: &'static str) {
        self.leaked_enis.with_label_values(&[label(event).as_str()]).inc();
    }

    pub fn released<'s>(&self, slots: impl IntoIterator<Item = &'s IpNet>) {
        for slot in slots {
            let kind = if slot.prefix_len() == slot.max_prefix_len() { "address" } else { "prefix" };
            self.released.with_label_values(&[kind]).inc();
        }
    }

    pub fn audited(&self, report: &AuditReport) {
        self.findings.reset();
        for finding in &report.findings {
            self.findings.with_label_values(&[finding.kind.as_str()]).inc();
        }
    }

    /// Everything in the text format, with the gauges as the pool stands now.
    pub fn render(&self, status: Option<&PoolStatus>, kubernetes: Option<&Health>) -> String {
        for (resource, watch) in kubernetes.iter().flat_map(|health| &health.watches) {
            if let Some(heard_secs) = watch.heard_secs {
                let heard_secs = i64::try_from(heard_secs).unwrap_or(i64::MAX);
                self.kube_age.with_label_values(&[resource.as_str()]).set(heard_secs);
            }
        }
        if let Some(status) = status {
            self.set_gauges(status);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    fn set_gauges(&self, status: &PoolStatus) {
        let counts = &status.counts;
        for (gauge, value) in [
            (&self.eni_max, status.max_enis),
            (&self.ip_max, status.max_addresses),
            (&self.total, counts.total),
            (&self.assigned, counts.assigned),
            (&self.cooling, counts.cooling),
            (&self.free, status.free),
            (&self.waiting, counts.waiting),
            (&self.prefixes, counts.prefixes),
        ] {
            gauge.set(i64::from(value));
        }
        self.enis.set(i64::try_from(status.enis.len()).unwrap_or(i64::MAX));
        self.level.set(match status.node_state.level {
            Level::Normal => 0,
            Level::NoRelease => 1,
            Level::NoCloud => 2,
        });
        self.reason.reset();
        if let Some(failure) = &status.failure {
            self.reason.with_label_values(&[failure.reason.to_string().as_str()]).set(1);
        }
        self.contested.reset();
        for contest in &status.contests {
            self.contested.with_label_values(&[contest.kind.as_str()]).inc();
        }
        self.per_eni.reset();
        for eni in &status.enis {
            self.per_eni.with_label_values(&[eni.id.as_str()]).set(i64::from(eni.pods));
        }
    }
}

/// `in service` becomes `in_service`; what follows a colon is detail.
fn label(event: &'static str) -> String {
    event.split([':', ',']).next().unwrap_or(event).replace(' ', "_")
}

impl CallObserver for Metrics {
    fn observed(&self, action: &str, outcome: Result<(), &CloudError>, latency: Duration) {
        self.api_requests.with_label_values(&[action]).inc();
        self.api_latency.with_label_values(&[action]).observe(latency.as_secs_f64());
        if let Err(error) = outcome {
            // The class and not the text: a label must have few values.
            self.api_errors.with_label_values(&[action, &format!("{:?}", error.kind)]).inc();
        }
    }
}
