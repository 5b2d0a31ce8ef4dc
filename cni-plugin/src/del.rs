//! DEL: kernel, then ledger. Whatever is gone already counts as done, and a daemon that is away does not hold up the
//! pod's end: the release is kept on disk.
//!
//! The only errors are a call that makes no sense, a kernel that refuses (then the address is not released, because the
//! pod may still use it), and a release that neither ipamd nor the disk would take.

use std::time::Duration;

use flatwire_core::error::chain;
use flatwire_proto::CheckNetworkReply;
use serde_json::Value;
use tokio::time::timeout;

use crate::daemon::{self, Daemon};
use crate::failure::Failure;
use crate::input::Call;
use crate::log::{Level, Log};
use crate::pod;
use crate::queue::{Queue, Queued};
use crate::wiring::{self, Teardown};

/// Asking for the addresses of a sandbox without `prevResult` is a convenience.
pub const LOOK_UP: Duration = Duration::from_secs(1);
/// Telling the policy agent is a courtesy: its state of a dead pod harms nobody.
pub const POLICY: Duration = Duration::from_secs(1);
/// What the add-on gives as the reason of every DEL; metrics are kept by this text.
const REASON: &str = "PodDeleted";

pub async fn run(call: &Call, log: &Log) -> Result<Option<Value>, Failure> {
    // One broken setting must not keep a pod from ending.
    let socket = call.conf.ipamd_socket().unwrap_or_else(|_| "/var/run/aws-node/ipamd.sock".into());
    let mut ipamd = Daemon::connect(&socket).await;

    wiring::tear_down(call, plan(call, &mut ipamd).await).await?;

    let released = match &mut ipamd {
        Ok(ipamd) => ipamd.del(call, REASON).await.map(|reply| reply.network_policy_mode),
        Err(_) => Err(ipamd.err().unwrap_or_else(|| Failure::Bug { message: "no daemon and no reason".into() })),
    };
    match released {
        Ok(policy_mode) => {
            settle(call, log);
            forget_policy(call, &policy_mode, log).await;
        }
        Err(failure) if failure.is_unknown_sandbox() => settle(call, log),
        Err(failure) => queue_release(call, failure, log)?,
    }
    Ok(None)
}

/// What to remove from the kernel: as the result of ADD says it, else as the ledger says it, else by the pod's names.
async fn plan(call: &Call, ipamd: &mut Result<Daemon, Failure>) -> Vec<Teardown> {
    let prefix = call.conf.veth_prefix().unwrap_or("eni");
    let names = pod::Names::of(call);
    let mut plan = Vec::new();
    if let Ok(Some(result)) = call.conf.prev_result() {
        for one in pod::attached(result, &call.if_name) {
            let host_if = one.host_if.unwrap_or_else(|| names.host_if(prefix, one.position));
            plan.push(Teardown { host_if, pod_if: one.pod_if, addresses: one.addresses });
        }
    }
    if plan.is_empty() {
        let known = match ipamd {
            Ok(ipamd) => timeout(LOOK_UP, ipamd.check(call)).await.ok().and_then(Result::ok).flatten(),
            Err(_) => None,
        };
        plan = by_names(call, &names, prefix, &known.unwrap_or_default());
    }
    plan
}

fn by_names(call: &Call, names: &pod::Names, prefix: &str, known: &CheckNetworkReply) -> Vec<Teardown> {
    let interfaces = known.ip_allocation_metadata.len().clamp(1, pod::MAX_INTERFACES);
    let addresses = |position: usize| known.ip_allocation_metadata.get(position).map_or_else(Vec::new, pod::addresses);
    (0..=u8::MAX)
        .zip(0..interfaces)
        .map(|(index, position)| Teardown {
            host_if: names.host_if(prefix, index),
            pod_if: pod::pod_if(&call.if_name, index),
            addresses: addresses(position),
        })
        .collect()
}

/// Keeps the release on disk and says so.
pub fn queue_release(call: &Call, failure: Failure, log: &Log) -> Result<(), Failure> {
    let why = chain(&failure);
    match call.conf.release_queue_dir().and_then(|dir| Queue::new(dir).push(call)) {
        Ok(Queued::Written) => {
            log.line(Level::Warn, "release queued: ipamd did not take it", &[("error", why.into())]);
            Ok(())
        }
        Ok(Queued::Full) => {
            let message = "release queue full: the address stays taken until ipamd's audit finds its sandbox gone";
            log.line(Level::Error, message, &[("error", why.into()), ("limit", crate::queue::MAX_QUEUED.into())]);
            Ok(())
        }
        Err(queue) => {
            Err(Failure::ReleaseLost { pod: pod::title(call), daemon: Box::new(failure), queue: Box::new(queue) })
        }
    }
}

/// A release that went through makes an earlier queued one moot. Left behind it does no harm either.
fn settle(call: &Call, log: &Log) {
    if let Err(failure) = call.conf.release_queue_dir().and_then(|dir| Queue::new(dir).settle(call)) {
        log.line(Level::Warn, "stale release left in the queue", &[("error", chain(&failure).into())]);
    }
}

async fn forget_policy(call: &Call, mode: &str, log: &Log) {
    if mode.is_empty() {
        return;
    }
    let told = async { daemon::delete_policy(&call.conf.npa_socket()?, call).await };
    match timeout(POLICY, told).await {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => {
            log.line(Level::Warn, "policy agent not told of the end", &[("error", chain(&failure).into())]);
        }
        Err(_) => log.line(Level::Warn, "policy agent not told of the end", &[("error", "no answer in time".into())]),
    }
}
