//! Between the verbs and `flatwire-kernel`: which namespace may be touched, and what an error there means to the caller.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use flatwire_kernel::pod::{self as kernel, Ends, Expected, Pair, PodUnwiring, PodWiring};
use flatwire_kernel::{KernelError, Netlink, Netns};
use tokio::time::timeout;

use crate::failure::Failure;
use crate::input::Call;
use crate::pod::{self, Granted};

/// Deleting a veth waits for a grace period of the kernel, tens of milliseconds; a busy node may take a second.
pub const UNWIRE: Duration = Duration::from_secs(3);
/// One question to the kernel.
pub const LOOK: Duration = Duration::from_secs(1);
/// Deleting after a failed ADD, where DEL follows anyway.
pub const UNDO: Duration = Duration::from_millis(1500);

/// One interface to take down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Teardown {
    pub host_if: String,
    pub pod_if: String,
    pub addresses: Vec<IpAddr>,
}

/// The pod's namespace, held open, with the one connection to it.
pub struct Sandbox {
    netns: Netns,
    net: Netlink,
}

impl Sandbox {
    /// Refuses a namespace that is missing, is none, or is the one this process runs in.
    pub fn open(call: &Call) -> Result<Self, Failure> {
        let netns = given_netns(call)?;
        let refused = |source| Failure::Kernel { verb: "set up", pod: pod::title(call), source };
        Ok(Self { net: Netlink::in_namespace(&netns).map_err(refused)?, netns })
    }

    /// Refuses an ADD whose interface name is taken in the sandbox. This has to come before ipamd is asked: when it is a
    /// second ADD of a live attachment, ipamd answers with the address in use, and undoing this ADD would release it.
    pub async fn require_free_name(&self, call: &Call) -> Result<(), Failure> {
        let netns = call.netns.clone().unwrap_or_default();
        let refused = |source| Failure::Kernel { verb: "set up", pod: pod::title(call), source };
        match timeout(LOOK, self.net.link(&call.if_name)).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(taken))) => Err(refused(KernelError::PodInterfaceTaken { name: taken.name, netns })),
            Ok(Err(source)) => Err(refused(source)),
            Err(_) => Err(Failure::KernelLate { done: "looked at", pod: pod::title(call), after: LOOK }),
        }
    }

    /// The pair of the pod's first interface, while nobody knows its address. What is in the way of it will be in the way of
    /// `wire_all`, which says so: a pod of this name may have left its link, and that goes only once there is an address.
    pub async fn make_pair(&self, call: &Call, prefix: &str, mtu: u32) -> Option<Pair> {
        let (host_if, pod_if) = (pod::Names::of(call).host_if(prefix, 0), pod::pod_if(&call.if_name, 0));
        let seed = flatwire_core::naming::seed(&call.container_id, &pod_if);
        let ends = Ends { pod_if: &pod_if, host_if: &host_if, mtu, seed: &seed };
        timeout(LOOK, Pair::make(&ends, &self.netns)).await.ok()?.ok()
    }

    /// Wires one interface after the other and counts those that are done. The first has its pair already, if there is one.
    pub async fn wire_all(
        &self,
        call: &Call,
        mtu: u32,
        granted: &[Granted],
        mut pair: Option<Pair>,
        done: &mut usize,
    ) -> Result<(), Failure> {
        for one in granted {
            let wired = kernel::wire_in(&wiring_of(call, one, mtu), &self.netns, &self.net, pair.take()).await;
            wired.map_err(|source| Failure::Kernel { verb: "set up", pod: pod::title(call), source })?;
            *done += 1;
        }
        Ok(())
    }
}

/// Takes away what no address came for. It is down and nothing leads to it, so that what goes wrong here is no news: the DEL
/// that has to follow a failed ADD takes it too, as the end of the sandbox does.
pub async fn remove_pair(pair: Option<Pair>) {
    if let Some(pair) = pair {
        let _ = timeout(UNDO, pair.remove()).await;
    }
}

