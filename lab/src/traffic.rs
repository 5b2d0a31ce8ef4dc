//! Traffic that never pauses, and how long it did: an echo a hundred times a second, and a TCP stream.
//!
//! Each runs as a process of its own in the place it speaks from, so that it sees what a pod would. It ends with its
//! standard input; every line there asks for what happened since the last one, and is answered with one line of JSON.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Doing, Result};
use crate::ns::has_ipv6;
use crate::probe::Pinger;

/// Where a stream is sent back from.
pub const ECHO_PORT: u16 = 7778;

const PING_EVERY: Duration = Duration::from_millis(10);
/// A piece of the stream, and how often one is sent.
const PIECE: [u8; 1024] = [0x66; 1024];
const PIECE_EVERY: Duration = Duration::from_millis(5);

/// What happened since it was last asked.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Echoes, or bytes, that came back.
    pub back: u64,
    /// The longest time in which nothing came back, in milliseconds; the one under way counts.
    pub longest_gap_ms: u64,
    /// The stream has ended, or could not be sent on.
    pub broken: bool,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    tally: Tally,
    last: Instant,
}

type Shared = Arc<Mutex<Running>>;

fn note(shared: &Shared, change: impl FnOnce(&mut Running)) {
    change(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
}

fn came_back(shared: &Shared, much: u64) {
    note(shared, |running| {
        let now = Instant::now();
        running.tally.longest_gap_ms = running.tally.longest_gap_ms.max(millis(now - running.last));
        running.tally.back += much;
        running.last = now;
    });
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Sends what comes on the echo port back, until standard input ends.
pub fn echo() -> Result<()> {
    // A listener of IPv6 takes IPv4 as well.
    let any: IpAddr = if has_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let listener = TcpListener::bind((any, ECHO_PORT)).doing(|| "open the echo port".into())?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || io::copy(&mut &stream, &mut &stream));
        }
    });
    println!("ready");
    for line in io::stdin().lines() {
        line.doing(|| "read standard input".into())?;
    }
    Ok(())
}

/// Pings a target a hundred times a second.
pub fn ping(target: IpAddr) -> Result<()> {
    let sender = Arc::new(Pinger::open(target).doing(|| "open a raw socket".into())?);
    answer_questions(move |shared| {
        let receiver = Arc::clone(&sender);
        std::thread::spawn(move || {
            let mut next = Instant::now();
            for sequence in (0..=u16::MAX).cycle() {
                // Without a route nothing can be sent, which is a gap like any other.
                let _ = sender.send(sequence);
                next += PING_EVERY;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        std::thread::spawn(move || {
            loop {
                if let Ok(Some(_)) = receiver.receive() {
                    came_back(&shared, 1);
                }
            }
        });
        Ok(())
    })
}

/// Streams to the echo port of a target, and takes what comes back.
pub fn stream(target: IpAddr) -> Result<()> {
    let there = SocketAddr::new(target, ECHO_PORT);
    let mut stream = TcpStream::connect(there).doing(|| format!("connect to {there}"))?;
    answer_questions(move |shared| {
        stream.set_nodelay(true)?;
        let mut reader = stream.try_clone()?;
        let (writing, reading) = (Arc::clone(&shared), shared);
        std::thread::spawn(move || {
            let mut next = Instant::now();
            while stream.write_all(&PIECE).is_ok() {
                next = (next + PIECE_EVERY).max(Instant::now());
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            note(&writing, |running| running.tally.broken = true);
        });
        std::thread::spawn(move || {
            let mut piece = [0; 16 * 1024];
            while let Ok(length @ 1..) = reader.read(&mut piece) {
                came_back(&reading, u64::try_from(length).unwrap_or(0));
            }
            note(&reading, |running| running.tally.broken = true);
        });
        Ok(())
    })
}

/// Starts the traffic, says so, and answers each line with a tally.
fn answer_questions(start: impl FnOnce(Shared) -> io::Result<()>) -> Result<()> {
    let shared: Shared = Arc::new(Mutex::new(Running { tally: Tally::default(), last: Instant::now() }));
    start(Arc::clone(&shared)).doing(|| "start the traffic".into())?;
    println!("ready");
    for line in io::stdin().lock().lines() {
        line.doing(|| "read standard input".into())?;
        let mut tally = Tally::default();
        note(&shared, |running| {
            tally = running.tally;
            tally.longest_gap_ms = tally.longest_gap_ms.max(millis(running.last.elapsed()));
            running.tally = Tally { broken: tally.broken, ..Tally::default() };
        });
        println!("{}", serde_json::to_string(&tally).doing(|| "the tally".into())?);
    }
    Ok(())
}
