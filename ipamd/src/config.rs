//! Where things are: paths, addresses and endpoints of the daemon. What the pool should do is `flatwire_core::settings`.
//!
//! Each is a variable, and an option of the command line that overrules it. They are read by the same strict reader as the
//! settings of the pool, so that one start shows everything that is wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use flatwire_core::settings::{Leniency, Reader, SETTINGS, SettingError, Settings, WITHOUT_EFFECT};
use tracing_subscriber::EnvFilter;

/// The introspection address of the add-on, which its log collector asks.
pub const INTROSPECTION: &str = "127.0.0.1:61679";
/// Where the state of this node as others see it lies.
pub const NODE_STATE: &str = "/var/run/aws-node/node-state.json";
/// Where the add-on's log collector looks for it.
const PLUGIN_LOG: &str = "/var/log/aws-routed-eni/plugin.log";
const LENIENT: &str = "FLATWIRE_LENIENT_SETTINGS";

struct Place {
    option: &'static str,
    variable: &'static str,
    default: &'static str,
    meaning: &'static str,
}

const fn place(option: &'static str, variable: &'static str, default: &'static str, meaning: &'static str) -> Place {
    Place { option, variable, default, meaning }
}

/// Every variable that is read here. `docs/settings.md` is checked against this text.
const PLACES: &[Place] = &[
    place("socket", "FLATWIRE_SOCKET", "/var/run/aws-node/ipamd.sock", "unix socket for the plugin"),
    place("ledger", "FLATWIRE_LEDGER", "/var/run/aws-node/flatwire.journal", "the ledger: an append-only journal"),
    place(
        "checkpoint",
        "AWS_VPC_K8S_CNI_BACKING_STORE",
        "/var/run/aws-node/ipam.json",
        "the add-on's state file, kept current for a rollback",
    ),
    place(
        "release-queue",
        "FLATWIRE_RELEASE_QUEUE",
        "/var/run/aws-node/releases",
        "where the plugin leaves releases that found no daemon",
    ),
    place(
        "node-state",
        "FLATWIRE_NODE_STATE",
        NODE_STATE,
        "what operators and the API server's watcher say of this node",
    ),
    place("metrics", "FLATWIRE_METRICS_BIND_ADDRESS", "0.0.0.0:61678", "address of the Prometheus metrics"),
    place("disable-metrics", "DISABLE_METRICS", "false", "do not serve metrics"),
    place("introspection", "INTROSPECTION_BIND_ADDRESS", INTROSPECTION, "address of the introspection pages"),
    place(
        "disable-introspection",
        "DISABLE_INTROSPECTION",
        "false",
        "do not serve introspection; `ipamd status` then has nobody to ask",
    ),
    place("ec2-endpoint", "AWS_EC2_ENDPOINT", "", "EC2 endpoint, for a VPC endpoint or a simulated EC2"),
    place("imds-endpoint", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "", "instance metadata endpoint"),
    place("http-timeout", "HTTP_TIMEOUT", "10", "longest wait for one HTTP answer of EC2, in seconds from 1 to 120"),
    place(
        "log-level",
        "AWS_VPC_K8S_CNI_LOGLEVEL",
        "info",
        "debug, info, warn or error; a tracing filter such as `ipamd=debug,warn` also works",
    ),
    place("log-file", "AWS_VPC_K8S_CNI_LOG_FILE", "stderr", "stderr, stdout, or a file"),
    place(
        "network-policy-mode",
        "NETWORK_POLICY_ENFORCING_MODE",
        "",
        "none, standard or strict, for the plugin and the policy agent; empty keeps the plugin away from the agent",
    ),
    place(
        "cni-conf-dir",
        "HOST_CNI_CONFDIR_PATH",
        "",
        "folder that 10-aws.conflist is written to once a pod could be given an address; empty: not written",
    ),
    place(
        "cni-bin-dir",
        "HOST_CNI_BIN_PATH",
        "",
        "folder of the node's plugins: the conflist names portmap and bandwidth only if they are there; empty: they are",
    ),
    place("pod-mtu", "POD_MTU", "", "MTU of pods, in the conflist (576 to 9001); empty: AWS_VPC_ENI_MTU"),
    place("plugin-log-file", "AWS_VPC_K8S_PLUGIN_LOG_FILE", PLUGIN_LOG, "log of the plugin, in the conflist"),
    place(
        "plugin-log-level",
        "AWS_VPC_K8S_PLUGIN_LOG_LEVEL",
        "info",
        "debug, info, warn or error for the plugin, in the conflist",
    ),
    place(
        "bandwidth-plugin",
        "ENABLE_BANDWIDTH_PLUGIN",
        "false",
        "chain the plugin bandwidth behind ours in the conflist",
    ),
    place(
        "kubernetes",
        "FLATWIRE_KUBERNETES",
        "true",
        "call the API server, where it and MY_NODE_NAME are known; false: never",
    ),
    place("api-server", "CLUSTER_ENDPOINT", "", "URL of the API server; empty: the one Kubernetes names to its pods"),
    place("node-name", "MY_NODE_NAME", "", "name of this node's Node object; empty: the API server is not called"),
    place("pod-name", "MY_POD_NAME", "", "name of the daemon's pod, as the reporter of events; empty: the node's"),
    place("annotate-pods", "ANNOTATE_POD_IP", "false", "write pods' addresses to vpc.amazonaws.com/pod-ips"),
    place(
        "eni-config-annotation",
        "ENI_CONFIG_ANNOTATION_DEF",
        "k8s.amazonaws.com/eniConfig",
        "node annotation that names the ENIConfig, with custom networking",
    ),
    place(
        "eni-config-label",
        "ENI_CONFIG_LABEL_DEF",
        "k8s.amazonaws.com/eniConfig",
        "node label that names it where the annotation does not",
    ),
    place(
        "lenient-settings",
        "FLATWIRE_LENIENT_SETTINGS",
        "false",
        "for a take-over: warn of a bad value and use what the add-on would, instead of refusing to start",
    ),
];