fn given_netns(call: &Call) -> Result<Netns, Failure> {
    let path = call.netns.clone().unwrap_or_default();
    let wrong = |problem: &str| Failure::environment("CNI_NETNS", format!("is {}, which {problem}", path.display()));
    match Netns::open(&path).and_then(|given| Ok((given.is_own()?, given))) {
        Ok((false, netns)) => Ok(netns),
        Ok((true, _)) => Err(wrong("is the namespace of the runtime itself")),
        Err(KernelError::NetnsMissing { path }) => Err(Failure::SandboxGone { netns: path }),
        Err(KernelError::NotANetns { .. }) => Err(wrong("is not a network namespace")),
        Err(source) => Err(Failure::Kernel { verb: "set up", pod: pod::title(call), source }),
    }
}

/// The namespace to look into on DEL. One that is gone is no error; neither is our own, to which a path such as
/// `/proc/1234/ns/net` leads once the process is gone and its number is in use again. Nothing is touched in either.
fn sandbox_left(call: &Call) -> Option<PathBuf> {
    given_netns(call).ok().and_then(|_| call.netns.clone())
}

pub fn wiring_of(call: &Call, granted: &Granted, mtu: u32) -> PodWiring {
    PodWiring {
        netns: call.netns.clone().unwrap_or_default(),
        pod_if: granted.pod_if.clone(),
        host_if: granted.host_if.clone(),
        mtu,
        address: granted.address,
        second: granted.second,
        gateway_index: granted.gateway_index,
        seed: flatwire_core::naming::seed(&call.container_id, &granted.pod_if),
    }
}

/// Takes down what a failed ADD has made; false if something of it may still stand. Its errors are not told: the first
/// failure is, and DEL follows.
pub async fn unwire_granted(call: &Call, granted: &[Granted]) -> bool {
    let all = async {
        let mut clean = true;
        for one in granted.iter().rev() {
            let teardown = PodUnwiring {
                netns: call.netns.clone(),
                pod_if: one.pod_if.clone(),
                host_if: one.host_if.clone(),
                addresses: one.addresses().collect(),
            };
            clean &= kernel::unwire(&teardown).await.is_ok();
        }
        clean
    };
    timeout(UNDO, all).await.unwrap_or(false)
}

/// Takes down all interfaces of a pod, the last one first; goes on after an error and tells the first.
pub async fn tear_down(call: &Call, plan: Vec<Teardown>) -> Result<(), Failure> {
    let title = pod::title(call);
    let netns = sandbox_left(call);
    let all = async {
        let mut first = None;
        for one in plan.into_iter().rev() {
            if let Err(failure) = unwire(&title, netns.clone(), one).await {
                first.get_or_insert(failure);
            }
        }
        first.map_or(Ok(()), Err)
    };
    let late = || Failure::KernelLate { done: "taken down", pod: title.clone(), after: UNWIRE };
    timeout(UNWIRE, all).await.unwrap_or_else(|_| Err(late()))
}

pub async fn unwire(title: &str, netns: Option<PathBuf>, teardown: Teardown) -> Result<(), Failure> {
    let Teardown { host_if, pod_if, addresses } = teardown;
    let unwiring = PodUnwiring { netns, pod_if, host_if, addresses };
    let failed = |source| Failure::Kernel { verb: "take down", pod: title.to_owned(), source };
    kernel::unwire(&unwiring).await.map_err(failed)
}

/// Compares one interface with what ADD made. MACs are not compared: a pod that the add-on wired has random ones, and a
/// later plugin of the chain may set its own; that each end knows the other's is compared.
pub async fn check(call: &Call, expected: &Granted, mtu: u32) -> Result<(), Failure> {
    let differences = kernel::check(&wiring_of(call, expected, mtu), &Expected::default())
        .await
        .map_err(|source| Failure::Kernel { verb: "check", pod: pod::title(call), source })?;
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::Difference { what: format!("{}: {}", pod::title(call), differences.join("; ")) })
}
