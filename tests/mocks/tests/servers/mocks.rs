//! The walk on moto and on LocalStack, and moto's check of the shipped IAM policy. Each test has a server of its own.

use flatwire_core::ids::EniId;
use flatwire_core::ports::{Cloud, CloudErrorKind, CloudRequest, Want};
use flatwire_mock_tests::canned::Keys;
use flatwire_mock_tests::query::{http, text, texts};
use flatwire_mock_tests::server::Server;
use flatwire_mock_tests::walk::{MOTO_IAM_LACKS, MOTO_LACKS, Walk};
use flatwire_mock_tests::{loud, root};

use crate::iam::policy;

const POLICY: &str = "deploy/iam/policy-ipv4.json";

#[tokio::test]
async fn moto_walk() {
    let Some(server) = Server::moto() else { return };
    walk("moto", &server).await;
}

#[tokio::test]
async fn localstack_walk() {
    let Some(server) = Server::localstack() else { return };
    walk("localstack", &server).await;
}

async fn walk(name: &'static str, server: &Server) {
    loud(&format!("SKIPPED {name} ImdsRead: the server has no metadata of its instances' interfaces"));
    let place = server.lay_out();
    let (cloud, _imds) = server.adapter(Keys::any(&server.query.access_key));
    Walk::new(name, cloud, place, MOTO_LACKS.to_vec()).run().await;

    let left = server.query.ec2(
        "DescribeNetworkInterfaces",
        &[("Filter.1.Name", "tag-key"), ("Filter.1.Value.1", "cluster.k8s.amazonaws.com/name")],
    );
    assert!(texts(&left, "networkInterfaceId").is_empty(), "leaked: {left}");
}

/// The adapter's whole life under exactly the shipped policy, signatures checked. moto looks at actions only, not at
/// conditions, so this proves that the list of actions is complete, and that it is needed: one action less is denied.
#[tokio::test]
async fn moto_walk_under_the_shipped_policy() {
    let Some(server) = Server::moto() else { return };
    let place = server.lay_out();
    loud("WIDENED moto+iam CreateTags: allowed on all resources, the server asks for every action on `*`");
    let policy = std::fs::read_to_string(root().join(POLICY)).unwrap();
    let policy = policy.replace("[\"arn:aws:ec2:*:*:network-interface/*\"]", "\"*\"");
    assert!(!policy.contains("arn:"), "{policy}");
    let node = role(&server, "node", &policy);
    let lesser = policy.replace("\"ec2:AssignPrivateIpAddresses\",", "");
    assert_ne!(policy, lesser);
    let lesser = role(&server, "lesser", &lesser);
    let thief = Keys { secret: "guessed".to_owned(), ..node.clone() };

    let (status, body) =
        http(server.query.port, "POST", "/moto-api/reset-auth", &[("content-type", "text/plain")], "0").unwrap();
    assert_eq!(status, 200, "{body}");

    let (cloud, _imds) = server.adapter(node);
    Walk::new("moto+iam", cloud, place, [MOTO_LACKS, MOTO_IAM_LACKS].concat()).run().await;

    let assign = CloudRequest::Assign { eni: EniId::new("eni-00000000000000001").unwrap(), want: Want::Addresses(1) };
    for (keys, code) in [(lesser, "AccessDenied"), (thief, "AuthFailure")] {
        let (cloud, _imds) = server.adapter(keys);
        let error = cloud.call(assign.clone()).await.unwrap_err();
        assert_eq!((error.kind, error.code.as_str()), (CloudErrorKind::Denied, code), "{error}");
    }
}

/// A role with this policy, assumed.
fn role(server: &Server, name: &str, policy: &str) -> Keys {
    let trust = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"Service":"ec2.amazonaws.com"},
                    "Action":"sts:AssumeRole"}]}"#;
    let made = server.query.call("iam", "CreateRole", &[("RoleName", name), ("AssumeRolePolicyDocument", trust)]);
    let parameters = [("RoleName", name), ("PolicyName", "shipped"), ("PolicyDocument", policy)];
    server.query.call("iam", "PutRolePolicy", &parameters);
    let arn = text(&made, "Arn");
    let assumed = server.query.call("sts", "AssumeRole", &[("RoleArn", &arn), ("RoleSessionName", "i-1")]);
    Keys {
        access_key: text(&assumed, "AccessKeyId"),
        secret: text(&assumed, "SecretAccessKey"),
        token: text(&assumed, "SessionToken"),
    }
}

/// The shipped policies ask for no more than the add-on's, so that a role made for it fits.
#[test]
fn the_add_ons_policy_is_enough() {
    let add_on = [
        "ec2:AssignPrivateIpAddresses",
        "ec2:AttachNetworkInterface",
        "ec2:CreateNetworkInterface",
        "ec2:CreateTags",
        "ec2:DeleteNetworkInterface",
        "ec2:DescribeInstanceTypes",
        "ec2:DescribeInstances",
        "ec2:DescribeNetworkInterfaces",
        "ec2:DescribeSecurityGroups",
        "ec2:DescribeSubnets",
        "ec2:DescribeTags",
        "ec2:DetachNetworkInterface",
        "ec2:ModifyNetworkInterfaceAttribute",
        "ec2:UnassignPrivateIpAddresses",
    ];
    for name in ["policy-ipv4.json", "policy-read-only.json"] {
        let more: Vec<String> = policy(name).into_iter().filter(|action| !add_on.contains(&action.as_str())).collect();
        assert_eq!(more, Vec::<String>::new(), "{name}");
    }
}
