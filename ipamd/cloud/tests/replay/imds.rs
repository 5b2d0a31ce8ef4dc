//! The metadata reader against a small metadata service: whole, partial, torn, closed and absent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Answer, Canned, Keys};
use flatwire_cloud::{AwsCloud, Config};
use flatwire_core::ids::DeviceIndex;
use flatwire_core::ports::{
    Cloud, CloudError, CloudErrorKind as Kind, CloudReply, CloudRequest, EniKind, EniStatus, Metadata,
};

const PRIMARY: &str = "02:78:d7:00:8a:1e";
const SECOND: &str = "02:78:d7:00:8a:2e";

/// The leaves of a node with two ENIs, the second on card 1 with a prefix.
pub fn leaf(path: &str) -> Option<String> {
    let text = match path {
        "meta-data/mac" => PRIMARY,
        "meta-data/local-ipv4" => "10.0.1.17",
        "meta-data/instance-id" => "i-0123456789abcdef0",
        "meta-data/instance-type" => "m5.large",
        "meta-data/placement/availability-zone" => "eu-west-1a",
        "meta-data/placement/region" => "eu-west-1",
        "meta-data/network/interfaces/macs/" => "02:78:d7:00:8a:1e/\n02:78:d7:00:8a:2e/",
        _ => {
            let (mac, leaf) = path.strip_prefix("meta-data/network/interfaces/macs/")?.split_once('/')?;
            match (mac, leaf) {
                (PRIMARY, "interface-id") => "eni-0aaaaaaaaaaaaaaa1",
                (PRIMARY, "device-number") => "0",
                (PRIMARY, "local-ipv4s") => "10.0.1.17\n10.0.1.201\n10.0.1.33",
                (SECOND, "interface-id") => "eni-0aaaaaaaaaaaaaaa2",
                (SECOND, "device-number") => "1",
                (SECOND, "local-ipv4s") => "10.0.1.18",
                (SECOND, "ipv4-prefix") => "10.0.1.64/28\n10.0.1.32/28\n",
                (SECOND, "network-card-index") => "1",
                (_, "subnet-id") => "subnet-0b7f8e1a2c3d4e5f6",
                (_, "subnet-ipv4-cidr-block") => "10.0.1.0/24",
                (_, "security-group-ids") => "sg-1\nsg-2",
                (_, "vpc-id") => "vpc-0123456789abcdef0",
                (_, "vpc-ipv4-cidr-blocks") => "10.0.0.0/16\n100.64.0.0/16",
                (_, "vpc-ipv6-cidr-blocks") => "2001:db8:1234:1a00::/56",
                _ => return None,
            }
        }
    };
    Some(text.to_owned())
}

