//! One gRPC connection over a unix socket, for a process that makes a call or two and ends. What reconnects, limits and
//! buffers (tonic's channel, hyper's client) does so in tasks of its own and sends a call in pieces, for each of which ipamd
//! wakes up: a sixth of an ADD, for nothing. Here a call leaves in one piece.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{BoxFuture, Service, StdError};

/// What HTTP/2 wants in every request, and nobody at the other end of a unix socket reads.
pub const ORIGIN: &str = "http://localhost";

pub struct Connection(SendRequest<Bytes>);

/// The body of an answer.
pub struct Answer(RecvStream);

impl Connection {
    /// To be called in a runtime, in which the connection lives.
    pub async fn open(socket: &std::path::Path) -> Result<Self, StdError> {
        let stream = UnixStream::connect(socket).await?;
        let (requests, connection) = h2::client::handshake(stream).await?;
        // Its end is the error of the request that waits for an answer.
        tokio::spawn(connection);
        Ok(Self(requests))
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Answer>;
    type Error = StdError;
    type Future = BoxFuture<Self::Response, StdError>;

    /// A connection that has ended says so when it is used, with its cause.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut requests = self.0.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let message = body.collect().await?.to_bytes();
            let (answer, mut sending) = requests.send_request(Request::from_parts(head, ()), false)?;
            sending.send_data(message, true)?;
            Ok(answer.await?.map(Answer))
        })
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        if let Some(data) = ready!(self.0.poll_data(context)) {
            let data = data?;
            self.0.flow_control().release_capacity(data.len())?;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let trailers = ready!(self.0.poll_trailers(context))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}
