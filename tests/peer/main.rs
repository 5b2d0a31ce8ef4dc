//! All there is in the image of the tests' containers: it holds a sandbox, answers, and asks.
//!
//! `peer pause` waits for a signal. `peer serve` tells everybody who asks, over UDP and TCP, the address it sees them under,
//! as the lab's own reflectors do. `peer ask ADDRESS[:PORT]` asks over both and prints what the other side saw.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, io, thread};

/// Of the lab's reflectors too.
const PORT: u16 = 7777;
/// A machine under load may be slow; somebody who does not answer at all is not waited for longer.
const PATIENCE: Duration = Duration::from_secs(5);
const UDP_EVERY: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        [] | ["pause"] => loop {
            thread::park();
        },
        ["serve"] => serve(),
        ["ask", whom] => ask(whom),
        _ => Err(io::Error::other("usage: peer pause | serve | ask ADDRESS[:PORT]")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let here = (Ipv4Addr::UNSPECIFIED, PORT);
    let (udp, tcp) = (UdpSocket::bind(here)?, TcpListener::bind(here)?);
    thread::spawn(move || {
        let mut question = [0; 64];
        while let Ok((_, peer)) = udp.recv_from(&mut question) {
            // A peer that has gone meanwhile is no reason to end.
            let _ = udp.send_to(peer.ip().to_string().as_bytes(), peer);
        }
    });
    for stream in tcp.incoming() {
        let mut stream = stream?;
        let peer = stream.peer_addr()?;
        let _ = stream.write_all(peer.ip().to_string().as_bytes());
    }
    Ok(())
}

fn ask(whom: &str) -> io::Result<()> {
    let parsed = whom.parse::<SocketAddr>().or_else(|_| whom.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT)));
    let whom = parsed.map_err(|_| io::Error::other(format!("{whom:?} is no address, with or without a port")))?;
    let over = |way: &str, answer: io::Result<String>| {
        answer.map_err(|error| io::Error::new(error.kind(), format!("{way} to {whom}: {error}")))
    };
    println!("udp {}", over("UDP", over_udp(whom))?);
    println!("tcp {}", over("TCP", over_tcp(whom))?);
    Ok(())
}

fn over_udp(whom: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(whom)?;
    socket.set_read_timeout(Some(UDP_EVERY))?;
    let (mut answer, deadline) = ([0; 64], Instant::now() + PATIENCE);
    loop {
        // Datagrams may be lost: the question is put again.
        let said = socket.send(b"who am I?").and_then(|_| socket.recv(&mut answer));
        match said {
            Ok(length) => return Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => {}
        }
    }
}

fn over_tcp(whom: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&whom, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