async fn read(imds: &Canned) -> Result<Metadata, CloudError> {
    let config =
        Config { imds_endpoint: Some(imds.url()), http_timeout: Duration::from_millis(500), ..Config::new("0.1.0") };
    match AwsCloud::connect(config, Arc::new(())).unwrap().call(CloudRequest::ReadMetadata).await? {
        CloudReply::Metadata(metadata) => Ok(metadata),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_whole_node_is_read() {
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| leaf(path).map(Answer::ok));
    let node = read(&imds).await.unwrap();
    assert_eq!(node.instance.as_str(), "i-0123456789abcdef0");
    assert_eq!((node.region.as_str(), node.availability_zone.as_str()), ("eu-west-1", "eu-west-1a"));
    assert_eq!((node.vpc.as_str(), node.instance_type.as_str()), ("vpc-0123456789abcdef0", "m5.large"));
    assert!(!node.terminating);
    assert_eq!((node.primary_mac.to_string().as_str(), node.primary_ipv4.to_string().as_str()), (PRIMARY, "10.0.1.17"));
    let cidrs: Vec<String> = node.vpc_cidrs.iter().map(ToString::to_string).collect();
    assert_eq!(cidrs, ["10.0.0.0/16", "100.64.0.0/16", "2001:db8:1234:1a00::/56"]);

    let [first, second] = &node.enis[..] else { panic!("{:?}", node.enis) };
    assert_eq!((first.device, first.card, first.status), (DeviceIndex::PRIMARY, 0, EniStatus::Attached));
    let slots: Vec<String> = first.slots.iter().map(ToString::to_string).collect();
    assert_eq!(slots, ["10.0.1.33/32", "10.0.1.201/32"]);
    assert_eq!(first.subnet_cidr.unwrap().to_string(), "10.0.1.0/24");
    assert_eq!(first.security_groups.len(), 2);

    assert_eq!((second.device, second.card, second.kind), (DeviceIndex(1), 1, EniKind::Interface));
    let slots: Vec<String> = second.slots.iter().map(ToString::to_string).collect();
    assert_eq!(slots, ["10.0.1.32/28", "10.0.1.64/28"]);

    let tokens = imds.asked().iter().filter(|request| request.method == "PUT").count();
    assert_eq!(tokens, 1, "one session token serves the whole reading");
}

#[tokio::test]
async fn an_announced_end_is_read_from_either_place() {
    let spot = r#"{"action": "terminate", "time": "2026-01-31T12:02:00Z"}"#;
    let table = [
        (None, None, false),
        (None, Some("InService"), false),
        (None, Some("Standby"), false),
        (None, Some("Terminated"), true),
        (Some(spot), None, true),
        (Some(spot), Some("InService"), true),
        (Some(r#"{"action": "stop", "time": "2026-01-31T12:02:00Z"}"#), None, true),
    ];
    for (notice, lifecycle, terminating) in table {
        let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), move |path, _| match path {
            "meta-data/spot/instance-action" => notice.map(Answer::ok),
            "meta-data/autoscaling/target-lifecycle-state" => lifecycle.map(Answer::ok),
            _ => leaf(path).map(Answer::ok),
        });
        assert_eq!(read(&imds).await.unwrap().terminating, terminating, "{notice:?} {lifecycle:?}");
    }

    // A service that does not answer says nothing about the end: the reading fails, and is tried again.
    let ill = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| match path {
        "meta-data/spot/instance-action" => Some(Answer::status(503, "")),
        _ => leaf(path).map(Answer::ok),
    });
    assert_eq!(read(&ill).await.unwrap_err().kind, Kind::Transient);
}

#[tokio::test]
async fn the_region_may_stand_only_in_the_identity_document() {
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| match path {
        "meta-data/placement/region" => None,
        "dynamic/instance-identity/document" => Some(Answer::ok(
            "{\n  \"accountId\" : \"1\",\n  \"region\" : \"eu-west-1\",\n  \"version\" : \"2017-09-30\"\n}",
        )),
        _ => leaf(path).map(Answer::ok),
    });
    assert_eq!(read(&imds).await.unwrap().region, "eu-west-1");
}

#[tokio::test]
async fn absent_lists_are_empty_and_an_eni_without_addresses_serves_nobody() {
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| match path {
        "meta-data/network/interfaces/macs/02:78:d7:00:8a:2e/local-ipv4s"
        | "meta-data/network/interfaces/macs/02:78:d7:00:8a:2e/ipv4-prefix"
        | "meta-data/network/interfaces/macs/02:78:d7:00:8a:2e/security-group-ids"
        | "meta-data/network/interfaces/macs/02:78:d7:00:8a:1e/vpc-ipv4-cidr-blocks"
        | "meta-data/network/interfaces/macs/02:78:d7:00:8a:1e/vpc-ipv6-cidr-blocks" => None,
        "meta-data/network/interfaces/macs/02:78:d7:00:8a:1e/vpc-ipv4-cidr-block" => Some(Answer::ok("10.0.0.0/16")),
        _ => leaf(path).map(Answer::ok),
    });
    let node = read(&imds).await.unwrap();
    assert_eq!(node.vpc_cidrs.len(), 1);
    let second = &node.enis[1];
    assert!(second.primary_ipv4.is_unspecified() && second.slots.is_empty() && second.security_groups.is_empty());
    assert_eq!(second.kind, EniKind::Other);
}

