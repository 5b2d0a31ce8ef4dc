//! `ipamd run`: the composition root. Opens the ledger, starts the loop over it, serves, and stops in order.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use flatwire_cloud::AwsCloud;
use flatwire_core::error::chain;
use flatwire_core::ledger::LedgerState;
use flatwire_core::pool::{ImportedPod, Pool};
use flatwire_kernel::node::NodeKernel;
use flatwire_kube::Adapter;
use flatwire_store::journal::Journal;
use flatwire_store::{StoreError, checkpoint};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::{self, Config, RunArgs};
use crate::driver::{Driver, wall_clock};
use crate::grpc::{self, Service};
use crate::http::{self, Pages};
use crate::install;
use crate::kube;
use crate::metrics::Metrics;
use crate::node_state::NodeStateFile;
use crate::probe::Probe;

/// How long requests under way may take after a stop was asked for; the kubelet kills after more.
const STOP_WITHIN: Duration = Duration::from_secs(5);

pub fn run(args: RunArgs, probe: impl Probe) -> anyhow::Result<()> {
    let config = Config::parse(&args, |name| std::env::var(name).ok())?;
    start_log(&config)?;
    die_on_panic();
    for leniency in &config.leniencies {
        tracing::warn!("{leniency}");
    }
    for (variable, why) in &config.without_effect {
        tracing::info!(variable, why, "set, and without effect");
    }
    for variable in config::unknown(std::env::vars().map(|(name, _)| name)) {
        tracing::warn!(variable, "no setting of this version, so without effect: see its spelling");
    }
    if let Some(socket) = config.absent_policy_agent() {
        let (socket, variable) = (socket.display(), "NETWORK_POLICY_ENFORCING_MODE");
        tracing::warn!(%socket, "{variable} is set, and no policy agent is there: no pod starts until one is, or it is unset");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(config, probe))
}

async fn serve(config: Config, probe: impl Probe) -> anyhow::Result<()> {
    // The ledger's lock first: a second daemon must touch neither the ledger nor the socket of the first.
    let (journal, opened) = Journal::open(&config.ledger)?;
    if opened.dropped_bytes > 0 {
        tracing::warn!(bytes = opened.dropped_bytes, "cut a torn last line off the ledger, the trace of a crash");
    }
    let imported = pods_left_here(&config.checkpoint, &opened.state);
    let metrics = Arc::new(Metrics::new()?);
    let cloud = AwsCloud::connect(config.cloud(), metrics.clone())?;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = u64::from(since_epoch.subsec_nanos()) ^ (u64::from(std::process::id()) << 32);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        pods = opened.state.pods.len(),
        enis = opened.state.enis.len(),
        policy = ?config.settings.policy,
        mode = ?config.settings.mode,
        "ipamd starts"
    );
    let driver = Driver {
        pool: Pool::new(config.settings, opened.state, seed, wall_clock()),
        journal,
        cloud: Arc::new(cloud),
        kernel: Arc::new(NodeKernel::open()?),
        runtime: tokio::runtime::Handle::current(),
        metrics: metrics.clone(),
        checkpoint: config.checkpoint,
        imported,
        release_queue: config.release_queue,
        node_state: NodeStateFile::new(config.node_state),
        probe,
    };
    let pool = driver.start().context("start the pool's thread")?;
    let kubernetes = kube::start(config.kubernetes, pool.clone(), metrics.clone());
    let teller = kubernetes.as_ref().map(Adapter::teller);
    let pages = Pages { pool: pool.clone(), metrics: metrics.clone(), kubernetes };
    if let Some(address) = config.metrics {
        http::start("metrics", address, http::metrics_pages(pages.clone())).await;
    }
    if let Some(address) = config.introspection {
        http::start("introspection", address, http::introspection_pages(pages)).await;
    }
    // The socket last: whoever finds it finds everything else in place.
    let listener = {
        let _served_there = pool.serving().enter();
        grpc::listen(&config.socket)?
    };
    if let Some(dir) = config.plugin.conf_dir.clone() {
        let (conflist, missing) = install::conflist(&config.plugin);
        for plugin in missing {
            tracing::warn!(plugin, "not on this node, so not in the conflist; host ports need portmap");
        }
        tokio::spawn(install::when_ready(pool.clone(), dir, conflist));
    }
    let service = Service { pool: pool.clone(), metrics, network_policy_mode: config.network_policy_mode, teller };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = pool.serving().spawn(grpc::serve(listener, service, async {
        let _ = stopped.await;
    }));
    let why = stop_signal().await?;
    tracing::info!(why, "stopping: no new requests, waiting pods are sent away");
    let _ = stop.send(());
    // While the ledger's lock is held: afterwards the path may be the next daemon's.
    match std::fs::remove_file(&config.socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => tracing::warn!(error = %e, "the socket stays behind"),
        _ => {}
    }
    pool.stop().await;
    if tokio::time::timeout(STOP_WITHIN, server).await.is_err() {
        tracing::warn!(seconds = STOP_WITHIN.as_secs(), "requests were still under way");
    }
    tracing::info!("stopped");
    Ok(())
}

