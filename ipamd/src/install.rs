//! Putting Flatwire on a node and taking it away: the plugin's program, and the conflist by which a runtime knows that the
//! node has a network.
//!
//! In this order: `ipamd install` puts the program there before the daemon starts, and the daemon itself puts the conflist
//! there once a pod could be given an address. A node is therefore not Ready before it can serve. Nothing is ever half
//! there: each file is written beside its place and renamed. The conflist is not taken away when the daemon stops: pods
//! that come meanwhile are refused with a reason and tried again. `ipamd uninstall` goes the other way, and takes away only
//! what is ours.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use flatwire_core::ledger::LedgerState;
use flatwire_kernel::node::NodeKernel;
use flatwire_store::journal::Journal;
use flatwire_store::{StoreError, releases};
use serde_json::{Value, json};

use crate::config::PluginConfig;
use crate::driver::Handle;

pub const CONFLIST: &str = "10-aws.conflist";
const PLUGIN: &str = "aws-cni";
/// Plugins of others that the image brings for nodes without them, in a folder beside `ipamd`.
const OTHERS: &str = "plugins";
/// The key of a conflist that says who wrote it: the add-on's own has the same file name and the same plugin.
const MARK: &str = "flatwire";
/// Of the state's folder: what was deleted while no daemon was there.
const RELEASES: &str = "releases";
/// Pods that a refusal names.
const NAMED: usize = 10;
/// How long a daemon that is being stopped may take.
const AWAY_WITHIN: Duration = Duration::from_secs(60);
/// How often a pool that cannot serve yet is asked again.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// How long after a failure the conflist is tried again.
const RETRY: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub struct Places {
    /// Where the runtime looks for plugins.
    #[arg(long, env = "HOST_CNI_BIN_PATH", default_value = "/opt/cni/bin", value_name = "FOLDER")]
    bin_dir: PathBuf,
    /// Where the runtime looks for conflists.
    #[arg(long, env = "HOST_CNI_CONFDIR_PATH", default_value = "/etc/cni/net.d", value_name = "FOLDER")]
    conf_dir: PathBuf,
    /// Where the daemon keeps its ledger, its socket, and the add-on's state file.
    #[arg(long, default_value = "/var/run/aws-node", value_name = "FOLDER")]
    state_dir: PathBuf,
}

#[derive(Args, Debug)]
pub struct InstallArgs {
    #[command(flatten)]
    places: Places,
}

#[derive(Args, Debug)]
pub struct UninstallArgs {
    #[command(flatten)]
    places: Places,
    /// Also remove the ledger and the add-on's state file. Refused while pods of this node have addresses.
    #[arg(long)]
    purge: bool,
    /// Stay when done, until a signal: a DaemonSet's pods are not to end.
    #[arg(long)]
    stay: bool,
}

