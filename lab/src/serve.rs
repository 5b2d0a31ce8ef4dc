//! The world's doors: EC2's API for people and for nodes, IMDS in every VPC, and the socket of the commands.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt as _;
use flatwire_core::ids::{InstanceId, VpcId};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::{Notify, watch};

use crate::ctl::{Request, answer};
use crate::error::{Doing, Error, Result, chain};
use crate::fabric::{EC2_INSIDE, IMDS};
use crate::ns::Place;
use crate::world::World;

/// The world has this long to be held by its parent.
const HELD_WITHIN: Duration = Duration::from_secs(10);

impl World {
    /// IMDS and the API inside a VPC, on the router's own addresses.
    pub(crate) fn serve_inside(self: &Arc<Self>, vpc: &VpcId, place: &Place) -> Result<()> {
        let bind = |address: Ipv4Addr| -> Result<tokio::net::TcpListener> {
            place
                .run_in_runtime(|| {
                    let listener = TcpListener::bind((address, 80))?;
                    listener.set_nonblocking(true)?;
                    tokio::net::TcpListener::from_std(listener)
                })?
                .doing(|| format!("listen on {address} inside {vpc}"))
        };
        let (imds, api) = (bind(IMDS)?, bind(EC2_INSIDE)?);
        tokio::spawn(serve_api(Arc::clone(self), api));
        tokio::spawn(serve_imds(Arc::clone(self), vpc.clone(), imds));
        Ok(())
    }

    /// Whose address it is: IMDS knows its caller by that and nothing else. The source check has seen to it that the
    /// caller does hold the address.
    fn identify(&self, vpc: &VpcId, address: SocketAddr) -> Option<InstanceId> {
        let view = self.cloud.view();
        let eni = view.enis.iter().find(|eni| eni.vpc == *vpc && eni.holds(address.ip()))?;
        eni.attachment.as_ref().map(|attachment| attachment.instance.clone())
    }
}

/// The API, where every answer to a change waits for the fabric.
pub(crate) async fn serve_api(world: Arc<World>, listener: tokio::net::TcpListener) {
    let follower = Arc::clone(&world);
    let waiting = axum::middleware::from_fn(move |request, next: axum::middleware::Next| {
        let world = Arc::clone(&follower);
        async move {
            let response = next.run(request).await;
            world.caught_up().await;
            response
        }
    });
    let router = world.cloud.api().layer(waiting);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(error = chain(&error), "the API is no longer served");
    }
}

/// IMDS for one VPC. Its packets travel as many hops as the instance allows, so that a pod behind one more hop hears
/// nothing where that is one; EC2 limits only the token's answer, which comes to the same, as nothing works without it.
async fn serve_imds(world: Arc<World>, vpc: VpcId, listener: tokio::net::TcpListener) {
    let limits = (Arc::clone(&world), vpc.clone());
    let listener = listener.tap_io(move |stream| {
        let (world, vpc) = &limits;
        let caller = stream.peer_addr().ok().and_then(|address| world.identify(vpc, address));
        let hops = caller.and_then(|id| world.cloud.view().instance(&id).map(|info| info.hop_limit));
        if let Err(error) = stream.set_ttl(hops.unwrap_or(1)) {
            tracing::warn!(error = chain(&error), "the hop limit could not be set");
        }
    });
    let asked = Arc::clone(&world);
    let router = world.cloud.imds(move |address| asked.identify(&vpc, address));
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    if let Err(error) = axum::serve(listener, service).await {
        tracing::error!(error = chain(&error), "IMDS is no longer served");
    }
}

pub(crate) async fn serve_control(
    world: Arc<World>,
    control: UnixListener,
    ready: watch::Receiver<Option<Result<(), String>>>,
) -> Result<()> {
    let control = tokio::net::UnixListener::from_std(control).doing(|| "listen for commands".into())?;
    let held = Arc::new(Notify::new());
    let first = Arc::clone(&held);
    tokio::spawn(async move {
        if tokio::time::timeout(HELD_WITHIN, first.notified()).await.is_err() {
            std::process::exit(1);
        }
    });
    loop {
        let (stream, _) = control.accept().await.doing(|| "accept a command".into())?;
        tokio::spawn(converse(Arc::clone(&world), stream, ready.clone(), Arc::clone(&held)));
    }
}

async fn converse(
    world: Arc<World>,
    stream: tokio::net::UnixStream,
    mut ready: watch::Receiver<Option<Result<(), String>>>,
    held: Arc<Notify>,
) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let mut holds = false;
    while let Ok(Some(line)) = lines.next_line().await {
        let result = match serde_json::from_str(&line).doing(|| "the request".into()) {
            Err(error) => Err(error),
            Ok(request) => {
                if matches!(request, Request::Hold) {
                    held.notify_one();
                    holds = true;
                }
                let built = match ready.wait_for(Option::is_some).await {
                    Ok(built) => built.clone(),
                    Err(_) => None,
                };
                match built {
                    Some(Ok(())) => world.handle(request).await,
                    Some(Err(text)) => Err(Error::Refused(text)),
                    None => Err(Error::refused("the lab is ending")),
                }
            }
        };
        if write.write_all(answer(result).as_bytes()).await.is_err() {
            break;
        }
    }
    if holds {
        std::process::exit(0);
    }
}
