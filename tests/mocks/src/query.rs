//! The EC2 Query API by hand: a second, independent way to the servers, for setting the stage and for looking at what
//! the adapter left behind. Signatures are made up; the servers it talks to do not check them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct Query {
    pub port: u16,
    pub access_key: String,
    pub region: String,
}

impl Query {
    /// One action of a service (`ec2`, `iam`, `sts`); the body of a 200, or a panic that shows what came instead.
    pub fn call(&self, service: &str, action: &str, parameters: &[(&str, &str)]) -> String {
        let version = match service {
            "ec2" => "2016-11-15",
            "iam" => "2010-05-08",
            _ => "2011-06-15",
        };
        let mut form = format!("Action={action}&Version={version}");
        for (key, value) in parameters {
            form.push_str(&format!("&{}={}", escape(key), escape(value)));
        }
        // The host names the service: that is how both servers know whose action it is.
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={}/20260101/{}/{service}/aws4_request, SignedHeaders=host, Signature=0",
            self.access_key, self.region
        );
        let host = format!("{service}.{}.amazonaws.com", self.region);
        let headers = [
            ("host", host.as_str()),
            ("authorization", &authorization),
            ("x-amz-date", "20260101T000000Z"),
            ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
        ];
        let (status, body) = http(self.port, "POST", "/", &headers, &form).unwrap();
        assert_eq!(status, 200, "{action} {parameters:?}: {body}");
        body
    }

    pub fn ec2(&self, action: &str, parameters: &[(&str, &str)]) -> String {
        self.call("ec2", action, parameters)
    }
}

/// One exchange with a server on this machine.
pub fn http(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut request = format!("{method} {path} HTTP/1.1\r\ncontent-length: {}\r\nconnection: close\r\n", body.len());
    if !headers.iter().any(|(name, _)| *name == "host") {
        request.push_str(&format!("host: 127.0.0.1:{port}\r\n"));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{request}\r\n{body}").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, body.to_owned()))
}

/// The text of every element of this name, wherever it stands.
pub fn texts<'a>(xml: &'a str, element: &str) -> Vec<&'a str> {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    xml.split(&open).skip(1).filter_map(|rest| rest.split_once(&close)).map(|(text, _)| text).collect()
}

/// The text of the first element of this name; panics without one.
pub fn text(xml: &str, element: &str) -> String {
    (*texts(xml, element).first().unwrap_or_else(|| panic!("no <{element}> in {xml}"))).to_owned()
}

fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}
