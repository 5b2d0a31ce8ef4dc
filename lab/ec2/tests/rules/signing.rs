//! Who is let in: signatures, skew, sessions.

use std::collections::BTreeSet;

use flatwire_core::ids::Time;
use lab_ec2::{Credentials, Ec2, Options, RunInstance, SignedRequest, Tags, sign};

const NOW: Time = Time(1_700_000_000_000);
const BODY: &[u8] = b"Action=DescribeVpcs&Version=2016-11-15";

fn attempt(ec2: &Ec2, credentials: &Credentials, region: &str, service: &str, at: Time) -> Result<String, String> {
    let headers = vec![("host".to_owned(), "127.0.0.1:4000".to_owned())];
    let plain = SignedRequest { method: "POST", path: "/", query: "", headers: &headers, body: BODY };
    let added = sign(credentials, region, service, at, &plain);
    let all: Vec<_> = headers.iter().cloned().chain(added).collect();
    let signed = SignedRequest { headers: &all, ..plain };
    ec2.authenticate(NOW, &signed).map(|caller| caller.arn).map_err(|error| error.code)
}

#[test]
fn the_right_key_is_let_in_and_every_other_is_not() {
    let ec2 = Ec2::new(Options::default());
    let admin = ec2.admin();
    assert!(attempt(&ec2, &admin, "us-east-1", "ec2", NOW).unwrap().starts_with("arn:aws:iam::123456789012:user/"));
    let wrong = Credentials { secret: "wrong".into(), ..admin.clone() };
    let unknown = Credentials { access_key: "AKIAUNKNOWN".into(), ..admin.clone() };
    let with_token = Credentials { session_token: Some("x".into()), ..admin.clone() };
    let table = [
        (&wrong, "us-east-1", "ec2", NOW, "AuthFailure"),
        (&unknown, "us-east-1", "ec2", NOW, "AuthFailure"),
        (&with_token, "us-east-1", "ec2", NOW, "AuthFailure"),
        (&admin, "eu-west-1", "ec2", NOW, "AuthFailure"),
        (&admin, "us-east-1", "s3", NOW, "AuthFailure"),
        (&admin, "us-east-1", "ec2", Time(NOW.0 - 901_000), "RequestExpired"),
        (&admin, "us-east-1", "ec2", Time(NOW.0 + 901_000), "RequestExpired"),
        (&unknown, "us-east-1", "sts", NOW, "InvalidClientTokenId"),
        (&wrong, "us-east-1", "sts", NOW, "SignatureDoesNotMatch"),
    ];
    for (credentials, region, service, at, code) in table {
        assert_eq!(attempt(&ec2, credentials, region, service, at), Err(code.to_owned()), "{code} {service}");
    }
    assert!(attempt(&ec2, &admin, "us-east-1", "ec2", Time(NOW.0 - 899_000)).is_ok());
    assert!(!format!("{admin:?}").contains(&admin.secret), "a secret is never printed");
}

#[test]
fn an_instance_role_is_let_in_with_its_token_until_it_expires() {
    let ec2 = Ec2::new(Options::default());
    let vpc = ec2.create_vpc(NOW, "10.0.0.0/16".parse().unwrap(), "").unwrap();
    let subnet = ec2.create_subnet(NOW, &vpc, "10.0.0.0/24".parse().unwrap(), None, Tags::new()).unwrap();
    let past = Time(NOW.0 - 7 * 3_600_000);
    let instance = ec2.run_instance(past, &RunInstance::new("m5.large", subnet)).unwrap();
    let credentials = |at: Time| {
        let imds = ec2.imds(at, &instance).unwrap();
        let text = imds.get("meta-data/iam/security-credentials/lab-node").unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let field = |name: &str| json[name].as_str().unwrap().to_owned();
        Credentials {
            access_key: field("AccessKeyId"),
            secret: field("SecretAccessKey"),
            session_token: Some(field("Token")),
            allow: None,
        }
    };
    let (old, new) = (credentials(past), credentials(NOW));
    let arn = attempt(&ec2, &new, "us-east-1", "ec2", NOW).unwrap();
    assert_eq!(arn, format!("arn:aws:sts::123456789012:assumed-role/lab-node/{instance}"));
    assert_eq!(attempt(&ec2, &old, "us-east-1", "ec2", NOW), Err("RequestExpired".into()));
    let bare = Credentials { session_token: None, ..new.clone() };
    assert_eq!(attempt(&ec2, &bare, "us-east-1", "ec2", NOW), Err("AuthFailure".into()));
    ec2.set_role("lab-node", Some(BTreeSet::from(["ec2:DescribeSubnets".to_owned()])));
    assert!(
        attempt(&ec2, &new, "us-east-1", "ec2", NOW).is_ok(),
        "who somebody is does not depend on what they may do"
    );
}
