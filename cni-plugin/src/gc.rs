//! GC: ipamd releases every attachment of the network that is not in the list, and what it released is taken down here.
//! Errors are collected; everything that can go, goes.

use std::time::Duration;

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
    for released in &reply.released {
        let names = Names::of_released(released);
        let title = format!("container {} interface {}", released.container_id, released.if_name);
        for (index, entry) in (0..=u8::MAX).zip(&released.ip_allocation_metadata).take(pod::MAX_INTERFACES) {
            let address = [&entry.ipv4_addr, &entry.ipv6_addr].into_iter().find_map(|text| text.parse().ok());
            let teardown = Teardown {
                host_if: names.host_if(prefix, index),
                pod_if: pod::pod_if(&released.if_name, index),
                addresses: address.into_iter().collect(),
            };
            let late = || Failure::KernelLate { done: "taken down", pod: title.clone(), after: TAKE_DOWN };
            let outcome = timeout_at(until, wiring::unwire(&title, None, teardown)).await;
            errors.extend(outcome.unwrap_or_else(|_| Err(late())).err());
        }
    }
    let count = reply.released.len();
    log.line(Level::Info, "stale attachments removed", &[("count", count.into()), ("errors", json!(errors.len()))]);
    // Last, so that what was released is taken down although ipamd could not release everything.
    if let Some(failure) = reply.failure {
        errors.push(Failure::from_daemon("GcNetwork", Some(failure)));
    }
    if errors.is_empty() { Ok(None) } else { Err(Failure::Gc { errors }) }
}
