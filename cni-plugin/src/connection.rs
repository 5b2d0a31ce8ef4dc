//! One gRPC connection over a unix socket, for a process that makes a call or two and ends. Tonic's own channel reconnects,
//! limits and buffers behind a task of its own: a tenth of an ADD, for nothing.

use std::path::Path;
use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{BoxFuture, Service};

/// What HTTP/2 wants in every request, and nobody at the other end of a unix socket reads.
pub const ORIGIN: &str = "http://localhost";

pub struct Connection(SendRequest<Body>);

impl Connection {
    /// To be called in a runtime, in which the connection lives.
    pub async fn open(socket: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let stream = UnixStream::connect(socket).await?;
        let (requests, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        // Its end is the error of the request that waits for an answer.
        tokio::spawn(connection);
        Ok(Self(requests))
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
