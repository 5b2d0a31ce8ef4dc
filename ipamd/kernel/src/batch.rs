//! Many changes at once, in few datagrams: what makes hundreds of links, routes and rules a matter of milliseconds.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;

use crate::error::KernelError;
use crate::link::{VethEnd, new_veth};
use crate::netlink::{Netlink, RouteRequest};
use crate::route::{Route, replace_route};
use crate::rule::{Rule, add_rule, delete_rule};

/// Requests in one datagram; the kernel's answers to one must fit the socket.
const MOST_AT_ONCE: usize = 128;

/// Changes in the order they are to be made. Every one must succeed.
#[derive(Debug, Default)]
pub struct Batch {
    requests: Vec<RouteRequest>,
}

impl Batch {
    pub fn veth(&mut self, a: &VethEnd<'_>, b: &VethEnd<'_>) {
        self.requests.push(new_veth(a, b));
    }

    /// A link of a kind this crate has no word for.
    pub fn new_link(&mut self, what: &str, message: LinkMessage) {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.requests.push(RouteRequest::new(format!("create {what}"), RouteNetlinkMessage::NewLink(message), flags));
    }

    /// Changes a link that is named in the message.
    pub fn set_link(&mut self, what: &str, message: LinkMessage) {
        self.requests.push(RouteRequest::new(format!("change {what}"), RouteNetlinkMessage::SetLink(message), 0));
    }

    /// A route that leaves by the link with this index.
    pub fn route(&mut self, link: u32, route: &Route) {
        self.requests.push(replace_route(&route.clone().link(link)));
    }

    pub fn rule(&mut self, rule: &Rule) {
        self.requests.push(add_rule(rule));
    }

    pub fn delete_rule(&mut self, rule: &Rule) {
        self.requests.push(delete_rule(rule));
    }
}

impl Netlink {
    /// Makes all changes; stops after the datagram in which one was refused, and that refusal is the error.
    pub async fn run(&self, batch: Batch) -> Result<(), KernelError> {
        let mut requests = batch.requests.into_iter().peekable();
        while requests.peek().is_some() {
            self.all(requests.by_ref().take(MOST_AT_ONCE).collect()).await?;
        }
        Ok(())
    }
}
