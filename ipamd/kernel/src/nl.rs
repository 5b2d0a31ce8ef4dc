//! The one netlink socket of this crate: whole batches out in one datagram, answers back by sequence number.
//!
//! The kernel handles a netlink request inside `sendmsg`, so when it returns the answers already wait in the socket.
//! That is why a batch costs two system calls whatever its length, why only its last message asks for an
//! acknowledgement (errors are always reported), and why reading tries first and waits for readiness only then. Waiting
//! needs a tokio runtime with its I/O and time drivers enabled, and ends at a deadline.
//!
//! Messages and their parsing are netlink-packet-*'s and rtnetlink's; what is done here and not there: batches, refusal
//! of dumps that were torn by a concurrent change (NLM_F_DUMP_INTR), and the kernel's own error text (extended acks).

use std::fmt::Debug;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, ErrorMessage, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use tokio::net::unix::pipe::Receiver;
use tokio::time::Instant;

use crate::error::KernelError;
use crate::netns::{Netns, visit};

/// An exchange that is not over by then has failed. Generous: the kernel may be busy tearing down other namespaces.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(10);

/// A dump that is torn this many times in a row is given up.
const DUMP_TRIES: u32 = 10;

/// Larger than any one datagram the kernel sends (it fills at most 32 KiB).
const RECEIVE_BYTES: usize = 64 * 1024;

/// Batches up to this size go out with the socket's default buffer.
const SEND_BYTES: usize = 96 * 1024;

/// One message to the kernel, and what it is for in words that complete "could not …".
#[derive(Debug)]
pub(crate) struct Request<M> {
    pub message: M,
    pub flags: u16,
    pub operation: String,
}

impl<M> Request<M> {
    pub fn new(operation: impl Into<String>, message: impl Into<M>, flags: u16) -> Self {
        Self { message: message.into(), flags, operation: operation.into() }
    }
}

/// What became of one request of a batch: the messages that answered it, or the kernel's refusal.
pub(crate) type Outcome<M> = Result<Vec<M>, KernelError>;

/// A message that was not asked for, not parsed.
pub(crate) type Told = (NetlinkHeader, Vec<u8>);

/// What netlink-packet-* messages can do.
pub(crate) trait Message: NetlinkSerializable + NetlinkDeserializable + Debug + Clone {}
impl<M: NetlinkSerializable + NetlinkDeserializable + Debug + Clone> Message for M {}

/// An answer that is not parsed. netlink-packet-netfilter prints a whole list for each of its elements while it parses
/// them: a set of 700 addresses takes it more than a second.
pub(crate) struct Raw(pub Vec<u8>);

impl NetlinkDeserializable for Raw {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(payload.to_vec()))
    }
}

pub(crate) struct Socket {
    socket: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket of a netlink protocol in the calling thread's namespace.
    pub fn open(protocol: isize) -> Result<Self, KernelError> {
        Self::with_options(protocol).map_err(|source| KernelError::Open { source })
    }

