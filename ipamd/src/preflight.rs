//! `ipamd preflight`: whether this node has what the daemon needs, before it is needed. Reads, asks with DryRun, and tries
//! the kernel in a namespace of its own; nothing that stays is changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use flatwire_cloud::{AwsCloud, Permission, PermissionOutcome};
use flatwire_core::error::chain;
use flatwire_core::limits;
use flatwire_core::ports::{Cloud, CloudError, CloudReply, CloudRequest, InstanceLimits, Metadata};
use flatwire_core::settings::Settings;
use flatwire_core::target::Mode;
use flatwire_kernel::nft::{Chain, Family, Hook, Nft, Rule as NftRule, Table};
use flatwire_kernel::{KernelError, Netlink, Rule, VethEnd, netns, sysctl};
use serde::Serialize;

use crate::config::{self, Config, Refused, RunArgs};
use crate::node_state;
use crate::table::{Colour, coloured, progress, table};

#[derive(Args, Debug)]
pub struct PreflightArgs {
    #[command(flatten)]
    run: RunArgs,
    /// The checks as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    check: String,
    verdict: Verdict,
    text: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    way_out: String,
}

impl Check {
    fn new(verdict: Verdict, check: impl Into<String>, text: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { check: check.into(), verdict, text: text.into(), way_out: way_out.into() }
    }

    fn ok(check: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, check, text, "")
    }
}

/// Exit code 0: the daemon can run here, with what is warned of; 1: something it needs is missing.
pub fn preflight(args: &PreflightArgs) -> anyhow::Result<ExitCode> {
    let checks = match Config::parse(&args.run, |name| std::env::var(name).ok()) {
        Ok(config) => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            runtime.block_on(all(&config))?
        }
        // The rest hangs on them.
        Err(Refused(refusals)) => {
            let refused = |e: &_| Check::new(Verdict::Fail, "settings", format!("{e}"), "change it, or leave it unset");
            refusals.iter().map(refused).collect()
        }
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&checks)?),
        false => print!("{}", render(&checks)),
    }
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    Ok(ExitCode::from(u8::from(failed)))
}

async fn all(config: &Config) -> anyhow::Result<Vec<Check>> {
    let mut checks = settings(config);
    checks.extend(files(config));
    checks.extend(sysctls());
    checks.extend(kernel().await);
    let cloud = AwsCloud::connect(config.cloud(), Arc::new(()))?;
    progress("reading the instance metadata…");
    let metadata = match cloud.call(CloudRequest::ReadMetadata).await {
        Ok(CloudReply::Metadata(metadata)) => Some(metadata),
        _ => None,
    };
    checks.extend(metadata_service(&cloud, config).await);
    if let Some(metadata) = &metadata {
        checks.push(instance(&cloud, metadata, &config.settings).await);
    }
    if config.settings.imds_only {
        checks.push(Check::ok("ec2", "not called, as ENABLE_IMDS_ONLY_MODE says"));
        return Ok(checks);
    }
    progress("asking EC2 what this node may do…");
    checks.extend(permissions(cloud.permissions(config.settings.families.has_v6()).await, &config.settings));
    Ok(checks)
}

fn settings(config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    for leniency in &config.leniencies {
        checks.push(Check::new(Verdict::Warn, "settings", leniency.to_string(), "change it, or leave it unset"));
    }
    for (variable, why) in &config.without_effect {
        checks.push(Check::ok("settings", format!("{variable} has no effect: {why}")));
    }
    for variable in config::unknown(std::env::vars().map(|(name, _)| name)) {
        let text = format!("{variable} is no setting of this version");
        checks.push(Check::new(Verdict::Warn, "settings", text, "see its spelling"));
    }
    if let Some(socket) = config.absent_policy_agent() {
        let text = format!("NETWORK_POLICY_ENFORCING_MODE is set and {} is not there: no pod starts", socket.display());
        checks.push(Check::new(Verdict::Fail, "policy agent", text, "run an agent on this node, or unset it"));
    }
    match node_state::read(&config.node_state) {
        Ok(state) => checks.push(Check::ok("level", node_state::level_name(state.level.unwrap_or_default()))),
        Err(e) => checks.push(Check::new(Verdict::Warn, "level", chain(&e), "until then nothing is given back to EC2")),
    }
    checks.push(Check::ok("settings", format!("{:?}, {:?}", config.settings.policy, config.settings.mode)));
    checks
}

