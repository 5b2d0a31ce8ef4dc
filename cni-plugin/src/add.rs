//! ADD: ledger, then kernel, then policy, then the answer. What fails undoes all before it.
//!
//! One thing the kernel does before the ledger has answered: it makes the pair of links, which takes it as long as ipamd
//! takes for its record. Until the answer the pair is down, without an address, and no route leads there; without an answer
//! it goes again.
//!
//! In a chain behind another plugin (`prevResult` is given) this plugin adds its interface all the same and puts it
//! behind the ones already in the result. A chain that already has `CNI_IFNAME` fails, because the name is taken.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use flatwire_kernel::pod::Pair;
use flatwire_proto::AddNetworkReply;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::daemon::{self, Daemon};
use crate::del;
use crate::failure::Failure;
use crate::input::Call;
use crate::log::{Level, Log};
use crate::pod::{self, Granted};
use crate::queue::Queue;
use crate::wiring::{self, Sandbox};

/// Every interface of the pod together. IPv6 waits for nothing: addresses are set without duplicate detection.
pub const WIRE: Duration = Duration::from_secs(4);
/// Releasing after a failure; when this passes, the release queue takes over.
pub const UNDO_CALL: Duration = Duration::from_secs(2);
/// What the add-on tells its daemon when the kernel refuses; metrics are kept by this text.
const UNDO_REASON: &str = "SetupNSFailed";

pub async fn run(call: &Call, log: &Log) -> Result<Option<Value>, Failure> {
    call.conf.check_for_add()?;
    let prefix = call.conf.veth_prefix()?;
    let mtu = call.conf.mtu()?;
    let previous = call.conf.prev_result()?;
    // First of all, so that ipamd wakes up while this process looks at the sandbox; whether it is there matters later.
    let ipamd = Daemon::connect(&call.conf.ipamd_socket()?).await;
    let sandbox = Sandbox::open(call)?;
    sandbox.require_free_name(call).await?;

    // Before the question, so that no release of an earlier life of this sandbox can hit the answer: see queue.rs.
    Queue::new(call.conf.release_queue_dir()?).settle(call)?;
    let mut ipamd = ipamd?;
    let (reply, pair) = meanwhile(ipamd.add(call), sandbox.make_pair(call, prefix, mtu)).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(failure) => {
            wiring::remove_pair(pair).await;
            return Err(failure);
        }
    };
    match set_up(call, &sandbox, pair, prefix, mtu, &reply).await {
        Ok(granted) => {
            let addresses: Vec<String> =
                granted.iter().flat_map(Granted::addresses).map(|address| address.to_string()).collect();
            let links: Vec<&str> = granted.iter().map(|one| one.host_if.as_str()).collect();
            log.line(Level::Debug, "wired", &[("addresses", json!(addresses)), ("links", json!(links))]);
            Ok(Some(pod::result(call, prefix, mtu, &granted).encode(call.conf.version, previous)))
        }
        Err((failure, Undone::Wholly)) => {
            release(call, &mut ipamd, log).await;
            Err(failure)
        }
        // What still stands keeps its address: the DEL that follows takes both.
        Err((failure, Undone::InPart)) => Err(failure),
    }
}

/// Asks, and works while the answer is on its way. The work may block the thread, so it begins once the question has left.
async fn meanwhile<A, W>(question: impl Future<Output = A>, work: impl Future<Output = Option<W>>) -> (A, Option<W>) {
    let mut question = pin!(question);
    if let Poll::Ready(answer) = poll_fn(|context| Poll::Ready(question.as_mut().poll(context))).await {
        return (answer, None);
    }
    // Now the connection's own task sends it.
    tokio::task::yield_now().await;
    let done = work.await;
    (question.await, done)
}

/// Whether the kernel is as it was before.
enum Undone {
    Wholly,
    InPart,
}

async fn set_up(
    call: &Call,
    sandbox: &Sandbox,
    pair: Option<Pair>,
    prefix: &str,
    mtu: u32,
    reply: &AddNetworkReply,
) -> Result<Vec<Granted>, (Failure, Undone)> {
    let granted = match granted(call, prefix, reply) {
        Ok(granted) => granted,
        Err(failure) => {
            wiring::remove_pair(pair).await;
            return Err((failure, Undone::Wholly));
        }
    };
    let mut wired = 0;
    let outcome = match timeout(WIRE, sandbox.wire_all(call, mtu, &granted, pair, &mut wired)).await {
        Ok(Ok(())) => enforce(call, &reply.network_policy_mode, granted.len()).await,
        Ok(Err(failure)) => Err(failure),
        Err(_) => {
            // Where it stopped is unknown, so all of it is taken down.
            wired = granted.len();
            Err(Failure::KernelLate { done: "set up", pod: pod::title(call), after: WIRE })
        }
    };
    if let Err(failure) = outcome {
        let clean = wiring::unwire_granted(call, granted.get(..wired).unwrap_or_default()).await;
        return Err((failure, if clean { Undone::Wholly } else { Undone::InPart }));
    }
    Ok(granted)
}

fn granted(call: &Call, prefix: &str, reply: &AddNetworkReply) -> Result<Vec<Granted>, Failure> {
    if reply.pod_vlan_id != 0 {
        let wish = "security groups of its own (a branch ENI)";
        return Err(Failure::NotOffered { pod: pod::title(call), wish });
    }
    pod::granted(call, prefix, &reply.ip_allocation_metadata)
}

async fn enforce(call: &Call, mode: &str, interfaces: usize) -> Result<(), Failure> {
    if mode.is_empty() {
        return Ok(());
    }
    daemon::enforce_policy(&call.conf.npa_socket()?, call, mode, interfaces).await
}

/// Gives the address back after a failure. The failure is what the runtime hears; a release that does not get through is
/// queued, and the DEL that has to follow a failed ADD settles it too.
async fn release(call: &Call, ipamd: &mut Daemon, log: &Log) {
    let failure = match timeout(UNDO_CALL, ipamd.del(call, UNDO_REASON)).await {
        Ok(Ok(_)) => return,
        Ok(Err(failure)) if failure.is_unknown_sandbox() => return,
        Ok(Err(failure)) => failure,
        Err(_) => Failure::PeerLate { peer: "ipamd", call: "DelNetwork", after: UNDO_CALL },
    };
    del::queue_release(call, failure, log).unwrap_or_else(|failure| {
        log.line(Level::Error, "address of a failed ADD not released", &[("error", failure.to_string().into())]);
    });
}
