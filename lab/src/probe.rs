//! Asking the network itself: who answers, how fast, and which source address did the far side see.
//!
//! Every pod, every machine and the internet server carry a reflector, which tells whoever asks the address it sees
//! them under. Sockets are opened inside the namespace and looked after outside of it, so a pod needs no process.

use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::Ipv4PacketInfo;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::task::AbortHandle;

use crate::ctl::{Called, Probe};
use crate::error::{Doing, Error, Result};
use crate::ns::Place;

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
    /// Answers on every address of the place.
    pub fn start(place: &Place) -> Result<Self> {
        let (udp, tcp) = place
            .run_in_runtime(|| -> io::Result<_> {
                let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
                let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
                setsockopt(&udp, Ipv4PacketInfo, &true)?;
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                Ok((tokio::net::UdpSocket::from_std(udp)?, tokio::net::TcpListener::from_std(tcp)?))
            })?
            .doing(|| "open a reflector's sockets".into())?;
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
        Ok(Self { tasks: vec![over_udp.abort_handle(), over_tcp.abort_handle()] })
    }
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
    let mut space = nix::cmsg_space!(nix::libc::in_pktinfo);
    let fd = socket.as_raw_fd();
    let message = recvmsg::<SockaddrIn>(fd, &mut buffers, Some(&mut space), MsgFlags::empty())?;
    let asked = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
        _ => None,
    });
    let (Some(peer), Some(asked)) = (message.address, asked) else { return Ok(()) };
    let seen = peer.ip().to_string();
    // Any link will do for the answer: routes decide.
    let from = nix::libc::in_pktinfo { ipi_ifindex: 0, ..asked };
    let control = [ControlMessage::Ipv4PacketInfo(&from)];
    sendmsg(fd, &[IoSlice::new(seen.as_bytes())], &control, MsgFlags::empty(), Some(&peer))?;
    Ok(())
}

/// Probes every target in turn from inside the place. Blocks.
pub fn probe(place: &Place, from: &str, targets: &[(String, Ipv4Addr)]) -> Result<Vec<Probe>> {
    place
        .run(|| -> io::Result<Vec<Probe>> {
            let icmp = Pinger::open()?;
            Ok((targets.iter())
                .map(|(name, target)| {
                    let rtt = icmp.round_trip(*target);
                    // Where no echo comes back, waiting for the others too would only take time.
                    let patience = if rtt.is_some() { PATIENCE } else { PATIENCE / 4 };
                    Probe {
                        from: from.to_owned(),
                        to: name.clone(),
                        target: *target,
                        rtt_us: rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                        seen: seen_over_udp(SocketAddrV4::new(*target, PORT), patience),
                        seen_tcp: seen_over_tcp(SocketAddrV4::new(*target, PORT), patience),
                    }
                })
                .collect())
        })?
        .doing(|| format!("probe from {from}"))
}

/// Calls the reflectors behind every target in turn from inside the place. Blocks.
pub fn call(place: &Place, from: &str, targets: &[SocketAddrV4]) -> Result<Vec<Called>> {
    let one =
        |target: &SocketAddrV4| Called { udp: seen_over_udp(*target, PATIENCE), tcp: seen_over_tcp(*target, PATIENCE) };
    place
        .run(|| targets.iter().map(one).collect())
        .map_err(|source| Error::refused(format!("call from {from}: {source}")))
}

struct Pinger {
    socket: Socket,
    identifier: [u8; 2],
}

impl Pinger {
    fn open() -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        let identifier = std::process::id().to_be_bytes();
        Ok(Self { socket, identifier: [identifier[2], identifier[3]] })
    }

    /// Time of the second of two echoes, so that no first-packet work is in it; of the only one that came back else.
    fn round_trip(&self, target: Ipv4Addr) -> Option<Duration> {
        let mut best = None;
        for sequence in 1..=ATTEMPTS {
            best = self.echo(target, sequence).or(best);
        }
        best
    }

    fn echo(&self, target: Ipv4Addr, sequence: u16) -> Option<Duration> {
        let [high, low] = sequence.to_be_bytes();
        let mut request = [8, 0, 0, 0, self.identifier[0], self.identifier[1], high, low, 0, 0, 0, 0];
        let sum = checksum(&request).to_be_bytes();
        request[2..4].copy_from_slice(&sum);
        let start = Instant::now();
        self.socket.send_to(&request, &SocketAddr::V4(SocketAddrV4::new(target, 0)).into()).ok()?;
        loop {
            let left = PATIENCE.checked_sub(start.elapsed()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).ok()?;
            let mut packet = [0; 128];
            let length = (&self.socket).read(&mut packet).ok()?;
            // A raw socket shows the IPv4 header, and every ICMP packet that arrives.
            let (source, message) = (packet.get(12..16)?, packet.get(20..length)?);
            if source == target.octets() && message.first() == Some(&0) && message.get(4..8) == request.get(4..8) {
                return Some(start.elapsed());
            }
        }
    }
}

pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("invariant: the loop leaves 16 bits")
}

/// Asks several times over one socket: the first packet of a connection may go another way than the later ones. The
/// socket is connected, so that only an answer from the very address that was asked is one.
fn seen_over_udp(target: SocketAddrV4, patience: Duration) -> Option<Ipv4Addr> {
    let ask = |socket: &UdpSocket| -> Option<Ipv4Addr> {
        socket.send(b"who am I?").ok()?;
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer).ok()?;
        std::str::from_utf8(answer.get(..length)?).ok()?.parse().ok()
    };
    (0..ATTEMPTS).find_map(|_| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect(target).ok()?;
        socket.set_read_timeout(Some(patience)).ok()?;
        let first = ask(&socket)?;
        (0..2).all(|_| ask(&socket) == Some(first)).then_some(first)
    })
}

fn seen_over_tcp(target: SocketAddrV4, patience: Duration) -> Option<Ipv4Addr> {
    let mut stream = TcpStream::connect_timeout(&target.into(), patience).ok()?;
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