/// Everything the daemon writes, tried by a file beside it.
fn files(config: &Config) -> Vec<Check> {
    let mut places = vec![
        ("ledger", config.ledger.clone()),
        ("checkpoint", config.checkpoint.clone()),
        ("release queue", config.release_queue.join("release.json")),
        ("socket", config.socket.clone()),
    ];
    if !["stderr", "stdout"].contains(&config.log_file.as_str()) {
        places.push(("log", PathBuf::from(&config.log_file)));
    }
    places.iter().map(|(what, path)| writable(what, path)).collect()
}

fn writable(what: &str, path: &Path) -> Check {
    // The daemon makes missing folders; what counts is the nearest that is there.
    let folder = path.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let trial = folder.join(format!(".flatwire-preflight-{}", std::process::id()));
    let tried = fs::write(&trial, "preflight\n").and_then(|()| fs::remove_file(&trial));
    match tried {
        Ok(()) => Check::ok(what, path.display().to_string()),
        Err(e) => {
            let text = format!("{} cannot be written: {e}", folder.display());
            Check::new(Verdict::Fail, what, text, "mount it read-write, make room, and run as root")
        }
    }
}

/// What the daemon sets by itself where it may, and must find set where it may not.
fn sysctls() -> Vec<Check> {
    // The larger of `all` and the link's own counts, and the daemon makes every ENI's own loose.
    [("net/ipv4/ip_forward", &["1"][..]), ("net/ipv4/conf/all/rp_filter", &["0", "1", "2"])]
        .into_iter()
        .map(|(key, good)| {
            let path = sysctl::path(key);
            let writable = fs::OpenOptions::new().write(true).open(&path).is_ok();
            let by_hand = format!(
                "mount the host's /proc/sys/net at /host/proc/sys/net, as the chart does, or set {key} by hand"
            );
            match fs::read_to_string(&path) {
                Err(e) => Check::new(Verdict::Fail, "sysctl", format!("{key} cannot be read: {e}"), "mount /proc"),
                Ok(value) if good.contains(&value.trim()) && writable => {
                    Check::ok("sysctl", format!("{key} is {}", value.trim()))
                }
                Ok(value) if good.contains(&value.trim()) => {
                    let text = format!("{key} is {}, and may not be written", value.trim());
                    Check::new(Verdict::Warn, "sysctl", text, by_hand)
                }
                Ok(value) if writable => Check::ok("sysctl", format!("{key} is {}; the daemon sets it", value.trim())),
                Ok(value) => {
                    let text = format!("{key} is {}, and may not be written", value.trim());
                    Check::new(Verdict::Fail, "sysctl", text, by_hand)
                }
            }
        })
        .collect()
}

/// The kernel's parts, tried in a namespace that is gone afterwards.
async fn kernel() -> Vec<Check> {
    let scratch = match netns::unnamed() {
        Ok(scratch) => scratch,
        // The daemon itself needs no other namespace.
        Err(e) => {
            let text = format!("not tried: {}", chain(&e));
            let way_out = "to try it, run preflight on the node itself as root: a namespace needs CAP_SYS_ADMIN";
            return vec![Check::new(Verdict::Warn, "kernel", text, way_out)];
        }
    };
    let check = |what: &str, tried: Result<(), KernelError>, way_out: &str| match tried {
        Ok(()) => Check::ok("kernel", what),
        Err(e) => Check::new(Verdict::Fail, "kernel", format!("{what}: {}", chain(&e)), way_out),
    };
    let veth = async { Netlink::in_namespace(&scratch)?.veth(&VethEnd::new("a"), &VethEnd::new("b")).await };
    let rule = async {
        // The one rule that finds every pod.
        let rule = Rule::lookup(512, 254).suppress_prefixlength(31).suppress_group(0);
        Netlink::in_namespace(&scratch)?.rule(&rule).await
    };
    let nft = async {
        let chain = Chain::nat("trial", Hook::Postrouting, 100).rule(NftRule::new().oifname("a").counter().accept());
        Nft::in_namespace(&scratch)?.replace(&Table::new(Family::Ip, "trial").chain(chain)).await
    };
    vec![
        check("veth pairs", veth.await, "load the module veth (CONFIG_VETH)"),
        check("rules that suppress by prefix length and group", rule.await, "needs CONFIG_IP_MULTIPLE_TABLES"),
        check("nftables with NAT", nft.await, "load the modules nf_tables and nft_chain_nat (kernel 5.4 or later)"),
    ]
}

