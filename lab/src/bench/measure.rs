//! The measuring itself: round trips of small datagrams, and TCP streams, between two namespaces. Whatever wired them is
//! none of its business.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::layout::Pod;
use crate::error::{Doing, Error, Result};

const PORT: u16 = 7778;
/// Trips before the ones that count: the first ones after another layout's find cold caches.
const WARM_UP: u32 = 100;
/// An answer takes microseconds; what takes this long is lost.
const LOST_AFTER: Duration = Duration::from_millis(500);
const MOST_LOST: u32 = 5;
const BLOCK: usize = 128 * 1024;

/// Of a number of times, in the unit of the field that holds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let last = times.len().saturating_sub(1);
        let at = |percent: usize| times.get((last * percent).div_ceil(100)).copied().unwrap_or_default();
        Self { p50: at(50), p90: at(90), p99: at(99), max: at(100) }
    }

    /// What is typical of several rounds: of each figure the median, so that a round in which the machine was busy with
    /// something else does not count.
    pub fn typical(rounds: &[Self]) -> Self {
        let median = |figure: fn(&Self) -> f64| Self::of(rounds.iter().map(figure).collect()).p50;
        Self { p50: median(|r| r.p50), p90: median(|r| r.p90), p99: median(|r| r.p99), max: median(|r| r.max) }
    }
}

/// Keeps the calling thread, and those it starts, on one processor.
pub fn pin() -> Result<()> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).doing(|| "read the processors this thread may use".into())?;
    // The last one: interrupts tend to be on the first.
    let Some(last) = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false)) else {
        return Ok(());
    };
    let mut one = CpuSet::new();
    one.set(last).and_then(|()| sched_setaffinity(Pid::from_raw(0), &one)).doing(|| "stay on one processor".into())
}

/// Two pods between which datagrams go to and fro, by sockets that stay open.
pub struct PingPong {
    near: UdpSocket,
    far: UdpSocket,
}

impl PingPong {
    pub fn between(near: &Pod, far: &Pod) -> Result<Self> {
        let open = |pod: &Pod| {
            let opened = pod.place.run(|| UdpSocket::bind((pod.address, 0)))?;
            opened.doing(|| format!("open a socket on {}", pod.address))
        };
        let (near, far) = (open(near)?, open(far)?);
        for (socket, peer) in [(&near, &far), (&far, &near)] {
            let connected = peer.local_addr().and_then(|peer| socket.connect(peer));
            connected.and_then(|()| socket.set_nonblocking(true)).doing(|| "connect two sockets".into())?;
        }
        Ok(Self { near, far })
    }

    /// So many round trips, in microseconds.
    ///
    /// One thread holds both ends: sending carries a packet through the whole path, within the call, to the other pod's
    /// socket, so a round trip is the path there and back with nobody to wake up, and another load on the machine
    /// disturbs single trips and not all of them.
    pub fn round(&self, trips: u32) -> Result<Spread> {
        let mut times = Vec::new();
        let mut lost = 0;
        for trip in 0..trips + WARM_UP {
            let start = Instant::now();
            match self.trip().doing(|| "measure a round trip".into())? {
                true if trip >= WARM_UP => times.push(start.elapsed().as_secs_f64() * 1e6),
                true => {}
                false => lost += 1,
            }
            if lost > MOST_LOST {
                let (from, to) = (&self.near, &self.far);
                let text = format!("{lost} of {} datagrams between {from:?} and {to:?} were lost", trip + 1);
                return Err(Error::refused(text));
            }
        }
        Ok(Spread::of(times))
    }

    fn trip(&self) -> io::Result<bool> {
        self.near.send(b"there")?;
        if !arrives(&self.far)? {
            return Ok(false);
        }
        self.far.send(b"back")?;
        arrives(&self.near)
    }
}

fn arrives(socket: &UdpSocket) -> io::Result<bool> {
    let start = Instant::now();
    let mut datagram = [0; 16];
    loop {
        match socket.recv(&mut datagram) {
            Ok(_) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if start.elapsed() > LOST_AFTER {
                    return Ok(false);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Bytes per second that so many TCP streams carry from one pod to another, in Gbit/s.
pub fn throughput(near: &Pod, far: &Pod, streams: usize, time: Duration) -> Result<f64> {
    let listener =
        far.place.run(|| TcpListener::bind((far.address, PORT)))?.doing(|| format!("listen on {}", far.address))?;
    let mut senders = Vec::new();
    let mut receivers = Vec::new();
    for _ in 0..streams {
        let to = (far.address, PORT).into();
        let sender = near.place.run(|| TcpStream::connect_timeout(&to, LOST_AFTER * 4))?;
        senders.push(sender.doing(|| format!("connect {} to {}", near.address, far.address))?);
        receivers.push(listener.accept().doing(|| "accept a stream".into())?.0);
    }
    let start = Instant::now();
    let received = thread::scope(|scope| -> io::Result<u64> {
        let sending: Vec<_> =
            senders.into_iter().map(|stream| scope.spawn(move || send(stream, start + time))).collect();
        let receiving: Vec<_> = receivers.into_iter().map(|stream| scope.spawn(move || drain(stream))).collect();
        for sender in sending {
            joined(sender)?;
        }
        receiving.into_iter().map(joined).sum()
    });
    let bytes = received.doing(|| format!("stream from {} to {}", near.address, far.address))?;
    let gigabits = bytes / 125_000;
    Ok(f64::from(u32::try_from(gigabits).unwrap_or(u32::MAX)) / 1e3 / start.elapsed().as_secs_f64())
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the measurement panicked")))
}

fn send(mut stream: TcpStream, until: Instant) -> io::Result<()> {
    let block = vec![0; BLOCK];
    while Instant::now() < until {
        stream.write_all(&block)?;
    }
    Ok(())
}

fn drain(mut stream: TcpStream) -> io::Result<u64> {
    let mut block = vec![0; BLOCK];
    let mut total = 0;
    loop {
        match u64::try_from(stream.read(&mut block)?) {
            Ok(0) => return Ok(total),
            Ok(length) => total += length,
            Err(_) => return Err(io::Error::other("a read longer than its buffer")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let times: Vec<f64> = (1..=101).rev().map(f64::from).collect();
        assert_eq!(Spread::of(times), Spread { p50: 51.0, p90: 91.0, p99: 100.0, max: 101.0 });
        assert_eq!(Spread::of(vec![3.0]), Spread { p50: 3.0, p90: 3.0, p99: 3.0, max: 3.0 });
    }

    #[test]
    fn one_disturbed_round_does_not_count() {
        let calm = |p50| Spread { p50, p90: p50, p99: p50, max: p50 };
        assert_eq!(Spread::typical(&[calm(2.0), calm(900.0), calm(1.0)]), calm(2.0));
    }
}
