//! Over the wire: signed requests to the endpoint, and the metadata service, byte by byte.

use std::net::SocketAddr;
use std::sync::Arc;

use lab_ec2::{
    Ec2, Fault, FaultRule, Faults, Options, RunInstance, SignedRequest, Tags, When, drive, imds_router, router, sign,
    wall_clock,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn serve(ec2: &Arc<Ec2>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = router(Arc::clone(ec2), wall_clock);
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

/// Sends a request and reads until the other side closes.
async fn send(address: SocketAddr, method: &str, path: &str, headers: &[(String, String)], body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

async fn query(ec2: &Ec2, address: SocketAddr, body: &str) -> String {
    let headers = vec![
        ("host".to_owned(), address.to_string()),
        ("content-type".to_owned(), "application/x-www-form-urlencoded; charset=utf-8".to_owned()),
    ];
    let plain = SignedRequest { method: "POST", path: "/", query: "", headers: &headers, body: body.as_bytes() };
    let added = sign(&ec2.admin(), "us-east-1", "ec2", wall_clock(), &plain);
    let all: Vec<_> = headers.iter().cloned().chain(added).collect();
    send(address, "POST", "/", &all, body).await
}

#[tokio::test]
async fn signed_requests_are_answered_and_unsigned_ones_refused() {
    let ec2 = Arc::new(Ec2::new(Options::default()));
    let address = serve(&ec2).await;
    let answer = query(&ec2, address, "Action=CreateVpc&CidrBlock=10.0.0.0%2F16&Version=2016-11-15").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("content-type: text/xml;charset=UTF-8"), "{answer}");
    assert!(answer.contains("<CreateVpcResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>"));
    let host = [("host".to_owned(), address.to_string())];
    let answer = send(address, "POST", "/", &host, "Action=DescribeVpcs").await;
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    assert!(answer.contains("<Response><Errors><Error><Code>MissingAuthenticationToken</Code>"), "{answer}");
    assert!(answer.contains("</Errors><RequestID>"), "{answer}");
}

#[tokio::test]
async fn a_broken_connection_has_no_answer_and_has_taken_effect() {
    let ec2 = Arc::new(Ec2::new(Options::default()));
    let address = serve(&ec2).await;
    let rule =
        FaultRule { action: "CreateVpc".into(), access_key: None, when: When::Next(1), fault: Fault::BrokenConnection };
    ec2.set_faults(Faults { calls: vec![rule], imds: Vec::new() });
    let answer = query(&ec2, address, "Action=CreateVpc&CidrBlock=10.0.0.0%2F16").await;
    assert!(!answer.contains("vpcId"), "{answer}");
    assert!(!answer.ends_with("0\r\n\r\n"), "an answer that breaks off must not look whole: {answer}");
    assert_eq!(ec2.view(wall_clock()).vpcs.len(), 1);
}

#[tokio::test]
async fn metadata_is_served_to_the_instance_that_asks() {
    let ec2 = Arc::new(Ec2::new(Options::default()));
    let now = wall_clock();
    let vpc = ec2.create_vpc(now, "10.0.0.0/16".parse().unwrap(), "").unwrap();
    let subnet = ec2.create_subnet(now, &vpc, "10.0.0.0/24".parse().unwrap(), None, Tags::new()).unwrap();
    let instance = ec2.run_instance(now, &RunInstance::new("m5.large", subnet)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let id = instance.clone();
    let app = imds_router(Arc::clone(&ec2), wall_clock, Arc::new(move |_| Some(id.clone())));
    tokio::spawn(async move {
        axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await.unwrap();
    });
    let ttl = [("X-aws-ec2-metadata-token-ttl-seconds".to_owned(), "60".to_owned())];
    let answer = send(address, "PUT", "/latest/api/token", &ttl, "").await;
    assert!(answer.to_ascii_lowercase().contains("x-aws-ec2-metadata-token-ttl-seconds: 60"), "{answer}");
    let token = answer.rsplit("\r\n\r\n").next().unwrap().to_owned();
    let token = [("X-aws-ec2-metadata-token".to_owned(), token)];
    let answer = send(address, "GET", "/latest/meta-data/instance-id", &token, "").await;
    assert!(answer.ends_with(instance.as_str()), "{answer}");
    let answer = send(address, "GET", "/latest/meta-data/instance-id", &[], "").await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}

#[tokio::test]
async fn the_driver_carries_out_what_is_due() {
    let ec2 = Arc::new(Ec2::new(Options::default()));
    let now = lab_ec2::wall_clock();
    tokio::spawn(drive(Arc::clone(&ec2), lab_ec2::wall_clock));
    let vpc = ec2.create_vpc(now, "10.0.0.0/16".parse().unwrap(), "").unwrap();
    let subnet = ec2.create_subnet(now, &vpc, "10.0.0.0/24".parse().unwrap(), None, Tags::new()).unwrap();
    ec2.run_instance(now, &RunInstance::new("m5.large", subnet)).unwrap();
    let version = ec2.version();
    let runs = async {
        while ec2.version() == version {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let deadline = std::time::Duration::from_secs(20);
    tokio::time::timeout(deadline, runs).await.expect("the instance runs although nobody asked");
}
