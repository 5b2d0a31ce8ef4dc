//! A tiny HTTP server that answers as it is told and remembers what it was asked. Loopback only, one thread per
//! exchange.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a client sent.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A parameter of the form in the body.
    pub fn form(&self, name: &str) -> Option<String> {
        self.body
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| unescape(key) == name)
            .map(|(_, v)| unescape(v))
    }
}

#[derive(Debug, Clone)]
pub enum Answer {
    Http {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
    },
    /// Close the connection without a word, the request having been read.
    Hangup,
    /// Say nothing for this long, then hang up.
    Silence(Duration),
}

impl Answer {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self::status(200, body)
    }

    pub fn status(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self::Http { status, headers: Vec::new(), body: body.into() }
    }
}

pub struct Canned {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Canned {
    /// `answer` gets each request and how many came before it.
    pub fn start(answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), answer)
    }

    /// As `start`, on a socket that may be of another network namespace.
    pub fn on(listener: TcpListener, answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let answer = Arc::new(answer);
        let (seen, stopped) = (asked.clone(), stop.clone());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(connection), seen, answer) = (connection, seen.clone(), answer.clone()) else { return };
                std::thread::spawn(move || serve(connection, &seen, answer.as_ref()));
            }
        });
        Self { address, asked, stop }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Canned {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that waits in accept.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    connection: TcpStream,
    seen: &Mutex<Vec<Request>>,
    answer: &(dyn Fn(&Request, usize) -> Answer + Send + Sync),
) {
    let _ = connection.set_read_timeout(Some(Duration::from_secs(10)));
    let Some(request) = read_request(&connection) else { return };
    let before = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.len() - 1
    };
    let (status, headers, body) = match answer(&request, before) {
        Answer::Http { status, headers, body } => (status, headers, body),
        Answer::Hangup => return,
        Answer::Silence(pause) => {
            std::thread::sleep(pause);
            return;
        }
    };
    let mut head = format!("HTTP/1.1 {status} -\r\ncontent-length: {}\r\nconnection: close\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let _ = (&connection).write_all(&[head.into_bytes(), body].concat());
}

fn read_request(connection: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let mut request = Request { method: words.next()?.into(), path: words.next()?.into(), ..Request::default() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        request.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length: usize = request.header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    request.body = String::from_utf8(body).ok()?;
    Some(request)
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let pair = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&pair).unwrap(), 16).unwrap()
            }
            other => other,
        });
    }
    String::from_utf8(bytes).unwrap()
}

/// What an instance role hands out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    pub access_key: String,
    pub secret: String,
    pub token: String,
}

impl Keys {
    /// Keys that nobody checks.
    pub fn any(access_key: &str) -> Self {
        Self { access_key: access_key.to_owned(), secret: "secret".to_owned(), token: "session".to_owned() }
    }
}

/// A metadata service: a session token for whoever asks by PUT, leaves for whoever brings it, 404 for the rest. The
/// keys of an instance role are always there.
pub fn imds(keys: Keys, leaf: impl Fn(&str, usize) -> Option<Answer> + Send + Sync + 'static) -> Canned {
    Canned::start(metadata(keys, leaf))
}

/// What `imds` answers.
pub fn metadata(
    keys: Keys,
    leaf: impl Fn(&str, usize) -> Option<Answer> + Send + Sync + 'static,
) -> impl Fn(&Request, usize) -> Answer + Send + Sync + 'static {
    let credentials = format!(
        r#"{{"Code":"Success","LastUpdated":"2026-01-01T00:00:00Z","Type":"AWS-HMAC","AccessKeyId":"{}",
            "SecretAccessKey":"{}","Token":"{}","Expiration":"2099-01-01T00:00:00Z"}}"#,
        keys.access_key, keys.secret, keys.token
    );
    move |request, before| {
        if request.method == "PUT" && request.path == "/latest/api/token" {
            if request.header("x-aws-ec2-metadata-token-ttl-seconds").is_none() {
                return Answer::status(400, "");
            }
            return Answer::Http {
                status: 200,
                headers: vec![("x-aws-ec2-metadata-token-ttl-seconds", "21600".to_owned())],
                body: "token".into(),
            };
        }
        if request.header("x-aws-ec2-metadata-token") != Some("token") {
            return Answer::status(401, "");
        }
        match request.path.strip_prefix("/latest/").unwrap_or("") {
            "meta-data/iam/security-credentials/" => Answer::ok("node-role"),
            "meta-data/iam/security-credentials/node-role" => Answer::ok(&*credentials),
            path => leaf(path, before).unwrap_or_else(|| Answer::status(404, "")),
        }
    }
}