pub fn install(args: &InstallArgs) -> anyhow::Result<ExitCode> {
    let own = own_folder()?;
    for line in install_from(&own, &args.places)? {
        println!("install: {line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn own_folder() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("find out where this program lies")?;
    program.parent().map(Path::to_owned).ok_or_else(|| anyhow!("{} lies nowhere", program.display()))
}

/// What was done, a sentence each.
fn install_from(own: &Path, places: &Places) -> anyhow::Result<Vec<String>> {
    let mut done = Vec::new();
    fs::create_dir_all(&places.bin_dir).with_context(|| format!("create {}", places.bin_dir.display()))?;
    let mut programs = vec![(own.join(PLUGIN), true)];
    if let Ok(others) = fs::read_dir(own.join(OTHERS)) {
        let mut others: Vec<_> = others.filter_map(Result::ok).map(|entry| (entry.path(), false)).collect();
        others.sort();
        programs.extend(others);
    }
    for (program, ours) in programs {
        let name = program.file_name().map(OsString::from).unwrap_or_default();
        let place = places.bin_dir.join(&name);
        // What the node brings is newer than what an image does, or somebody's choice.
        if !ours && place.exists() {
            continue;
        }
        let content = fs::read(&program)
            .with_context(|| format!("read {}, which belongs beside ipamd in its image", program.display()))?;
        if put(&places.bin_dir, &name, &content, 0o755)? {
            done.push(format!("{} is in place", place.display()));
        }
    }
    // A boot that neither we nor the add-on have served yet. What the boot before promised is not true until the daemon
    // says so again.
    let state = ["flatwire.journal", "ipam.json"].map(|name| places.state_dir.join(name));
    if !state.iter().any(|file| file.exists()) && remove_conflist(&places.conf_dir)? {
        done.push("the conflist of the boot before is gone until a pod can be served".to_owned());
    }
    if done.is_empty() {
        done.push("everything was in place".to_owned());
    }
    Ok(done)
}

/// Writes the conflist once a pod could be given an address that the node has: one that EC2 is asked for may be refused. For
/// as long as that cannot be, there is none, and the node is not Ready; one that is there already stays.
pub async fn when_ready(pool: Handle, dir: PathBuf, conflist: Value) {
    loop {
        if pool.status().await.is_ok_and(|status| status.ready && status.holds_addresses()) {
            let text = format!("{conflist:#}\n");
            match put(&dir, CONFLIST.as_ref(), text.as_bytes(), 0o644) {
                Ok(changed) => {
                    let file = dir.join(CONFLIST);
                    tracing::info!(file = %file.display(), changed, "pods can be served: the conflist is in place");
                    for other in read_before_ours(&dir) {
                        tracing::warn!(other, "runtimes take this conflist, because its name comes first; remove it");
                    }
                    return;
                }
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "no conflist: the node stays without pods");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// The conflist for these settings. Plugins of others are in it if they are on the node: a chain with one that is missing
/// fails every pod.
pub fn conflist(config: &PluginConfig) -> (Value, Vec<&'static str>) {
    let mut plugins = vec![json!({
        "name": PLUGIN,
        "type": PLUGIN,
        "vethPrefix": config.veth_prefix,
        "mtu": config.mtu.to_string(),
        "pluginLogFile": config.log_file,
        "pluginLogLevel": config.log_level,
        "ipamdSocket": config.socket,
        "releaseQueueDir": config.release_queue,
    })];
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true });
    let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
    let mut missing = Vec::new();
    for (name, wanted, plugin) in [("portmap", true, portmap), ("bandwidth", config.bandwidth, bandwidth)] {
        let there = config.bin_dir.as_ref().is_none_or(|dir| dir.join(name).exists());
        match (wanted, there) {
            (true, true) => plugins.push(plugin),
            (true, false) => missing.push(name),
            (false, _) => {}
        }
    }
    let list = json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": PLUGIN,
        MARK: env!("CARGO_PKG_VERSION"),
        "plugins": plugins,
    });
    (list, missing)
}

/// Conflists that a runtime reads before ours, which is the only one it would read.
fn read_before_ours(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let names = entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok());
    let read = |name: &String| [".conf", ".conflist", ".json"].iter().any(|ending| name.ends_with(ending));
    names.filter(read).filter(|name| name.as_str() < CONFLIST).collect()
}

