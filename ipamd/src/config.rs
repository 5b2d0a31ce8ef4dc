//! Where things are: paths, addresses and endpoints of the daemon. What the pool should do is `flatwire_core::settings`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

/// The introspection address of the add-on, which its log collector asks.
pub const INTROSPECTION: &str = "127.0.0.1:61679";

#[derive(Args, Debug, Clone)]
pub struct RunArgs {
    /// Unix socket for the plugin.
    #[arg(long, env = "FLATWIRE_SOCKET", default_value = "/var/run/aws-node/ipamd.sock")]
    pub socket: PathBuf,
    /// The ledger: an append-only journal.
    #[arg(long, env = "FLATWIRE_LEDGER", default_value = "/var/run/aws-node/flatwire.journal")]
    pub ledger: PathBuf,
    /// The add-on's state file, kept current for a rollback.
    #[arg(long, env = "AWS_VPC_K8S_CNI_BACKING_STORE", default_value = "/var/run/aws-node/ipam.json")]
    pub checkpoint: PathBuf,
    /// Where the plugin leaves releases that found no daemon.
    #[arg(long, env = "FLATWIRE_RELEASE_QUEUE", default_value = "/var/run/aws-node/releases")]
    pub release_queue: PathBuf,
    /// Address of the Prometheus metrics.
    #[arg(long, env = "FLATWIRE_METRICS_BIND_ADDRESS", default_value = "0.0.0.0:61678")]
    pub metrics: SocketAddr,
    /// Do not serve metrics.
    #[arg(long, env = "DISABLE_METRICS", default_value = "false", action = clap::ArgAction::Set)]
    pub disable_metrics: bool,
    /// Address of the introspection pages.
    #[arg(long, env = "INTROSPECTION_BIND_ADDRESS", default_value = INTROSPECTION)]
    pub introspection: SocketAddr,
    /// Do not serve introspection; `ipamd status` then has nobody to ask.
    #[arg(long, env = "DISABLE_INTROSPECTION", default_value = "false", action = clap::ArgAction::Set)]
    pub disable_introspection: bool,
    /// EC2 endpoint, for a VPC endpoint or a simulated EC2.
    #[arg(long, env = "AWS_EC2_ENDPOINT")]
    pub ec2_endpoint: Option<String>,
    /// Instance metadata endpoint.
    #[arg(long, env = "AWS_EC2_METADATA_SERVICE_ENDPOINT")]
    pub imds_endpoint: Option<String>,
    /// Longest wait for one HTTP answer of EC2, in seconds.
    #[arg(long, env = "HTTP_TIMEOUT", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=120))]
    pub http_timeout: u64,
    /// debug, info, warn or error; a tracing filter such as `ipamd=debug,warn` also works.
    #[arg(long, env = "AWS_VPC_K8S_CNI_LOGLEVEL", default_value = "info")]
    pub log_level: String,
    /// stderr, stdout, or a file.
    #[arg(long, env = "AWS_VPC_K8S_CNI_LOG_FILE", default_value = "stderr")]
    pub log_file: String,
    /// Policy mode handed to the plugin and the network policy agent; empty keeps the plugin away from the agent.
    #[arg(
        long,
        env = "NETWORK_POLICY_ENFORCING_MODE",
        default_value = "",
        value_parser = clap::builder::PossibleValuesParser::new(["", "none", "standard", "strict"])
    )]
    pub network_policy_mode: String,
}