#[tokio::test]
async fn an_eni_that_goes_away_in_the_middle_is_read_again_and_left_out() {
    let gone = Arc::new(AtomicUsize::new(0));
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), move |path, _| match path {
        "meta-data/network/interfaces/macs/02:78:d7:00:8a:2e/device-number" => {
            gone.store(1, Ordering::SeqCst);
            None
        }
        "meta-data/network/interfaces/macs/" if gone.load(Ordering::SeqCst) == 1 => {
            Some(Answer::ok("02:78:d7:00:8a:1e/"))
        }
        _ if path.contains(SECOND) && gone.load(Ordering::SeqCst) == 1 => None,
        _ => leaf(path).map(Answer::ok),
    });
    let node = read(&imds).await.unwrap();
    assert_eq!(node.enis.len(), 1);
    let listings = imds.asked().iter().filter(|request| request.path.ends_with("/macs/")).count();
    assert_eq!(listings, 4, "two readings, each between two listings");
}

#[tokio::test]
async fn an_eni_that_appears_in_the_middle_is_not_missed() {
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, before| match path {
        "meta-data/network/interfaces/macs/" if before < 4 => Some(Answer::ok("02:78:d7:00:8a:1e/")),
        _ => leaf(path).map(Answer::ok),
    });
    assert_eq!(read(&imds).await.unwrap().enis.len(), 2);
}

#[tokio::test]
async fn a_directory_that_never_fills_does_not_hide_the_others() {
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| match path {
        _ if path.ends_with("02:78:d7:00:8a:2e/interface-id") => None,
        _ => leaf(path).map(Answer::ok),
    });
    let node = read(&imds).await.unwrap();
    assert_eq!(node.enis.len(), 1);
    assert_eq!(node.enis[0].device, DeviceIndex::PRIMARY);
}

#[tokio::test]
async fn without_its_primary_a_reading_is_no_reading() {
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| match path {
        _ if path.ends_with("02:78:d7:00:8a:1e/interface-id") => None,
        _ => leaf(path).map(Answer::ok),
    });
    let error = read(&imds).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Malformed"));
    assert!(error.message.contains("primary"), "{error}");
}

#[tokio::test]
async fn failures_say_what_is_wrong_with_the_service() {
    let garbage = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, _| match path {
        "meta-data/instance-id" => Some(Answer::ok("<html>")),
        _ => leaf(path).map(Answer::ok),
    });
    let error = read(&garbage).await.unwrap_err();
    assert_eq!((error.code.as_str(), error.action.as_str()), ("Malformed", "ImdsRead"), "{error}");

    let flaky = crate::support::imds(Keys::any("AKIDEXAMPLE"), |path, before| match path {
        "meta-data/instance-type" if before < 40 => Some(Answer::status(503, "")),
        _ => leaf(path).map(Answer::ok),
    });
    let error = read(&flaky).await.unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");

    let disabled = Canned::start(|_, _| Answer::status(403, ""));
    let error = read(&disabled).await.unwrap_err();
    assert_eq!(error.kind, Kind::Denied, "{error}");

    let gone = Canned::start(|_, _| Answer::Hangup).url();
    let config = Config { imds_endpoint: Some(gone), http_timeout: Duration::from_millis(300), ..Config::new("0.1.0") };
    let error = AwsCloud::connect(config, Arc::new(())).unwrap().call(CloudRequest::ReadMetadata).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Connection"), "{error}");

    let silent = Canned::start(|_, _| Answer::Silence(Duration::from_secs(5)));
    let error = read(&silent).await.unwrap_err();
    assert_eq!((error.kind, error.code.as_str()), (Kind::Transient, "Timeout"), "{error}");
}
