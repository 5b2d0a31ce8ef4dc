//! Asking the running daemon: one GET to its introspection pages, for the operator's commands.

use std::io::{Read, Write};
use std::net::{AddrParseError, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;

use crate::config::INTROSPECTION;

/// A page that needs nobody else.
pub const AT_ONCE: Duration = Duration::from_secs(3);
const MAX_BYTES: u64 = 16 << 20;

#[derive(Args, Debug)]
pub struct Daemon {
    /// Address of the daemon's introspection pages.
    #[arg(long, env = "INTROSPECTION_BIND_ADDRESS", default_value = INTROSPECTION, value_parser = address)]
    introspection: SocketAddr,
}

/// An empty variable is one that is not set.
fn address(text: &str) -> Result<SocketAddr, AddrParseError> {
    if text.is_empty() { INTROSPECTION.parse() } else { text.parse() }
}

impl Daemon {
    /// The page's content, or why there is none. Not worth an HTTP library in a command that an operator waits for.
    pub fn get(&self, path: &str, patience: Duration) -> anyhow::Result<String> {
        let address = self.introspection;
        let hint = || format!("ask ipamd on {address}; is it running here, and is DISABLE_INTROSPECTION unset?");
        let mut stream = TcpStream::connect_timeout(&address, AT_ONCE).with_context(hint)?;
        stream.set_read_timeout(Some(patience))?;
        write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").with_context(hint)?;
        let mut answer = String::new();
        stream.take(MAX_BYTES).read_to_string(&mut answer).with_context(hint)?;
        let (head, body) =
            answer.split_once("\r\n\r\n").ok_or_else(|| anyhow!("ipamd on {address} did not answer HTTP"))?;
        let first = head.lines().next().unwrap_or_default();
        if !first.contains(" 200 ") {
            bail!("ipamd on {address} answered {first}: {}", body.trim());
        }
        Ok(body.to_owned())
    }
}
