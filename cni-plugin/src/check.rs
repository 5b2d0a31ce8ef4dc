//! CHECK: is the pod's network still what ADD made it? First the kernel against `prevResult`, then ipamd's ledger. The
//! first difference is named. Routes and addresses that a later plugin of the chain has added are none of our business.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::input::Call;
use crate::pod::{self, Attached, Granted, Names};
use crate::wiring;

/// Reading a handful of kernel objects.
pub const KERNEL: Duration = Duration::from_secs(4);

pub async fn run(call: &Call) -> Result<Option<Value>, Failure> {
    let previous =
        call.conf.prev_result()?.ok_or_else(|| Failure::config("prevResult", "is missing; CHECK needs it"))?;
    let attached = pod::attached(previous, &call.if_name);
    if attached.is_empty() {
        return Err(Failure::config("prevResult", &format!("holds no interface {} of a sandbox", call.if_name)));
    }
    let expected = expected(call, &attached)?;
    let compared = async {
        for (one, mtu) in &expected {
            wiring::check(call, one, *mtu).await?;
        }
        Ok(())
    };
    let late = || Failure::KernelLate { done: "compared", pod: pod::title(call), after: KERNEL };
    timeout(KERNEL, compared).await.unwrap_or_else(|_| Err(late()))?;
    compare_ledger(call, expected.iter().flat_map(|(one, _)| one.addresses()).collect()).await?;
    Ok(None)
}

fn expected(call: &Call, attached: &[Attached]) -> Result<Vec<(Granted, u32)>, Failure> {
    let prefix = call.conf.veth_prefix()?;
    let names = Names::of(call);
    let one = |attached: &Attached| {
        let Some(address) = attached.addresses.first().copied() else {
            return Err(Failure::config("prevResult", &format!("gives no address to interface {}", attached.pod_if)));
        };
        let host_if = attached.host_if.clone().unwrap_or_else(|| names.host_if(prefix, attached.position));
        let pod_if = attached.pod_if.clone();
        let gateway_index = pod::gateway_index(&call.if_name, attached.position);
        // A result before 1.1.0 does not say the MTU: then it is the configured one.
        let mtu = attached.mtu.map_or_else(|| call.conf.mtu(), Ok)?;
        let second = attached.addresses.iter().copied().find(|other| other.is_ipv6() != address.is_ipv6());
        Ok((Granted { gateway_index, host_if, pod_if, address, second, table: 0, device: 0 }, mtu))
    };
    attached.iter().map(one).collect()
}

async fn compare_ledger(call: &Call, wired: BTreeSet<IpAddr>) -> Result<(), Failure> {
    let mut ipamd = Daemon::connect(&call.conf.ipamd_socket()?).await?;
    let Some(reply) = ipamd.check(call).await? else { return Ok(()) };
    let held: BTreeSet<IpAddr> = reply.ip_allocation_metadata.iter().flat_map(pod::addresses).collect();
    if let Some(missing) = wired.difference(&held).next() {
        let held: Vec<String> = held.iter().map(IpAddr::to_string).collect();
        let held = if held.is_empty() { "nothing".to_owned() } else { held.join(", ") };
        return Err(Failure::Difference {
            what: format!("{} uses {missing}, but ipamd's ledger holds {held} for it", pod::title(call)),
        });
    }
    Ok(())
}