/// What the command line said of places; the rest is in the environment.
#[derive(Debug, Clone)]
pub struct RunArgs(BTreeMap<&'static str, String>);

impl Args for RunArgs {
    fn augment_args(command: Command) -> Command {
        command.args(PLACES.iter().map(|place| {
            let default =
                if place.default.is_empty() { String::new() } else { format!(" [default: {}]", place.default) };
            let arg = Arg::new(place.variable).long(place.option).value_name("VALUE").action(ArgAction::Set);
            // A switch may stand without a value.
            let arg = if place.default == "false" { arg.num_args(0..=1).default_missing_value("true") } else { arg };
            arg.help(format!("{} [env: {}]{default}", place.meaning, place.variable))
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for RunArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let said = |place: &Place| Some((place.variable, matches.get_one::<String>(place.variable)?.clone()));
        Ok(Self(PLACES.iter().filter_map(said).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Everything the daemon is told before it starts.
#[derive(Debug, Clone)]
pub struct Config {
    pub socket: PathBuf,
    pub ledger: PathBuf,
    pub checkpoint: PathBuf,
    pub release_queue: PathBuf,
    pub node_state: PathBuf,
    /// `None`: not served.
    pub metrics: Option<SocketAddr>,
    /// `None`: not served.
    pub introspection: Option<SocketAddr>,
    pub ec2_endpoint: Option<String>,
    pub imds_endpoint: Option<String>,
    pub http_timeout: Duration,
    pub log_filter: String,
    pub log_file: String,
    /// As it is handed to the plugin and the policy agent.
    pub network_policy_mode: String,
    pub plugin: PluginConfig,
    pub settings: Settings,
    /// `None`: no API server is called, and why is said in the log.
    pub kubernetes: Result<flatwire_kube::Config, &'static str>,
    /// Bad values that were put up with.
    pub leniencies: Vec<Leniency>,
    /// Variables that are set and change nothing, and why.
    pub without_effect: Vec<(&'static str, &'static str)>,
}

/// What the plugin is told by its conflist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginConfig {
    /// `None`: the conflist is somebody else's matter.
    pub conf_dir: Option<PathBuf>,
    /// `None`: the plugins that are chained behind ours are taken to be there.
    pub bin_dir: Option<PathBuf>,
    pub socket: PathBuf,
    pub release_queue: PathBuf,
    pub veth_prefix: String,
    pub mtu: u32,
    pub log_file: String,
    pub log_level: String,
    pub bandwidth: bool,
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            conf_dir: None,
            bin_dir: None,
            socket: default_of("FLATWIRE_SOCKET").into(),
            release_queue: default_of("FLATWIRE_RELEASE_QUEUE").into(),
            veth_prefix: "eni".to_owned(),
            mtu: 9001,
            log_file: PLUGIN_LOG.to_owned(),
            log_level: default_of("AWS_VPC_K8S_PLUGIN_LOG_LEVEL").to_owned(),
            bandwidth: false,
        }
    }
}

/// Settings that the daemon does not start with.
#[derive(Debug)]
pub struct Refused(pub Vec<SettingError>);

impl std::error::Error for Refused {}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("these settings are not allowed; nothing was started:")?;
        for refusal in &self.0 {
            write!(f, "\n  {refusal}")?;
        }
        let lenient = |refusal: &SettingError| matches!(refusal, SettingError::NotSupported { .. });
        if self.0.iter().any(lenient) {
            write!(
                f,
                "\nto take a node over with the variables it has, {LENIENT}=true passes over what can be passed over"
            )?;
        }
        Ok(())
    }
}

impl Config {
    /// From the command line and, beneath it, the environment. All refusals at once.
    pub fn parse(args: &RunArgs, environment: impl Fn(&str) -> Option<String>) -> Result<Self, Refused> {
        let lookup = |name: &str| args.0.get(name).cloned().or_else(|| environment(name));
        let mut first = Reader::new(lookup);
        let lenient = first.flag(LENIENT, false);
        let mut r = Reader::new(lookup).lenient(lenient);
        let disable_metrics = r.flag("DISABLE_METRICS", false);
        let disable_introspection = r.flag("DISABLE_INTROSPECTION", false);
        let metrics = address(&mut r, "FLATWIRE_METRICS_BIND_ADDRESS");
        let introspection = address(&mut r, "INTROSPECTION_BIND_ADDRESS");
        let mut config = Self {
            socket: path(&r, "FLATWIRE_SOCKET"),
            ledger: path(&r, "FLATWIRE_LEDGER"),
            checkpoint: path(&r, "AWS_VPC_K8S_CNI_BACKING_STORE"),
            release_queue: path(&r, "FLATWIRE_RELEASE_QUEUE"),
            node_state: path(&r, "FLATWIRE_NODE_STATE"),
            metrics: (!disable_metrics).then_some(metrics),
            introspection: (!disable_introspection).then_some(introspection),
            ec2_endpoint: r.text("AWS_EC2_ENDPOINT"),
            imds_endpoint: r.text("AWS_EC2_METADATA_SERVICE_ENDPOINT"),
            http_timeout: Duration::from_secs(r.number("HTTP_TIMEOUT", 1, 120, Some(10)).unwrap_or(10).into()),
            log_filter: log_filter(&mut r),
            log_file: text(&r, "AWS_VPC_K8S_CNI_LOG_FILE"),
            network_policy_mode: network_policy_mode(&mut r),
            plugin: PluginConfig::default(),
            settings: Settings::read(&mut r),
            kubernetes: Err("not asked for"),
            leniencies: Vec::new(),
            without_effect: Vec::new(),
        };
        config.plugin = PluginConfig {
            conf_dir: r.text("HOST_CNI_CONFDIR_PATH").map(PathBuf::from),
            bin_dir: r.text("HOST_CNI_BIN_PATH").map(PathBuf::from),
            socket: config.socket.clone(),
            release_queue: config.release_queue.clone(),
            veth_prefix: config.settings.veth_prefix.clone(),
            mtu: r.strict_number("POD_MTU", 576, 9001, config.settings.mtu),
            log_file: plugin_log_file(&mut r),
            log_level: plugin_log_level(&mut r),
            bandwidth: r.flag("ENABLE_BANDWIDTH_PLUGIN", false),
        };
        config.kubernetes = kubernetes(&mut r, config.settings.custom_networking, lenient);
        config.without_effect = WITHOUT_EFFECT.iter().filter(|(name, _)| r.text(name).is_some()).copied().collect();
        match (first.finish(), r.finish()) {
            (Ok(_), Ok(leniencies)) => Ok(Self { leniencies, ..config }),
            (first, second) => Err(Refused(first.err().into_iter().chain(second.err()).flatten().collect())),
        }
    }
}

impl Config {
    /// Where the plugin will look for the network policy agent that it was told to call, if none is there.
    pub fn absent_policy_agent(&self) -> Option<PathBuf> {
        let socket = self.socket.with_file_name("npa.sock");
        (!self.network_policy_mode.is_empty() && !socket.exists()).then_some(socket)
    }

    /// How EC2 and the metadata service are reached.
    pub fn cloud(&self) -> flatwire_cloud::Config {
        flatwire_cloud::Config {
            ec2_endpoint: self.ec2_endpoint.clone(),
            imds_endpoint: self.imds_endpoint.clone(),
            http_timeout: self.http_timeout,
            ..flatwire_cloud::Config::new(env!("CARGO_PKG_VERSION"))
        }
    }
}

/// The API server as Kubernetes names it to pods, or as CLUSTER_ENDPOINT does: on a node whose kube-proxy comes later the
/// first is not reached.
fn kubernetes<L: Fn(&str) -> Option<String>>(
    r: &mut Reader<L>,
    custom_networking: bool,
    lenient: bool,
) -> Result<flatwire_kube::Config, &'static str> {
    let wanted = r.flag("FLATWIRE_KUBERNETES", true);
    let annotate_pods = r.flag("ANNOTATE_POD_IP", false);
    let of_pods = r.text("KUBERNETES_SERVICE_HOST").map(|host| {
        let port = r.text("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
        if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") }
    });
    let node = r.text("MY_NODE_NAME");
    let (server, node) = match (r.text("CLUSTER_ENDPOINT").or(of_pods), node) {
        (Some(server), Some(node)) if wanted => (server, node),
        (server, node) => {
            if annotate_pods {
                let allowed = "false where no API server is called (FLATWIRE_KUBERNETES, KUBERNETES_SERVICE_HOST or \
                               CLUSTER_ENDPOINT, MY_NODE_NAME)";
                r.refuse("ANNOTATE_POD_IP", "true", allowed, false);
            }
            return Err(match (wanted, server, node) {
                (false, ..) => "FLATWIRE_KUBERNETES is false",
                (_, None, _) => "neither KUBERNETES_SERVICE_HOST nor CLUSTER_ENDPOINT is set",
                _ => "MY_NODE_NAME is not set",
            });
        }
    };
    let settings = SETTINGS.iter().map(|(name, _, _)| *name);
    let config = flatwire_kube::Config {
        server: server.clone(),
        reporter: r.text("MY_POD_NAME").unwrap_or_else(|| node.clone()),
        node,
        credentials: flatwire_kube::CREDENTIALS.into(),
        annotate_pods,
        custom_networking,
        eni_config_annotation: text(r, "ENI_CONFIG_ANNOTATION_DEF"),
        eni_config_label: text(r, "ENI_CONFIG_LABEL_DEF"),
        settings: settings.filter_map(|name| Some((name.to_owned(), r.text(name)?))).collect(),
        lenient,
    };
    if let Err(allowed) = flatwire_kube::check_server(&server) {
        r.refuse_always("CLUSTER_ENDPOINT", &server, allowed);
    }
    Ok(config)
}

/// Names of ours that are no setting: misspelt, or of another version.
pub fn unknown(names: impl Iterator<Item = String>) -> Vec<String> {
    let is_setting = |name: &str| {
        let places = PLACES.iter().map(|place| place.variable);
        places.chain(SETTINGS.iter().map(|(variable, ..)| *variable)).any(|known| known == name)
    };
    names.filter(|name| name.starts_with("FLATWIRE_") && !is_setting(name)).collect()
}

fn default_of(variable: &str) -> &'static str {
    PLACES.iter().find(|place| place.variable == variable).map_or("", |place| place.default)
}

fn text<L: Fn(&str) -> Option<String>>(r: &Reader<L>, variable: &'static str) -> String {
    r.text(variable).unwrap_or_else(|| default_of(variable).to_owned())
}

fn path<L: Fn(&str) -> Option<String>>(r: &Reader<L>, variable: &'static str) -> PathBuf {
    text(r, variable).into()
}

fn address<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>, variable: &'static str) -> SocketAddr {
    let default = SocketAddr::from_str(default_of(variable)).expect("invariant: a default address is an address");
    let Some(value) = r.text(variable) else { return default };
    value.parse().unwrap_or_else(|_| {
        r.refuse(
            variable,
            &value,
            "an address and a port, such as 127.0.0.1:61679 (unix sockets are not supported)",
            default,
        );
        default
    })
}

/// A level, for us and at least warnings of what we stand on, or a filter as it is.
fn log_filter<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> String {
    let variable = "AWS_VPC_K8S_CNI_LOGLEVEL";
    let value = text(r, variable);
    let of_level = |level: &str| format!("{level},hyper=warn,h2=warn,aws=warn,tower=warn");
    match value.to_ascii_lowercase().as_str() {
        level @ ("trace" | "debug" | "info" | "warn" | "error") => of_level(level),
        // The add-on's word for nothing but the last words.
        "fatal" => of_level("error"),
        // A lone word would be taken for the name of a module.
        word if word.contains(['=', ',']) && EnvFilter::try_new(&value).is_ok() => value,
        _ => {
            r.refuse(variable, &value, "debug, info, warn, error, or a filter such as ipamd=debug,warn", "debug");
            of_level("debug")
        }
    }
}

/// The plugin's standard output is its answer to the runtime.
fn plugin_log_file<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> String {
    let variable = "AWS_VPC_K8S_PLUGIN_LOG_FILE";
    let value = text(r, variable);
    if value == "stdout" {
        r.refuse_always(variable, &value, "a file or stderr");
    }
    value
}

fn plugin_log_level<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> String {
    let variable = "AWS_VPC_K8S_PLUGIN_LOG_LEVEL";
    let value = text(r, variable).to_ascii_lowercase();
    if !["debug", "info", "warn", "error", "fatal"].contains(&value.as_str()) {
        r.refuse(variable, &value, "debug, info, warn or error", "debug");
        return "debug".to_owned();
    }
    value
}

fn network_policy_mode<L: Fn(&str) -> Option<String>>(r: &mut Reader<L>) -> String {
    let variable = "NETWORK_POLICY_ENFORCING_MODE";
    let Some(value) = r.text(variable) else { return String::new() };
    if !["none", "standard", "strict"].contains(&value.to_ascii_lowercase().as_str()) {
        r.refuse_always(variable, &value, "none, standard or strict, or unset");
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vars: &[(&str, &str)]) -> Result<Config, Refused> {
        let environment = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Config::parse(&RunArgs(BTreeMap::new()), environment)
    }

    #[test]
    fn a_misspelt_name_of_ours_is_named() {
        let names = ["FLATWIRE_SOCKET", "FLATWIRE_BLOCK_IMDS", "FLATWIRE_SOCKETS", "PATH"].map(str::to_owned);
        assert_eq!(unknown(names.into_iter()), ["FLATWIRE_SOCKETS"]);
    }

    #[test]
    fn nothing_set_is_the_add_ons_places() {
        let config = parse(&[("AWS_VPC_K8S_CNI_BACKING_STORE", "")]).unwrap();
        assert_eq!(config.checkpoint, PathBuf::from("/var/run/aws-node/ipam.json"), "empty is unset");
        assert_eq!(config.introspection, Some(INTROSPECTION.parse().unwrap()));
        assert_eq!(config.log_file, "stderr");
        assert!(config.log_filter.starts_with("info,"));
    }

    #[test]
    fn the_command_line_overrules_the_environment() {
        let command = RunArgs::augment_args(Command::new("run"));
        let matches =
            command.get_matches_from(["run", "--disable-metrics", "--socket", "/s", "--lenient-settings=true"]);
        let args = RunArgs::from_arg_matches(&matches).unwrap();
        let config = Config::parse(&args, |name| (name != "HTTP_TIMEOUT").then(|| "0".to_owned())).unwrap_err();
        assert!(!config.to_string().contains("FLATWIRE_SOCKET"), "{config}");
        let config = Config::parse(&args, |name| (name == "FLATWIRE_SOCKET").then(|| "/other".to_owned())).unwrap();
        assert_eq!((config.socket.to_str(), config.metrics), (Some("/s"), None));
    }

    #[test]
    fn one_start_shows_everything_that_is_wrong() {
        let bad = [
            ("DISABLE_METRICS", "yes"),
            ("INTROSPECTION_BIND_ADDRESS", "unix:/run/x"),
            ("HTTP_TIMEOUT", "0"),
            ("AWS_VPC_K8S_CNI_LOGLEVEL", "chatty"),
            ("WARM_IP_TARGET", "many"),
            ("ENABLE_MULTI_NIC", "true"),
        ];
        let text = parse(&bad).unwrap_err().to_string();
        for (variable, value) in bad {
            assert!(text.contains(&format!("\n  {variable}={value:?} is not ")), "{variable} in {text}");
        }
        let lenient: Vec<_> = bad.into_iter().chain([(LENIENT, "true")]).collect();
        let config = parse(&lenient).unwrap();
        assert_eq!(config.leniencies.len(), bad.len());
        assert_eq!(config.http_timeout, Duration::from_secs(10));
        assert!(parse(&[(LENIENT, "true"), ("NETWORK_POLICY_ENFORCING_MODE", "some")]).is_err());
        assert!(parse(&[(LENIENT, "perhaps")]).is_err(), "whether to be lenient is not read leniently");
    }

    #[test]
    fn what_changes_nothing_is_named() {
        let config = parse(&[("VPC_CNI_VERSION", "v1"), ("ENABLE_NFTABLES", "")]).unwrap();
        assert_eq!(config.without_effect.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["VPC_CNI_VERSION"]);
    }

    #[test]
    fn the_api_server_is_called_where_it_and_the_node_are_known() {
        let kubernetes = |vars: &[(&str, &str)]| parse(vars).map(|config| config.kubernetes);
        let pod = [("KUBERNETES_SERVICE_HOST", "10.100.0.1"), ("KUBERNETES_SERVICE_PORT", "443")];
        assert!(kubernetes(&[]).unwrap().unwrap_err().contains("KUBERNETES_SERVICE_HOST"));
        assert!(kubernetes(&pod).unwrap().unwrap_err().contains("MY_NODE_NAME"));
        let pod = [pod[0], pod[1], ("MY_NODE_NAME", "n"), ("WARM_IP_TARGET", "2"), ("MY_POD_NAME", "aws-node-x")];
        let config = kubernetes(&pod).unwrap().unwrap();
        assert_eq!((config.server.as_str(), config.reporter.as_str()), ("https://10.100.0.1:443", "aws-node-x"));
        assert_eq!(config.settings.get("WARM_IP_TARGET").map(String::as_str), Some("2"));
        let off = [&pod[..], &[("FLATWIRE_KUBERNETES", "false")]].concat();
        assert!(kubernetes(&off).unwrap().is_err());
        let refused = |more: &[(&str, &str)]| kubernetes(more).unwrap_err().to_string();
        assert!(refused(&[("ANNOTATE_POD_IP", "true")]).contains("ANNOTATE_POD_IP"), "nobody to annotate by");
        assert!(refused(&[("CLUSTER_ENDPOINT", "http://api"), ("MY_NODE_NAME", "n")]).contains("https://HOST:PORT"));
        let ipv6 = [("KUBERNETES_SERVICE_HOST", "fd00::1"), ("MY_NODE_NAME", "n")];
        assert_eq!(kubernetes(&ipv6).unwrap().unwrap().server, "https://[fd00::1]:443");
    }

    #[test]
    fn levels_are_the_add_ons_and_a_filter_is_a_filter() {
        for (value, filter) in [("DEBUG", "debug,"), ("Fatal", "error,"), ("ipamd=debug,warn", "ipamd=debug,warn")] {
            assert!(parse(&[("AWS_VPC_K8S_CNI_LOGLEVEL", value)]).unwrap().log_filter.starts_with(filter));
        }
    }
}
