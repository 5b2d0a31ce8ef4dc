//! GC: ipamd names every attachment of the network that is not in the list; each is taken down in the kernel and then
//! released. Errors are collected; everything that can go, goes, and what stays is named again by the next GC.

use std::time::Duration;

use flatwire_proto::StaleAttachment;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::input::Call;
use crate::log::{Level, Log};
use crate::pod::{self, Names};
use crate::wiring::{self, Teardown};

/// All stale attachments together. Most of them have lost their links with their namespaces long ago.
pub const TAKE_DOWN: Duration = Duration::from_secs(15);

pub async fn run(call: &Call, log: &Log) -> Result<Option<Value>, Failure> {
    let valid = call.conf.valid_attachments()?;
    let prefix = call.conf.veth_prefix()?;
    let mut ipamd = Daemon::connect(&call.conf.ipamd_socket()?).await?;
    let reply = ipamd.gc(&call.conf.name, valid).await?;
    let mut errors = Vec::new();
    let until = Instant::now() + TAKE_DOWN;
    for stale in &reply.stale {
        let title = format!("container {} interface {}", stale.container_id, stale.if_name);
        let late = || Failure::KernelLate { done: "taken down", pod: title.clone(), after: TAKE_DOWN };
        let taken_down = timeout_at(until, take_down(prefix, &title, stale)).await.unwrap_or_else(|_| Err(late()));
        // Kernel before ledger, as for DEL: what still stands keeps its address.
        let outcome = match taken_down {
            Ok(()) => ipamd.release_stale(&call.conf.name, stale).await,
            Err(failure) => Err(failure),
        };
        errors.extend(outcome.err().filter(|failure| !failure.is_unknown_sandbox()));
    }
    let count = reply.stale.len();
    log.line(Level::Info, "stale attachments removed", &[("count", count.into()), ("errors", json!(errors.len()))]);
    // Last, so that what was named is removed although ipamd could not name everything.
    if let Some(failure) = reply.failure {
        errors.push(Failure::from_daemon("GcNetwork", Some(failure)));
    }
    if errors.is_empty() { Ok(None) } else { Err(Failure::Gc { errors }) }
}

async fn take_down(prefix: &str, title: &str, stale: &StaleAttachment) -> Result<(), Failure> {
    let names = Names::of_stale(stale);
    for (index, entry) in (0..=u8::MAX).zip(&stale.ip_allocation_metadata).take(pod::MAX_INTERFACES) {
        let teardown = Teardown {
            host_if: names.host_if(prefix, index),
            pod_if: pod::pod_if(&stale.if_name, index),
            addresses: pod::addresses(entry),
        };
        wiring::unwire(title, None, teardown).await?;
    }
    Ok(())
}
