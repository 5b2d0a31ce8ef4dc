//! A small client of the EC2 Query API: signs with SigV4, speaks plain HTTP/1.1, blocks. For the demo, the tests, and
//! `lab` commands that change the cloud the way any other tool would, from outside.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab_ec2::SignedRequest;
use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Result};

/// Nothing in the lab takes this long; a call that does is stuck.
const PATIENCE: Duration = Duration::from_secs(20);

/// Keys for the API, as `lab up` prints them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: String,
}

#[derive(Debug, Clone)]
pub struct Ec2Client {
    endpoint: SocketAddr,
    region: String,
    credentials: Credentials,
}

impl Ec2Client {
    pub fn new(endpoint: SocketAddr, region: impl Into<String>, credentials: Credentials) -> Self {
        Self { endpoint, region: region.into(), credentials }
    }

    /// One action; the parameters go as they are, `Version` is added. The answer is EC2's XML.
    pub fn call(&self, action: &str, parameters: &[(&str, &str)]) -> Result<String> {
        let mut all = vec![("Action", action), ("Version", "2016-11-15")];
        all.extend_from_slice(parameters);
        let body = all.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect::<Vec<_>>().join("&");
        let request = self.signed(&body);
        let (status, answer) = exchange(self.endpoint, &request)?;
        if status == 200 {
            return Ok(answer);
        }
        Err(Error::Ec2 {
            action: action.to_owned(),
            code: element(&answer, "Code").unwrap_or_else(|| format!("HTTP {status}")),
            message: element(&answer, "Message").unwrap_or_default(),
        })
    }

    fn signed(&self, body: &str) -> String {
        let mut headers = vec![
            ("host".to_owned(), self.endpoint.to_string()),
            ("content-type".to_owned(), "application/x-www-form-urlencoded; charset=utf-8".to_owned()),
        ];
        let request = SignedRequest { method: "POST", path: "/", query: "", headers: &headers, body: body.as_bytes() };
        let credentials = lab_ec2::Credentials {
            access_key: self.credentials.access_key_id.clone(),
            secret: self.credentials.secret_access_key.clone(),
            session_token: None,
            allow: None,
        };
        let added = lab_ec2::sign(&credentials, &self.region, "ec2", lab_ec2::wall_clock(), &request);
        headers.extend(added);
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        format!("POST / HTTP/1.1\r\n{lines}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }
}

/// The text of the first element of that name.
pub fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text.to_owned())
}

/// Sends one prepared HTTP/1.1 request that asks for the connection to be closed, and reads status and body.
pub fn exchange(to: SocketAddr, request: &str) -> Result<(u16, String)> {
    let what = || format!("speak HTTP with {to}");
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).doing(what)?;
    stream.set_read_timeout(Some(PATIENCE)).doing(what)?;
    stream.write_all(request.as_bytes()).doing(what)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).doing(what)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| Error::refused(format!("{to} sent no HTTP")))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if chunked { unchunk(body) } else { body.to_owned() }))
}

fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else { break };
        let (Some(chunk), Some(next)) = (rest.get(..size), rest.get(size + 2..)) else { break };
        text.push_str(chunk);
        body = next;
    }
    text
}

/// Percent-encoding as SigV4 wants it: everything but letters, digits and `-_.~`.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_encoded_as_signatures_need_it() {
        assert_eq!(encode("a b/c=d~e"), "a%20b%2Fc%3Dd~e");
    }

    #[test]
    fn chunks_are_joined() {
        assert_eq!(unchunk("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), "abcde");
    }

    #[test]
    fn elements_are_found() {
        assert_eq!(element("<a><Code>X</Code></a>", "Code").as_deref(), Some("X"));
        assert_eq!(element("<a/>", "Code"), None);
    }
}