pub fn uninstall(args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    let own = own_folder()?;
    for line in uninstall_from(&own, &args.places, args.purge)? {
        println!("uninstall: {line}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        NodeKernel::open()?.clear().await.context("remove rules, tables and nftables of Flatwire")?;
        println!("uninstall: rules, route tables and the nftables table are gone; running pods keep link and route");
        if args.stay {
            println!("uninstall: done; staying until a signal");
            crate::run::stop_signal().await?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Files only, and only ours. What was done, a sentence each.
fn uninstall_from(own: &Path, places: &Places, purge: bool) -> anyhow::Result<Vec<String>> {
    let mut done = Vec::new();
    let ledger = places.state_dir.join("flatwire.journal");
    // A daemon that still ran would put everything back. Its lock is held to the end: none starts, and no pod gets an address.
    let _held = if ledger.exists() {
        let (held, opened) = without_a_daemon(&ledger)?;
        let pods = pods_left(&opened, &places.state_dir.join(RELEASES))?;
        // The runtime deletes no pod without a conflist: one that is still there would never go.
        if !pods.is_empty() && (purge || is_conflist_ours(&places.conf_dir)) {
            let (count, names) = (pods.len(), pods.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", "));
            bail!(
                "nothing is touched: {count} pods of this node have addresses, and could not be deleted afterwards ({names}{}); \
                 delete them, and those of DaemonSets, which a drain leaves; this goes on once they are gone",
                if count > NAMED { ", …" } else { "" }
            );
        }
        Some(held)
    } else {
        None
    };
    if remove_conflist(&places.conf_dir)? {
        done.push(format!("{} is gone: the node takes no new pods", places.conf_dir.join(CONFLIST).display()));
    }
    let plugin = places.bin_dir.join(PLUGIN);
    match (fs::read(&plugin), fs::read(own.join(PLUGIN))) {
        (Ok(there), Ok(ours)) if there == ours => {
            remove(&plugin)?;
            done.push(format!("{} is gone", plugin.display()));
        }
        (Ok(_), _) => done.push(format!("{} is not ours, or of another version, and stays", plugin.display())),
        (Err(_), _) => {}
    }
    if purge {
        let files = ["flatwire.journal", "flatwire.journal.lock", "ipam.json", "node-state.json", "ipamd.sock"];
        for file in files {
            remove(&places.state_dir.join(file))?;
        }
        let queue = places.state_dir.join(RELEASES);
        absent_is_fine(fs::remove_dir_all(&queue)).with_context(|| format!("remove {}", queue.display()))?;
        done.push(format!("the ledger and the state in {} are gone", places.state_dir.display()));
    }
    Ok(done)
}

/// Pods with an address by the ledger, but for those that were deleted since: without a daemon their release is queued.
fn pods_left(ledger: &LedgerState, queue: &Path) -> anyhow::Result<Vec<String>> {
    let queued = releases::all(queue)?;
    let deleted: BTreeSet<_> = queued.iter().filter_map(|one| Some(one.release.as_ref().ok()?.sandbox())).collect();
    let left = ledger.pods.iter().filter(|(sandbox, _)| !deleted.contains(sandbox));
    Ok(left.map(|(_, pod)| pod.pod.to_string()).collect())
}

/// The ledger, once no daemon holds it.
fn without_a_daemon(ledger: &Path) -> anyhow::Result<(Journal, LedgerState)> {
    let deadline = Instant::now() + AWAY_WITHIN;
    loop {
        match Journal::open(ledger) {
            Ok((journal, opened)) => return Ok((journal, opened.state)),
            Err(StoreError::Locked { .. }) if Instant::now() < deadline => std::thread::sleep(ASK_EVERY),
            Err(error) => return Err(error).context("an ipamd that runs would put everything back"),
        }
    }
}

/// Removes the conflist if we wrote it, and says whether it did.
fn remove_conflist(dir: &Path) -> anyhow::Result<bool> {
    let ours = is_conflist_ours(dir);
    if ours {
        remove(&dir.join(CONFLIST))?;
    }
    Ok(ours)
}

fn is_conflist_ours(dir: &Path) -> bool {
    let text = fs::read_to_string(dir.join(CONFLIST)).unwrap_or_default();
    serde_json::from_str::<Value>(&text).is_ok_and(|list| list.get(MARK).is_some())
}

fn remove(file: &Path) -> anyhow::Result<()> {
    absent_is_fine(fs::remove_file(file)).with_context(|| format!("remove {}", file.display()))
}

fn absent_is_fine(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Puts a file in its place in one step, whatever stands there and whoever runs it; `false` if it stood there already. The
/// name it has before begins with a dot and ends with no ending that a runtime reads.
fn put(dir: &Path, name: &std::ffi::OsStr, content: &[u8], mode: u32) -> anyhow::Result<bool> {
    let place = dir.join(name);
    let same_mode = |meta: &fs::Metadata| meta.permissions().mode() & 0o777 == mode;
    if fs::read(&place).is_ok_and(|there| there == content) && fs::metadata(&place).is_ok_and(|m| same_mode(&m)) {
        return Ok(false);
    }
    let mut beside = OsString::from(".");
    beside.push(name);
    beside.push(".flatwire-new");
    let beside = dir.join(beside);
    let write = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        // What a crash left under this name may have other permissions.
        absent_is_fine(fs::remove_file(&beside))?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        // The kernel starts no program that somebody may still write to.
        drop(file);
        fs::rename(&beside, &place)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("put {} in place", place.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        root: tempfile::TempDir,
        places: Places,
    }

    impl Node {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let path = |name: &str| root.path().join(name);
            for name in ["image/plugins", "bin", "net.d", "state"] {
                fs::create_dir_all(path(name)).unwrap();
            }
            fs::write(path("image/aws-cni"), "plugin 1").unwrap();
            fs::write(path("image/plugins/portmap"), "portmap of the image").unwrap();
            let places = Places { bin_dir: path("bin"), conf_dir: path("net.d"), state_dir: path("state") };
            Self { root, places }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(name)
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path(name)).unwrap()
        }

        fn install(&self) -> Vec<String> {
            install_from(&self.path("image"), &self.places).unwrap()
        }

        fn uninstall(&self, purge: bool) -> anyhow::Result<Vec<String>> {
            uninstall_from(&self.path("image"), &self.places, purge)
        }

        fn names(&self, folder: &str) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(self.path(folder))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    fn settings(node: &Node) -> PluginConfig {
        PluginConfig {
            bin_dir: Some(node.path("bin")),
            conf_dir: Some(node.path("net.d")),
            bandwidth: false,
            ..PluginConfig::default()
        }
    }

    #[test]
    fn programs_are_put_in_place_and_those_of_the_node_stay() {
        let node = Node::new();
        fs::write(node.path("bin/.aws-cni.flatwire-new"), "of a crash").unwrap();
        assert_eq!(node.install().len(), 2);
        assert_eq!(node.names("bin"), ["aws-cni", "portmap"], "nothing stays beside them");
        assert_eq!(fs::metadata(node.path("bin/aws-cni")).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(node.install(), ["everything was in place"]);

        fs::write(node.path("image/aws-cni"), "plugin 2").unwrap();
        fs::write(node.path("image/plugins/portmap"), "portmap of the next image").unwrap();
        node.install();
        assert_eq!(
            (node.read("bin/aws-cni").as_str(), node.read("bin/portmap").as_str()),
            ("plugin 2", "portmap of the image")
        );

        fs::remove_file(node.path("image/aws-cni")).unwrap();
        let error = format!("{:#}", install_from(&node.path("image"), &node.places).unwrap_err());
        assert!(error.contains("image/aws-cni") && error.contains("beside ipamd"), "{error}");
    }

    /// In a process of its own, as a runtime is: it never meets half a program, or none.
    #[test]
    fn a_runtime_finds_a_whole_program_at_any_moment() {
        let node = Node::new();
        let program = fs::read("/bin/true").unwrap();
        fs::write(node.path("image/aws-cni"), &program).unwrap();
        node.install();
        let call = r#"n=0; until [ -e "$0/stop" ]; do "$0/bin/aws-cni" || exit 1; n=$((n + 1)); done; [ $n -gt 0 ]"#;
        let mut runtime = std::process::Command::new("bash").arg("-c").arg(call).arg(node.root.path()).spawn().unwrap();
        for version in 1..60 {
            // What follows the end of a program is nobody's business.
            fs::write(node.path("image/aws-cni"), [program.clone(), vec![0; version]].concat()).unwrap();
            node.install();
        }
        fs::write(node.path("stop"), "").unwrap();
        assert!(runtime.wait().unwrap().success(), "a call of the plugin failed while it was replaced");

        // Nor does one that runs stand in the way: it cannot be written to, but replaced. In the same test, because a process
        // that is started by another thread holds for a moment what this one writes.
        fs::copy("/bin/sleep", node.path("image/aws-cni")).unwrap();
        node.install();
        let mut running = std::process::Command::new(node.path("bin/aws-cni")).arg("30").spawn().unwrap();
        fs::write(node.path("image/aws-cni"), "plugin 2").unwrap();
        node.install();
        assert_eq!(node.read("bin/aws-cni"), "plugin 2");
        running.kill().unwrap();
        running.wait().unwrap();
    }

    #[test]
    fn a_boot_that_nobody_served_has_no_conflist_of_ours() {
        let node = Node::new();
        let (list, _) = conflist(&settings(&node));
        let file = node.path("net.d/10-aws.conflist");
        fs::write(&file, list.to_string()).unwrap();
        fs::write(node.path("state/ipam.json"), "{}").unwrap();
        node.install();
        assert!(file.exists(), "a daemon served here since the boot");
        fs::remove_file(node.path("state/ipam.json")).unwrap();
        node.install();
        assert!(!file.exists());
        fs::write(&file, r#"{"name":"aws-cni","plugins":[]}"#).unwrap();
        node.install();
        assert!(file.exists(), "the add-on's is not ours to remove");
    }

    #[test]
    fn a_chain_has_what_the_node_has() {
        let node = Node::new();
        let types = |list: &Value| -> Vec<String> {
            let plugins = list["plugins"].as_array().unwrap().iter();
            plugins.map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
        };
        let (list, missing) = conflist(&PluginConfig { bandwidth: true, ..settings(&node) });
        assert_eq!((types(&list), missing), (vec!["aws-cni".to_owned()], vec!["portmap", "bandwidth"]));
        node.install();
        let (list, missing) = conflist(&settings(&node));
        assert_eq!((types(&list), missing.len()), (vec!["aws-cni".to_owned(), "portmap".to_owned()], 0));
    }

    /// The conflist of `deploy/` is the one that the daemon writes when nothing is set.
    #[test]
    fn the_conflist_that_is_shown_is_the_one_that_is_written() {
        let shown = include_str!("../../deploy/10-aws.conflist");
        let (list, _) = conflist(&PluginConfig::default());
        assert_eq!(serde_json::from_str::<Value>(shown).unwrap(), list);
    }

    #[test]
    fn taking_away_takes_only_what_is_ours() {
        let node = Node::new();
        node.install();
        let (list, _) = conflist(&settings(&node));
        put(&node.path("net.d"), CONFLIST.as_ref(), list.to_string().as_bytes(), 0o644).unwrap();
        let (journal, _) = Journal::open(&node.path("state/flatwire.journal")).unwrap();
        drop(journal);
        let done = node.uninstall(true).unwrap();
        assert_eq!(done.len(), 3, "{done:?}");
        assert_eq!(
            (node.names("bin"), node.names("net.d"), node.names("state")),
            (vec!["portmap".to_owned()], vec![], vec![])
        );
        assert_eq!(node.uninstall(false).unwrap(), Vec::<String>::new(), "a second time finds nothing");

        // The add-on has taken over.
        fs::write(node.path("bin/aws-cni"), "the add-on's plugin").unwrap();
        fs::write(node.path("net.d/10-aws.conflist"), r#"{"name":"aws-cni","plugins":[]}"#).unwrap();
        let done = node.uninstall(false).unwrap();
        assert!(done.len() == 1 && done[0].contains("not ours"), "{done:?}");
        assert_eq!((node.names("bin").len(), node.names("net.d").len()), (2, 1));
    }

    #[test]
    fn a_ledger_with_pods_is_not_thrown_away() {
        use flatwire_core::ledger::Record;
        let node = Node::new();
        let ledger = node.path("state/flatwire.journal");
        let (mut journal, _) = Journal::open(&ledger).unwrap();
        let pod = json!({
            "sandbox": { "network": "aws-cni", "container_id": "c1", "if_name": "eth0" },
            "pod": { "namespace": "default", "name": "web" },
            "address": "10.0.0.9",
            "eni": "eni-1",
            "device": 0,
            "table": 254,
            "at": 1,
        });
        let pod = serde_json::from_value(pod).unwrap();
        journal.append(&[Record::Allocated(pod)]).unwrap();
        drop(journal);
        let error = node.uninstall(true).unwrap_err().to_string();
        assert!(error.contains("default/web") && error.contains("drain"), "{error}");
        assert!(ledger.exists());
        assert!(node.uninstall(false).is_ok(), "somebody else's conflist, or none: nobody is stranded");

        // With our conflist away nobody could delete the pod.
        let (list, _) = conflist(&settings(&node));
        put(&node.path("net.d"), CONFLIST.as_ref(), list.to_string().as_bytes(), 0o644).unwrap();
        node.install();
        assert!(node.uninstall(false).is_err() && node.uninstall(true).is_err());
        assert_eq!((node.names("net.d").len(), node.names("bin").len()), (1, 2), "nothing is touched");

        // Deleted without a daemon.
        fs::create_dir(node.path("state/releases")).unwrap();
        let release = r#"{"version":1,"network":"aws-cni","container_id":"c1","if_name":"eth0"}"#;
        fs::write(node.path("state/releases/c1.json"), release).unwrap();
        node.uninstall(true).unwrap();
        assert!(!ledger.exists() && node.names("net.d").is_empty());
    }

    #[test]
    fn a_conflist_that_would_be_read_before_ours_is_named() {
        let node = Node::new();
        for name in ["05-other.conf", "10-aws.conflist", "10-aaa.conflist", "99-last.conflist", "00-notes.txt"] {
            fs::write(node.path("net.d").join(name), "").unwrap();
        }
        let mut found = read_before_ours(&node.path("net.d"));
        found.sort();
        assert_eq!(found, ["05-other.conf", "10-aaa.conflist"]);
    }
}
