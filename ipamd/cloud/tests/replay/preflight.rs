//! The questions of a preflight: what goes out, and what each answer means.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Answer, Canned, Keys, Request};
use flatwire_cloud::{ACTIONS, AwsCloud, Config, PermissionOutcome as Outcome};
use flatwire_core::ports::CloudErrorKind as Kind;

fn refusal(status: u16, code: &str, message: &str) -> Answer {
    Answer::status(
        status,
        format!(
            "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>\
             <RequestID>r</RequestID></Response>"
        ),
    )
}

/// EC2 as it answers somebody who may do everything: reads are served, dry runs end as dry runs, and what cannot be is refused.
fn permissive(request: &Request) -> Answer {
    if request.form("DryRun").as_deref() == Some("true") {
        return refusal(412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.");
    }
    match request.form("Action").as_deref() {
        Some("DescribeNetworkInterfaces") if request.form("NextToken").is_none() => {
            Answer::ok(include_str!("answers/describe_network_interfaces_1.xml"))
        }
        Some("DescribeNetworkInterfaces") => Answer::ok(include_str!("answers/describe_network_interfaces_2.xml")),
        Some("DescribeInstances") => Answer::ok(
            "<DescribeInstancesResponse><reservationSet><item><instancesSet><item>\
             <instanceId>i-0123456789abcdef0</instanceId><metadataOptions><httpTokens>required</httpTokens>\
             <httpPutResponseHopLimit>2</httpPutResponseHopLimit></metadataOptions></item></instancesSet></item>\
             </reservationSet></DescribeInstancesResponse>",
        ),
        _ => refusal(400, "InvalidParameterValue", "Address 10.0.1.0 is in subnet's reserved address range"),
    }
}

struct Bench {
    ec2: Canned,
    _imds: Canned,
    cloud: AwsCloud,
}

fn bench(
    ec2: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    leaf: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static,
) -> Bench {
    let ec2 = Canned::start(move |request, _| ec2(request));
    let imds = crate::support::imds(Keys::any("AKIDEXAMPLE"), move |path, _| leaf(path));
    let config = Config {
        region: Some("eu-west-1".to_owned()),
        ec2_endpoint: Some(ec2.url()),
        imds_endpoint: Some(imds.url()),
        http_timeout: Duration::from_secs(2),
        ..Config::new("0.1.0")
    };
    let cloud = AwsCloud::connect(config, Arc::new(())).unwrap();
    Bench { ec2, _imds: imds, cloud }
}

impl Bench {
    async fn outcomes(&self) -> BTreeMap<&'static str, Outcome> {
        self.cloud
            .permissions(false)
            .await
            .into_iter()
            .map(|permission| (permission.action, permission.outcome))
            .collect()
    }
}

fn node(path: &str) -> Option<Answer> {
    crate::imds::leaf(path).map(Answer::ok)
}

/// Whatever is asked, nothing can come of it: it is a dry run, a read, or a request for the subnet's own address.
#[tokio::test]
async fn every_action_is_asked_for_and_none_is_done() {
    let bench = bench(permissive, node);
    let outcomes = bench.outcomes().await;
    assert_eq!(outcomes.keys().copied().collect::<Vec<_>>(), ACTIONS);
    assert!(outcomes.values().all(|outcome| *outcome == Outcome::Allowed), "{outcomes:?}");
    for request in bench.ec2.asked() {
        let action = request.form("Action").unwrap();
        match action.as_str() {
            "AssignPrivateIpAddresses" | "UnassignPrivateIpAddresses" => {
                assert_eq!(request.form("PrivateIpAddress.1").as_deref(), Some("10.0.1.0"), "{}", request.body);
                assert_eq!(request.form("PrivateIpAddress.2"), None);
            }
            "DescribeNetworkInterfaces" => {}
            _ => assert_eq!(request.form("DryRun").as_deref(), Some("true"), "{}", request.body),
        }
    }
}