async fn metadata_service(cloud: &AwsCloud, config: &Config) -> Vec<Check> {
    let service = cloud.metadata_service().await;
    let instance = match &service.instance {
        Ok(instance) => Check::ok("metadata", format!("answers; this is {instance}")),
        Err(e) => {
            let endpoint = config.imds_endpoint.as_deref().unwrap_or("http://169.254.169.254");
            let way_out = "run with hostNetwork, or raise the hop limit to 2: aws ec2 modify-instance-metadata-options \
                           --instance-id … --http-endpoint enabled --http-put-response-hop-limit 2";
            return vec![Check::new(
                Verdict::Fail,
                "metadata",
                format!("{endpoint} does not answer: {}", e.message),
                way_out,
            )];
        }
    };
    let options = match service.options {
        Ok(options) => {
            let version = if options.tokens_required { "IMDSv2 only" } else { "IMDSv1 is on too, and not used" };
            Check::ok("metadata", format!("hop limit {}, enough from here; {version}", options.hop_limit))
        }
        // Only a preflight would ask for it.
        Err(e) => Check::ok("metadata", format!("hop limit enough from here; not to be read ({})", e.code)),
    };
    vec![instance, options]
}

/// How many pods this type can hold, beside what the settings ask for.
async fn instance(cloud: &AwsCloud, metadata: &Metadata, settings: &Settings) -> Check {
    let name = &metadata.instance_type;
    let found = match limits::lookup(name) {
        Some(row) => Ok(row.limits()),
        None => {
            cloud.call(CloudRequest::DescribeInstanceType { instance_type: name.clone() }).await.and_then(limits_of)
        }
    };
    match found {
        Ok(limits) => judge_limits(&limits, settings),
        Err(e) => {
            let text = format!("{name} is not in the table of instance types, and EC2 does not tell: {}", e.message);
            Check::new(Verdict::Fail, "instance", text, "allow ec2:DescribeInstanceTypes, or use a newer ipamd")
        }
    }
}

fn limits_of(reply: CloudReply) -> Result<InstanceLimits, CloudError> {
    match reply {
        CloudReply::InstanceType(limits) => Ok(limits),
        other => unreachable!("invariant: the adapter answers DescribeInstanceTypes with limits, not {other:?}"),
    }
}

fn judge_limits(limits: &InstanceLimits, settings: &Settings) -> Check {
    let InstanceLimits { instance_type, max_enis, ipv4_per_eni, .. } = limits;
    let enis = settings.max_eni.map_or(*max_enis, |most| most.min(*max_enis));
    let prefixes = settings.mode == Mode::Prefixes && limits.prefixes;
    let for_pods = enis.saturating_sub(u32::from(settings.custom_networking) + u32::from(settings.trunk_reserve));
    let slots = for_pods * ipv4_per_eni.saturating_sub(1);
    let pods = if prefixes { slots * 16 } else { slots };
    let text = format!("{instance_type}: {for_pods} ENIs for pods of {} slots, {pods} addresses", ipv4_per_eni - 1);
    if settings.mode == Mode::Prefixes && !limits.prefixes {
        let way_out = "single addresses are used; unset ENABLE_PREFIX_DELEGATION, or use a Nitro type";
        return Check::new(Verdict::Warn, "instance", format!("{text}; it takes no prefixes"), way_out);
    }
    match pods {
        0 => Check::new(Verdict::Fail, "instance", text, "raise MAX_ENI, or use a larger type"),
        n if n < settings.max_pods => {
            let way_out = "tell the kubelet (max-pods), use ENABLE_PREFIX_DELEGATION, or a larger type";
            Check::new(Verdict::Warn, "instance", format!("{text}, for up to {} pods", settings.max_pods), way_out)
        }
        _ => Check::ok("instance", text),
    }
}

fn permissions(permissions: Vec<Permission>, settings: &Settings) -> Vec<Check> {
    let reading = permissions.iter().find(|p| p.action == "DescribeNetworkInterfaces").map(|p| &p.outcome);
    if let Some(PermissionOutcome::Unknown { why }) = reading {
        // Then nothing is known of the others either.
        let way_out = "see that its endpoint can be reached from here and that the node has a role; until then the daemon \
                       serves what the node has";
        return vec![Check::new(Verdict::Fail, "ec2", why, way_out)];
    }
    permissions.into_iter().map(|p| permission(p, settings)).collect()
}

