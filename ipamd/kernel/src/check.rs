//! CHECK: what of a pod's wiring is not as it was made, one sentence per difference, for an operator to act on.

use std::net::IpAddr;

use flatwire_core::ids::{MacAddress, RouteTable};
use ipnet::IpNet;

use crate::error::KernelError;
use crate::link::{Link, first_link, get_link};
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::pod::PodWiring;
use crate::route::{Route, first_route, match_route};

/// What the kernel should show beside the wiring itself. MACs that are not known are not compared: a pod that the
/// add-on wired has random ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expected {
    pub host_mac: Option<MacAddress>,
    pub pod_mac: Option<MacAddress>,
}

impl Expected {
    /// The MACs that `wire` gives to this wiring.
    pub fn of(wiring: &PodWiring) -> Self {
        let macs = wiring.macs();
        Self { host_mac: Some(macs.host_mac), pod_mac: Some(macs.pod_mac) }
    }
}

/// Compares the kernel with what `wire` made. An empty list means that everything stands; an error means that the
/// kernel could not be read.
pub async fn check(wiring: &PodWiring, expected: &Expected) -> Result<Vec<String>, KernelError> {
    let mut differences = Vec::new();
    let host = Netlink::open()?;
    let host_link = host_side(&host, wiring, expected, &mut differences).await?;
    match Netns::open(&wiring.netns) {
        Ok(netns) => {
            let pod = Netlink::in_namespace(&netns)?;
            pod_side(&pod, wiring, expected, host_link.as_ref(), &mut differences).await?;
        }
        Err(e) if e.is_absent() => differences.push(format!("{e}: the sandbox is gone; delete the pod")),
        Err(e) => return Err(e),
    }
    Ok(differences)
}

async fn host_side(
    host: &Netlink,
    wiring: &PodWiring,
    expected: &Expected,
    differences: &mut Vec<String>,
) -> Result<Option<Link>, KernelError> {
    let name = &wiring.host_if;
    let mut requests = vec![get_link(name)];
    requests.extend(wiring.addresses().map(match_route));
    let mut outcomes = host.batch(requests).await?.into_iter();
    let mut answer = || outcomes.next().and_then(Result::ok).unwrap_or_default();
    let link = first_link(&answer());

    match &link {
        None => differences.push(format!("host interface {name} is missing: the pod is cut off; recreate it")),
        Some(link) if !link.is_veth() => {
            differences.push(format!("host interface {name} is not a veth: something else took the pod's name"));
        }
        Some(link) => {
            compare_link("host", link, wiring.mtu, expected.host_mac, differences);
        }
    }
    for address in wiring.addresses() {
        let route = first_route(&answer()).filter(|route| route.destination == IpNet::from(address));
        match (route, &link) {
            (None, _) => differences.push(format!(
                "the node has no route to {address} in table main: packets for the pod go astray; restore \
                 `{address} dev {name} scope link`"
            )),
            (Some(route), Some(link)) if route.link != Some(link.index) => {
                differences.push(format!(
                    "the node's route to {address} leads to {} and not to {name}: another pod may have this address",
                    name_of(host, route.link).await?
                ));
            }
            (Some(route), _) if route.table != RouteTable::MAIN.0 => differences.push(format!(
                "the node finds {address} in table {} and not in main: look for a foreign rule",
                route.table
            )),
            _ => {}
        }
    }
    Ok(link)
}

async fn pod_side(
    pod: &Netlink,
    wiring: &PodWiring,
    expected: &Expected,
    host_link: Option<&Link>,
    differences: &mut Vec<String>,
) -> Result<(), KernelError> {
    let name = &wiring.pod_if;
    let Some(link) = pod.link(name).await? else {
        differences.push(format!(
            "interface {name} is missing in {}: the pod has no network; recreate it",
            wiring.netns.display()
        ));
        return Ok(());
    };
    compare_link("pod", &link, wiring.mtu, expected.pod_mac, differences);
    if let Some(host_link) = host_link
        && host_link.peer != Some(link.index)
    {
        differences.push(format!("{name} in the pod and {} on the node are not ends of one veth", wiring.host_if));
    }

    let addresses = pod.addresses().await?;
    // Further addresses are no difference: a later plugin of the chain may have added them.
    for address in wiring.addresses() {
        if !addresses.iter().any(|a| a.link == link.index && a.address == IpNet::from(address)) {
            differences
                .push(format!("pod interface {name} lacks its address {address}: add `{}`", IpNet::from(address)));
        }
        routes(pod, wiring, address, &link, differences).await?;
        neighbour(pod, wiring, address, &link, host_link.and_then(|link| link.mac), differences).await?;
    }
    Ok(())
}

async fn routes(
    pod: &Netlink,
    wiring: &PodWiring,
    address: IpAddr,
    link: &Link,
    differences: &mut Vec<String>,
) -> Result<(), KernelError> {
    let gateway = wiring.gateway(address);
    let table = wiring.pod_table();
    let routes = pod.routes_of(gateway).await?;
    let stands = |wanted: &Route| {
        routes.iter().any(|route| {
            route.table == table
                && route.destination == wanted.destination
                && route.via == wanted.via
                && route.link == Some(link.index)
        })
    };
    for wanted in [Route::to_host(gateway).table(table), Route::default_via(gateway).table(table)] {
        if !stands(&wanted) {
            differences.push(format!(
                "the pod lacks the route `{wanted}` by {}: it cannot send; restore the route or recreate the pod",
                wiring.pod_if
            ));
        }
    }
    if let Some(rule) = wiring.pod_rule(address)
        && !pod.rules().await?.contains(&rule)
    {
        differences.push(format!("the pod lacks the rule `{rule}`: its interface {} cannot send", wiring.pod_if));
    }
    Ok(())
}

async fn neighbour(
    pod: &Netlink,
    wiring: &PodWiring,
    address: IpAddr,
    link: &Link,
    host_mac: Option<MacAddress>,
    differences: &mut Vec<String>,
) -> Result<(), KernelError> {
    let gateway: IpAddr = wiring.gateway(address);
    match (pod.permanent_neighbour(link.index, gateway).await?, host_mac) {
        (None, _) => differences.push(format!(
            "the pod lacks the permanent neighbour {gateway} on {}: nobody answers for that address, so it cannot send",
            wiring.pod_if
        )),
        (Some(found), Some(mac)) if found != mac => differences.push(format!(
            "the pod's neighbour {gateway} is {found} and not {mac}, the MAC of {}: its packets are dropped",
            wiring.host_if
        )),
        _ => {}
    }
    Ok(())
}

fn compare_link(side: &str, link: &Link, mtu: u32, mac: Option<MacAddress>, differences: &mut Vec<String>) {
    let name = &link.name;
    if !link.up {
        differences.push(format!("{side} interface {name} is down: bring it up"));
    }
    if link.mtu != mtu {
        differences.push(format!("{side} interface {name} has MTU {} and not {mtu}", link.mtu));
    }
    if let (Some(expected), Some(found)) = (mac, link.mac)
        && expected != found
    {
        differences.push(format!("{side} interface {name} has MAC {found} and not {expected}"));
    }
}

async fn name_of(host: &Netlink, index: Option<u32>) -> Result<String, KernelError> {
    let links = host.links().await?;
    let link = links.into_iter().find(|link| Some(link.index) == index);
    Ok(link.map_or_else(|| "an unknown interface".to_owned(), |link| link.name))
}