/// The pods that the add-on, or a ledger that was lost, left on this node: asked only by a ledger that has never had a pod.
///
/// A file that cannot be used does not stop the start. A node that gives no pod a network is worse than one that does not
/// know the names of its old pods, and no address is given twice for it: the kernel routes every pod that runs, and an
/// address with a pod route is in use whatever ledger and file say. The file is moved aside, because ours takes its place.
fn pods_left_here(path: &Path, ledger: &LedgerState) -> Vec<ImportedPod> {
    if !ledger.pods.is_empty() || !ledger.freed.is_empty() {
        return Vec::new();
    }
    let error = match checkpoint::read(path) {
        Ok(pods) => {
            if !pods.is_empty() {
                tracing::info!(pods = pods.len(), file = %path.display(), "the ledger is new: taking over these pods");
            }
            return pods;
        }
        Err(error) => error,
    };
    let mut aside = path.as_os_str().to_owned();
    aside.push(".unusable");
    let aside = Path::new(&aside);
    let kept = match &error {
        StoreError::Checkpoint { .. } => std::fs::rename(path, aside).map(|()| aside),
        _ => Ok(path),
    };
    match kept {
        Ok(kept) => {
            tracing::error!(error = %chain(&error), kept_as = %kept.display(), "started without its pods")
        }
        Err(why) => tracing::error!(error = %chain(&error), %why, "started without its pods, and it is lost"),
    }
    Vec::new()
}

pub async fn stop_signal() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

/// A panic on any thread ends the daemon: half of one that still answers is worse than a restart, which serves from the ledger.
fn die_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tracing::error!(panic = %info, "a bug: ipamd ends and is to be started again");
        report(info);
        std::process::abort();
    }));
}

/// JSON lines for machines, readable ones on a terminal.
fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log_filter).context("AWS_VPC_K8S_CNI_LOGLEVEL")?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match config.log_file.as_str() {
        "stderr" if std::io::IsTerminal::is_terminal(&std::io::stderr()) => {
            builder.with_writer(std::io::stderr).init();
        }
        "stderr" => builder.json().flatten_event(true).with_writer(std::io::stderr).init(),
        "stdout" => builder.json().flatten_event(true).init(),
        path => match log_file(Path::new(path)) {
            Ok(file) => builder.json().flatten_event(true).with_writer(Arc::new(file)).init(),
            // The add-on's file is one of its own container. Pods need the daemon more than the file.
            Err(error) => {
                builder.json().flatten_event(true).with_writer(std::io::stderr).init();
                tracing::warn!(path, %error, "AWS_VPC_K8S_CNI_LOG_FILE cannot be written: the log goes to stderr");
            }
        },
    }
    Ok(())
}

fn log_file(path: &Path) -> std::io::Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::ids::Time;

    const ONE_POD: &str = r#"{"version":"vpc-cni-ipam/1","allocations":[{"networkName":"aws-cni","containerID":"c1","#;

    #[test]
    fn a_ledger_without_a_past_takes_over_the_pods_it_finds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ipam.json");
        assert_eq!(pods_left_here(&path, &LedgerState::default()), Vec::new());
        let text = format!(r#"{ONE_POD}"ifName":"eth0","ipv4":"10.0.0.9"}}]}}"#);
        std::fs::write(&path, &text).unwrap();
        let found = pods_left_here(&path, &LedgerState::default());
        assert_eq!(found.iter().map(|pod| pod.address.to_string()).collect::<Vec<_>>(), ["10.0.0.9"]);
        // A ledger that has had pods knows better than a file that follows it.
        let mut lived = LedgerState::default();
        lived.freed.insert("10.0.0.9".parse().unwrap(), Time(1));
        assert_eq!(pods_left_here(&path, &lived), Vec::new());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn an_unusable_file_is_kept_aside_and_does_not_stop_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ipam.json");
        std::fs::write(&path, ONE_POD).unwrap();
        assert_eq!(pods_left_here(&path, &LedgerState::default()), Vec::new());
        assert!(!path.exists());
        assert_eq!(std::fs::read_to_string(dir.path().join("ipam.json.unusable")).unwrap(), ONE_POD);
    }
}
