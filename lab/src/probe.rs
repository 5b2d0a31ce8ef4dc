//! Asking the network itself: who answers, how fast, and which source address did the far side see.
//!
//! Every pod, every machine and the internet server carry a reflector, which tells whoever asks the address it sees
//! them under. Sockets are opened inside the namespace and looked after outside of it, so a pod needs no process.

use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::task::AbortHandle;

use crate::ctl::{Called, Probe};
use crate::error::{Doing, Error, Result};
use crate::ns::{Place, has_ipv6};

/// Port of every reflector, UDP and TCP.
pub const PORT: u16 = 7777;

/// An answer inside the lab takes microseconds; a machine under load may take this long.
const PATIENCE: Duration = Duration::from_millis(400);
const ATTEMPTS: u16 = 2;

/// Answers as long as it lives.
#[derive(Debug)]
pub struct Reflector {
    tasks: Vec<AbortHandle>,
}

impl Reflector {
    /// Answers on every address of the place, of either family.
    pub fn start(place: &Place) -> Result<Self> {
        let families = [IpAddr::from(Ipv4Addr::UNSPECIFIED)].into_iter();
        let families = families.chain(has_ipv6().then_some(Ipv6Addr::UNSPECIFIED.into()));
        let sockets: Vec<_> = place
            .run_in_runtime(|| families.map(listen).collect::<io::Result<_>>())?
            .doing(|| "open a reflector's sockets".into())?;
        Ok(Self { tasks: sockets.into_iter().flat_map(|(udp, tcp)| Self::serve(udp, tcp)).collect() })
    }