#[tokio::test]
async fn the_questions_are_about_an_eni_that_an_ipam_made() {
    let tagged = include_str!("answers/describe_network_interfaces_2.xml").replacen(
        "</networkInterfaceId>",
        "</networkInterfaceId><tagSet><item><key>node.k8s.amazonaws.com/instance_id</key><value>i-0</value></item>\
         <item><key>aws:reserved</key><value>x</value></item></tagSet>",
        1,
    );
    let bench = bench(
        move |request| match (request.form("Action").as_deref(), request.form("DryRun")) {
            (Some("DescribeNetworkInterfaces"), None) if request.form("NextToken").is_some() => {
                Answer::ok(tagged.clone())
            }
            _ => permissive(request),
        },
        node,
    );
    bench.outcomes().await;
    let asked = bench.ec2.asked();
    let of = |action: &str| asked.iter().find(|request| request.form("Action").as_deref() == Some(action)).unwrap();
    let made = Some("eni-0aaaaaaaaaaaaaaa3".to_owned());
    assert_eq!(of("DeleteNetworkInterface").form("NetworkInterfaceId"), made);
    assert_eq!(of("CreateTags").form("ResourceId.1"), made);
    let tag = of("CreateNetworkInterface").form("TagSpecification.1.Tag.1.Key");
    assert_eq!(tag.as_deref(), Some("node.k8s.amazonaws.com/instance_id"));
    assert!(!of("CreateNetworkInterface").body.contains("reserved"), "nobody may set those tags");
}

#[tokio::test]
async fn a_denial_keeps_ec2s_words_without_the_encoded_rest() {
    let denied = "You are not authorized to perform this operation. User: arn:aws:sts::1:assumed-role/n/i-1 is not \
                  authorized to perform: ec2:DetachNetworkInterface";
    let bench = bench(
        move |request| match request.form("Action").as_deref() {
            Some("DetachNetworkInterface" | "UnassignPrivateIpAddresses") => refusal(
                403,
                "UnauthorizedOperation",
                &format!("{denied}. Encoded authorization failure message: {}", "x".repeat(3_000)),
            ),
            Some("CreateTags") => refusal(503, "RequestLimitExceeded", "Request limit exceeded."),
            Some("CreateNetworkInterface") => Answer::ok(include_str!("answers/create_network_interface.xml")),
            _ => permissive(request),
        },
        node,
    );
    let outcomes = bench.outcomes().await;
    for action in ["DetachNetworkInterface", "UnassignPrivateIpAddresses"] {
        assert_eq!(outcomes[action], Outcome::Denied { message: format!("{denied}.") }, "{action}");
    }
    for (action, word) in [("CreateTags", "RequestLimitExceeded"), ("CreateNetworkInterface", "did what EC2 refuses")] {
        assert!(matches!(&outcomes[action], Outcome::Unknown { why } if why.contains(word)), "{:?}", outcomes[action]);
    }
    assert_eq!(outcomes.values().filter(|outcome| **outcome == Outcome::Allowed).count(), ACTIONS.len() - 4);
}

#[tokio::test]
async fn without_metadata_the_reads_can_still_be_asked_for() {
    let bench = bench(permissive, |_| None);
    let outcomes = bench.outcomes().await;
    for (action, outcome) in &outcomes {
        match outcome {
            Outcome::Allowed => assert!(action.starts_with("Describe"), "{action}"),
            Outcome::Unknown { why } => assert!(why.contains("own ENI"), "{action}: {why}"),
            Outcome::Denied { message } => panic!("{action}: {message}"),
        }
    }
    assert_eq!(outcomes.values().filter(|outcome| **outcome == Outcome::Allowed).count(), 3);
}

#[tokio::test]
async fn the_metadata_service_is_seen_by_its_answer_and_by_ec2s() {
    let whole = bench(permissive, node).cloud.metadata_service().await;
    assert_eq!(whole.instance.unwrap().as_str(), "i-0123456789abcdef0");
    let options = whole.options.unwrap();
    assert_eq!((options.hop_limit, options.tokens_required), (2, true));

    let denied = bench(|_| refusal(403, "UnauthorizedOperation", "no"), node).cloud.metadata_service().await;
    assert!(denied.instance.is_ok());
    assert_eq!(denied.options.unwrap_err().kind, Kind::Denied);

    let silent = Canned::start(|_, _| Answer::Silence(Duration::from_secs(5)));
    let config = Config {
        region: Some("eu-west-1".to_owned()),
        ec2_endpoint: Some(silent.url()),
        imds_endpoint: Some(silent.url()),
        http_timeout: Duration::from_millis(200),
        ..Config::new("0.1.0")
    };
    let far = AwsCloud::connect(config, Arc::new(())).unwrap().metadata_service().await;
    let error = far.instance.unwrap_err();
    assert_eq!(error.code, "Timeout", "{error}");
    assert_eq!(far.options.unwrap_err(), error);
}
