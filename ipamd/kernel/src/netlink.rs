//! `Netlink`: a route netlink connection in one namespace, with a verb for each thing this project does to links,
//! addresses, routes, rules and neighbours. The verbs live beside the things they are about (`link`, `address`, `route`,
//! `rule`).
//!
//! Nothing here knows pods, ENIs or plans. Verbs name links by name and look the index up in their own namespace.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::sync::Mutex;

use crate::error::KernelError;
use crate::netns::Netns;
use crate::nl::{Outcome, Request, Socket};

pub(crate) type RouteRequest = Request<RouteNetlinkMessage>;

/// A connection to the network stack of one namespace. It stays with that namespace wherever it is used from, and keeps
/// it alive. One exchange at a time; share it by reference.
pub struct Netlink {
    socket: Mutex<Socket>,
}

impl Netlink {
    /// Connects to the calling thread's namespace.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self::over(Socket::open(NETLINK_ROUTE)?))
    }

    /// Connects to another namespace.
    pub fn in_namespace(netns: &Netns) -> Result<Self, KernelError> {
        Ok(Self::over(Socket::open_in(netns, NETLINK_ROUTE)?))
    }

    fn over(socket: Socket) -> Self {
        Self { socket: Mutex::new(socket) }
    }

    /// All of these in one datagram; every one must succeed.
    pub(crate) async fn all(&self, requests: Vec<RouteRequest>) -> Result<Vec<Vec<RouteNetlinkMessage>>, KernelError> {
        self.socket.lock().await.all(requests).await
    }

    /// All of these in one datagram, with what became of each.
    pub(crate) async fn batch(
        &self,
        requests: Vec<RouteRequest>,
    ) -> Result<Vec<Outcome<RouteNetlinkMessage>>, KernelError> {
        self.socket.lock().await.batch(requests).await
    }

    pub(crate) async fn one(&self, request: RouteRequest) -> Outcome<RouteNetlinkMessage> {
        self.socket.lock().await.one(request).await
    }

    pub(crate) async fn dump(
        &self,
        operation: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        self.socket.lock().await.dump(operation, message).await
    }
}