fn permission(permission: Permission, settings: &Settings) -> Check {
    let Permission { action, outcome } = permission;
    let check = format!("ec2:{action}");
    // Whether the daemon is of no use without it, and what does not work then.
    let (needed, without) = match action {
        "DescribeNetworkInterfaces" => (true, "what EC2 says of this node cannot be read"),
        "DescribeInstanceTypes" => (false, "a type that is not in ipamd's own table cannot be used"),
        "DescribeSubnets" => (false, "new ENIs come from the primary's subnet only"),
        "CreateTags" => (settings.provisioning, "new ENIs cannot carry their owner's tags, and are not made"),
        "UnassignPrivateIpAddresses" | "DetachNetworkInterface" | "DeleteNetworkInterface" => {
            (settings.provisioning, "nothing is given back")
        }
        "AssignIpv6Addresses" => (settings.provisioning, "ENIs get no IPv6 prefix, and pods on them no address"),
        _ => (settings.provisioning, "the pool cannot grow"),
    };
    let verdict = if needed { Verdict::Fail } else { Verdict::Warn };
    match outcome {
        PermissionOutcome::Allowed => Check::ok(check, "allowed"),
        PermissionOutcome::Denied { message } => Check::new(
            verdict,
            check,
            format!("denied: {message}"),
            format!("allow it in the node's role; without it {without}"),
        ),
        PermissionOutcome::Unknown { why } => {
            let way_out = format!("see that EC2 can be reached from here; without it {without}");
            Check::new(Verdict::Warn, check, format!("not known: {why}"), way_out)
        }
    }
}

/// Each check on a line, and beneath what is amiss the way out of it.
fn render(checks: &[Check]) -> String {
    let shown = |verdict: Verdict| match verdict {
        Verdict::Ok => coloured("ok", Colour::Green),
        Verdict::Warn => coloured("warn", Colour::Yellow),
        Verdict::Fail => coloured("FAIL", Colour::Red),
    };
    let row = |c: &Check| vec![shown(c.verdict), c.check.clone(), c.text.clone()];
    let rows = table(&["IS", "CHECK", "WHAT WAS FOUND"], &checks.iter().map(row).collect::<Vec<_>>());
    let mut out = String::new();
    for (line, check) in rows.lines().zip(std::iter::once(None).chain(checks.iter().map(Some))) {
        out += &format!("{line}\n");
        if let Some(way_out) = check.map(|check| &check.way_out).filter(|way_out| !way_out.is_empty()) {
            out += &format!("      {way_out}\n");
        }
    }
    let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let (ok, warned, failed) = (count(Verdict::Ok), count(Verdict::Warn), count(Verdict::Fail));
    out + &format!("\npreflight: ok={ok} warned={warned} failed={failed}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Settings {
        Settings::parse(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())).unwrap()
    }

    #[test]
    fn a_type_too_small_for_the_kubelet_is_warned_of_and_one_without_a_place_fails() {
        let large = limits::lookup("m5.large").unwrap().limits();
        let judged = |vars: &[(&str, &str)]| judge_limits(&large, &settings(vars));
        let check = judged(&[]);
        assert_eq!(check.verdict, Verdict::Warn, "27 addresses for 110 pods");
        assert!(check.text.contains("27 addresses"), "{}", check.text);
        assert_eq!(judged(&[("ENABLE_PREFIX_DELEGATION", "true")]).verdict, Verdict::Ok);
        let one = [("MAX_ENI", "1"), ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true")];
        assert_eq!(judged(&one).verdict, Verdict::Fail);
    }

    #[test]
    fn a_denied_action_fails_where_it_is_needed() {
        let denied = |action, vars: &[(&str, &str)]| {
            let outcome = PermissionOutcome::Denied { message: "no".to_owned() };
            permission(Permission { action, outcome }, &settings(vars)).verdict
        };
        assert_eq!(denied("CreateNetworkInterface", &[]), Verdict::Fail);
        let none = [("DISABLE_NETWORK_RESOURCE_PROVISIONING", "true")];
        assert_eq!(denied("CreateNetworkInterface", &none), Verdict::Warn);
        assert_eq!(denied("DescribeNetworkInterfaces", &none), Verdict::Fail);
        assert_eq!(denied("DescribeInstanceTypes", &[]), Verdict::Warn);
    }

    #[test]
    fn a_folder_that_cannot_be_written_fails_with_a_way_out() {
        let check = writable("ledger", Path::new("/proc/flatwire/journal"));
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.text.contains("/proc") && !check.way_out.is_empty());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(writable("ledger", &dir.path().join("a/b/journal")).verdict, Verdict::Ok);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing stays");
    }
}