    /// A socket of a netlink protocol in another namespace.
    pub fn open_in(netns: &Netns, protocol: isize) -> Result<Self, KernelError> {
        visit(netns, || Self::with_options(protocol)).map_err(|source| {
            let path = netns.path().to_owned();
            match source.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EPERM) => {
                    KernelError::Denied { operation: format!("enter network namespace {}", path.display()), source }
                }
                // A namespace, but of another type.
                Some(Errno::EINVAL) => KernelError::NotANetns { path },
                _ => KernelError::Netns { operation: "open a netlink socket in", path, source },
            }
        })
    }

    fn with_options(protocol: isize) -> io::Result<Self> {
        let socket = netlink_sys::Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        // The error's tail then holds the kernel's sentence and not a copy of the request.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    /// Sends all requests in one datagram and returns what became of each, in order. The kernel does them in order and
    /// does not stop at an error.
    pub async fn batch<M: Message>(&mut self, requests: Vec<Request<M>>) -> Result<Vec<Outcome<M>>, KernelError> {
        let acked = requests.len().saturating_sub(1);
        self.exchange(requests, acked, false).await
    }

    /// An nftables transaction, its begin and end included: all of it happens, or the first refusal is the error.
    pub async fn transaction<M: Message>(&mut self, requests: Vec<Request<M>>) -> Result<(), KernelError> {
        // The end of a transaction is acknowledged by kernels from 6.10 on only, the last message before it by all. A
        // refusal of the whole is reported as one of its begin, and then nothing else is answered.
        let acked = requests.len().saturating_sub(2);
        self.exchange(requests, acked, true).await?.into_iter().try_for_each(|outcome| outcome.map(drop))
    }

    async fn exchange<M: Message>(
        &mut self,
        requests: Vec<Request<M>>,
        acked: usize,
        first_refusal_ends: bool,
    ) -> Result<Vec<Outcome<M>>, KernelError> {
        let mut outcomes: Vec<Outcome<M>> = requests.iter().map(|_| Ok(Vec::new())).collect();
        let mut operations = Vec::with_capacity(requests.len());
        let mut bytes = Vec::new();
        let first = self.sequence.wrapping_add(1);
        for (position, request) in requests.into_iter().enumerate() {
            let ack = if position == acked { NLM_F_ACK } else { 0 };
            self.append(&mut bytes, request.message, request.flags | ack);
            operations.push(request.operation);
        }
        let Some(summary) = operations.get(acked).cloned() else { return Ok(outcomes) };
        self.send(&bytes, &summary)?;
        let deadline = Instant::now() + EXCHANGE_DEADLINE;
        loop {
            let mut over = false;
            for (header, payload) in self.receive::<M>(deadline, &summary).await? {
                // Answers to an earlier exchange that was given up have numbers outside this batch.
                let offset = usize::try_from(header.sequence_number.wrapping_sub(first)).unwrap_or(usize::MAX);
                let (Some(outcome), Some(operation)) = (outcomes.get_mut(offset), operations.get(offset)) else {
                    continue;
                };
                match payload {
                    NetlinkPayload::Error(error) => {
                        if let Some(code) = error.code {
                            let said = kernel_sentence(&header, &error);
                            *outcome = Err(KernelError::refused(operation.clone(), code.get(), said));
                            over |= offset == 0 && first_refusal_ends;
                        }
                        over |= offset == acked;
                    }
                    NetlinkPayload::InnerMessage(message) => {
                        if let Ok(messages) = outcome {
                            messages.push(message);
                        }
                    }
                    _ => {}
                }
            }
            if over {
                return Ok(outcomes);
            }
        }
    }

    /// As `batch`, where every request must succeed; the first refusal is the error.
    pub async fn all<M: Message>(&mut self, requests: Vec<Request<M>>) -> Result<Vec<Vec<M>>, KernelError> {
        self.batch(requests).await?.into_iter().collect()
    }

    /// One request that answers with messages of its own, or with nothing.
    pub async fn one<M: Message>(&mut self, request: Request<M>) -> Outcome<M> {
        Ok(self.all(vec![request]).await?.pop().unwrap_or_default())
    }

    /// A whole list as it stood at one moment: a reading that was torn by a concurrent change is thrown away and
    /// repeated.
    pub async fn dump<M: Message>(&mut self, operation: &str, message: M) -> Result<Vec<M>, KernelError> {
        self.dump_as(operation, message, Some).await
    }

    /// As `dump`, with answers of another type, of which only what `pick` takes is held in memory.
    pub async fn dump_as<M: Message, A: NetlinkDeserializable, T>(
        &mut self,
        operation: &str,
        message: M,
        pick: impl Fn(A) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        for _ in 0..DUMP_TRIES {
            if let Some(list) = self.dump_once(operation, message.clone(), &pick).await? {
                return Ok(list);
            }
        }
        Err(KernelError::Torn { operation: operation.to_owned(), tries: DUMP_TRIES })
    }

    async fn dump_once<M: Message, A: NetlinkDeserializable, T>(
        &mut self,
        operation: &str,
        message: M,
        pick: impl Fn(A) -> Option<T>,
    ) -> Result<Option<Vec<T>>, KernelError> {
        let mut bytes = Vec::new();
        let sequence = self.append(&mut bytes, message, NLM_F_DUMP);
        self.send(&bytes, operation)?;
        let deadline = Instant::now() + EXCHANGE_DEADLINE;
        let (mut list, mut torn) = (Vec::new(), false);
        loop {
            for (header, payload) in self.receive::<A>(deadline, operation).await? {
                if header.sequence_number != sequence {
                    continue;
                }
                torn |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => list.extend(pick(message)),
                    NetlinkPayload::Done(done) if done.code >= 0 => return Ok((!torn).then_some(list)),
                    NetlinkPayload::Done(done) => {
                        return Err(KernelError::refused(operation.to_owned(), done.code, None));
                    }
                    NetlinkPayload::Error(error) => {
                        let said = kernel_sentence(&header, &error);
                        return Err(KernelError::refused(operation.to_owned(), error.raw_code(), said));
                    }
                    _ => {}
                }
            }
        }
    }

    /// From here on this socket hears what the kernel tells these groups.
    pub fn join(&mut self, groups: &[u32]) -> Result<(), KernelError> {
        // Without an address of its own it would pass for the kernel's, whose own words it is not told.
        let bound = self.socket.bind_auto().map(drop);
        bound
            .and_then(|()| groups.iter().try_for_each(|group| self.socket.add_membership(*group)))
            .map_err(|source| KernelError::Open { source })
    }

    /// The next thing the kernel told a group, as type and content of its messages; `None` while there is none. What was
    /// told while nobody listened, and did not fit, is an error with ENOBUFS.
    pub fn heard(&mut self) -> io::Result<Option<Vec<Told>>> {
        match self.receive_now() {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
            Ok(()) => {
                let messages = parse_datagram::<Raw>(&self.buffer).map_err(io::Error::other)?;
                let inner = |(header, payload)| match payload {
                    NetlinkPayload::InnerMessage(Raw(bytes)) => Some((header, bytes)),
                    _ => None,
                };
                Ok(Some(messages.into_iter().filter_map(inner).collect()))
            }
        }
    }

    /// Puts one message behind the others, aligned, and returns its sequence number.
    fn append<M: Message>(&mut self, bytes: &mut Vec<u8>, message: M, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = bytes.len();
        let length = message.buffer_len();
        bytes.resize(start + length.next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..start + length]);
        self.sequence
    }

    fn send(&mut self, bytes: &[u8], operation: &str) -> Result<(), KernelError> {
        if bytes.len() > SEND_BYTES {
            // The kernel refuses a datagram larger than the send buffer; this one may exceed the system's limit.
            let room = bytes.len().saturating_mul(2);
            setsockopt(&self.socket.as_fd(), sockopt::SndBufForce, &room)
                .map_err(|e| KernelError::Exchange { operation: operation.to_owned(), source: e.into() })?;
        }
        loop {
            match self.socket.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(KernelError::Exchange { operation: operation.to_owned(), source }),
            }
        }
    }

    /// The messages of the next datagram.
    async fn receive<A: NetlinkDeserializable>(
        &mut self,
        deadline: Instant,
        operation: &str,
    ) -> Result<Vec<(NetlinkHeader, NetlinkPayload<A>)>, KernelError> {
        let failed = |source| KernelError::Exchange { operation: operation.to_owned(), source };
        loop {
            match self.receive_now() {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    match tokio::time::timeout_at(deadline, self.readable()).await {
                        Ok(ready) => ready.map_err(failed)?,
                        Err(_) => {
                            let deadline_ms = u64::try_from(EXCHANGE_DEADLINE.as_millis()).unwrap_or(u64::MAX);
                            return Err(KernelError::Timeout { operation: operation.to_owned(), deadline_ms });
                        }
                    }
                }
                Err(e) => return Err(failed(e)),
            }
        }
        parse_datagram(&self.buffer).map_err(|source| KernelError::Decode { operation: operation.to_owned(), source })
    }

    /// Waits for the next datagram. Registered with the runtime only while waiting, which hardly ever happens.
    pub async fn readable(&self) -> io::Result<()> {
        // tokio's AsyncFd can no longer be made in safe code. Of its own types this one takes any descriptor, and only
        // its readiness is used here.
        let descriptor = self.socket.as_fd().try_clone_to_owned()?;
        Receiver::from_owned_fd_unchecked(descriptor)?.readable().await
    }

    fn receive_now(&mut self) -> io::Result<()> {
        self.buffer.clear();
        let length = self.socket.recv(&mut self.buffer, MsgFlags::MSG_TRUNC.bits())?;
        if length > self.buffer.len() {
            return Err(io::Error::other(format!("the kernel's datagram of {length} bytes does not fit")));
        }
        Ok(())
    }
}

fn parse_datagram<A: NetlinkDeserializable>(
    bytes: &[u8],
) -> Result<Vec<(NetlinkHeader, NetlinkPayload<A>)>, DecodeError> {
    let mut messages = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let message = NetlinkMessage::<A>::deserialize(rest)?;
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4).max(16);
        messages.push(message.into_parts());
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(messages)
}

/// The text attribute of an extended acknowledgement. It stands behind the error's copy of the request header.
fn kernel_sentence(header: &NetlinkHeader, error: &ErrorMessage) -> Option<String> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    const REQUEST_HEADER_BYTES: usize = 16;
    if header.flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let attributes = error.header.get(REQUEST_HEADER_BYTES..)?;
    let text = NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)?;
    let text = text.value();
    Some(String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_sys::protocols::NETLINK_ROUTE;
    use tokio::time::Instant;

    use super::{KernelError, Socket};

    #[tokio::test]
    async fn silence_ends_at_the_deadline() {
        let mut socket = Socket::open(NETLINK_ROUTE).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = socket.receive::<RouteNetlinkMessage>(deadline, "hear something").await.unwrap_err();
        assert!(matches!(&error, KernelError::Timeout { operation, .. } if operation == "hear something"), "{error}");
    }
}