    fn serve(udp: tokio::net::UdpSocket, tcp: tokio::net::TcpListener) -> [AbortHandle; 2] {
        let over_udp = tokio::spawn(async move {
            loop {
                // Errors here are ICMP messages about earlier answers; the next question is unharmed.
                let _ = udp.async_io(Interest::READABLE, || reflect(&udp)).await;
            }
        });
        let over_tcp = tokio::spawn(async move {
            loop {
                match tcp.accept().await {
                    Ok((mut stream, peer)) => drop(tokio::spawn(async move {
                        let _ = stream.write_all(peer.ip().to_string().as_bytes()).await;
                        let _ = stream.shutdown().await;
                    })),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
        [over_udp.abort_handle(), over_tcp.abort_handle()]
    }
}

/// Sockets of one family: IPv6's take IPv6 alone.
fn listen(any: IpAddr) -> io::Result<(tokio::net::UdpSocket, tokio::net::TcpListener)> {
    let here = SocketAddr::new(any, PORT);
    let open = |kind| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(here), kind, None)?;
        if here.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let udp = open(Type::DGRAM)?;
    match any {
        IpAddr::V4(_) => setsockopt(&udp, Ipv4PacketInfo, &true)?,
        IpAddr::V6(_) => setsockopt(&udp, Ipv6RecvPacketInfo, &true)?,
    }
    udp.bind(&here.into())?;
    let tcp = open(Type::STREAM)?;
    tcp.set_reuse_address(true)?;
    tcp.bind(&here.into())?;
    tcp.listen(128)?;
    Ok((tokio::net::UdpSocket::from_std(udp.into())?, tokio::net::TcpListener::from_std(TcpListener::from(tcp))?))
}

impl Drop for Reflector {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Answers one question, from the very address it was sent to: a machine may have many.
fn reflect(socket: &tokio::net::UdpSocket) -> io::Result<()> {
    let mut question = [0; 64];
    let mut buffers = [IoSliceMut::new(&mut question)];
    let mut space = nix::cmsg_space!(nix::libc::in6_pktinfo);
    let fd = socket.as_raw_fd();
    let message = recvmsg::<SockaddrStorage>(fd, &mut buffers, Some(&mut space), MsgFlags::empty())?;
    let Some(peer) = message.address else { return Ok(()) };
    let ipv4 = peer.as_sockaddr_in().map(|peer| IpAddr::from(peer.ip()));
    let Some(seen) = ipv4.or(peer.as_sockaddr_in6().map(|peer| peer.ip().into())) else { return Ok(()) };
    let seen = seen.to_string();
    let answer = |from: ControlMessage<'_>| {
        sendmsg(fd, &[IoSlice::new(seen.as_bytes())], &[from], MsgFlags::empty(), Some(&peer))
    };
    for control in message.cmsgs()? {
        // Any link will do for the answer: routes decide.
        match control {
            ControlMessageOwned::Ipv4PacketInfo(asked) => {
                let from = nix::libc::in_pktinfo { ipi_ifindex: 0, ..asked };
                answer(ControlMessage::Ipv4PacketInfo(&from))?;
            }
            ControlMessageOwned::Ipv6PacketInfo(asked) => {
                let from = nix::libc::in6_pktinfo { ipi6_ifindex: 0, ..asked };
                answer(ControlMessage::Ipv6PacketInfo(&from))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Probes every target in turn from inside the place. Blocks.
pub fn probe(place: &Place, from: &str, targets: &[(String, IpAddr)]) -> Result<Vec<Probe>> {
    place
        .run(|| -> io::Result<Vec<Probe>> {
            (targets.iter())
                .map(|(name, target)| {
                    let rtt = Pinger::open(*target)?.round_trip();
                    // Where no echo comes back, waiting for the others too would only take time.
                    let patience = if rtt.is_some() { PATIENCE } else { PATIENCE / 4 };
                    Ok(Probe {
                        from: from.to_owned(),
                        to: name.clone(),
                        target: *target,
                        rtt_us: rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                        seen: seen_over_udp(SocketAddr::new(*target, PORT), patience),
                        seen_tcp: seen_over_tcp(SocketAddr::new(*target, PORT), patience),
                    })
                })
                .collect()
        })?
        .doing(|| format!("probe from {from}"))
}

/// Calls the reflectors behind every target in turn from inside the place. Blocks.
pub fn call(place: &Place, from: &str, targets: &[SocketAddr]) -> Result<Vec<Called>> {
    let one =
        |target: &SocketAddr| Called { udp: seen_over_udp(*target, PATIENCE), tcp: seen_over_tcp(*target, PATIENCE) };
    place
        .run(|| targets.iter().map(one).collect())
        .map_err(|source| Error::refused(format!("call from {from}: {source}")))
}

/// Echoes of one process to one target.
pub(crate) struct Pinger {
    socket: Socket,
    identifier: [u8; 2],
    kinds: Kinds,
}

/// What the two families differ in.
#[derive(Debug, Clone, Copy)]
struct Kinds {
    request: u8,
    reply: u8,
    /// A raw socket of IPv4 shows the IPv4 header, too.
    header_bytes: usize,
}

impl Pinger {
    pub(crate) fn open(target: IpAddr) -> io::Result<Self> {
        let (domain, protocol, kinds) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, Kinds { request: 8, reply: 0, header_bytes: 20 }),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, Kinds { request: 128, reply: 129, header_bytes: 0 }),
        };
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        // Where there is no way, nothing can be connected, and nothing will come back.
        let _ = socket.connect(&SocketAddr::new(target, 0).into());
        let [.., high, low] = std::process::id().to_be_bytes();
        Ok(Self { socket, identifier: [high, low], kinds })
    }

    /// Time of the second of two echoes, so that no first-packet work is in it; of the only one that came back else.
    fn round_trip(&self) -> Option<Duration> {
        let mut best = None;
        for sequence in 1..=ATTEMPTS {
            best = self.echo(sequence).or(best);
        }
        best
    }

    fn echo(&self, sequence: u16) -> Option<Duration> {
        let start = Instant::now();
        self.send(sequence).ok()?;
        loop {
            let left = PATIENCE.checked_sub(start.elapsed()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).ok()?;
            if self.receive().ok()? == Some(sequence) {
                return Some(start.elapsed());
            }
        }
    }

    pub(crate) fn send(&self, sequence: u16) -> io::Result<()> {
        let [high, low] = sequence.to_be_bytes();
        let mut request = [self.kinds.request, 0, 0, 0, self.identifier[0], self.identifier[1], high, low, 0, 0, 0, 0];
        // Over IPv6 the kernel puts the right one in: it covers the addresses, too.
        let sum = checksum(&request).to_be_bytes();
        request[2..4].copy_from_slice(&sum);
        self.socket.send(&request).map(drop)
    }

    /// Waits for the next packet of the protocol from the target; the number of the echo it answers, if it is one.
    pub(crate) fn receive(&self) -> io::Result<Option<u16>> {
        let mut packet = [0; 128];
        let length = (&self.socket).read(&mut packet)?;
        let message = packet.get(self.kinds.header_bytes..length).unwrap_or_default();
        let &[kind, _, _, _, id_high, id_low, high, low, ..] = message else { return Ok(None) };
        let answers = kind == self.kinds.reply && [id_high, id_low] == self.identifier;
        Ok(answers.then(|| u16::from_be_bytes([high, low])))
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("invariant: the loop leaves 16 bits")
}

/// Asks several times over one socket: the first packet of a connection may go another way than the later ones. The
/// socket is connected, so that only an answer from the very address that was asked is one.
fn seen_over_udp(target: SocketAddr, patience: Duration) -> Option<IpAddr> {
    let ask = |socket: &UdpSocket| -> Option<IpAddr> {
        socket.send(b"who am I?").ok()?;
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer).ok()?;
        std::str::from_utf8(answer.get(..length)?).ok()?.parse().ok()
    };
    (0..ATTEMPTS).find_map(|_| {
        let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(target).ok()?;
        socket.set_read_timeout(Some(patience)).ok()?;
        let first = ask(&socket)?;
        (0..2).all(|_| ask(&socket) == Some(first)).then_some(first)
    })
}

fn seen_over_tcp(target: SocketAddr, patience: Duration) -> Option<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&target, patience).ok()?;
    stream.set_read_timeout(Some(patience)).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
