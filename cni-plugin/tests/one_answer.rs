//! The built plugin, called with whatever an environment and a standard input can be: it always ends by itself, with exactly
//! one JSON object or nothing, and an error is an error object of CNI with a code of the specification or of ours.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// "A bug in this plugin": how a panic shows.
const BUG: u64 = 115;

/// Calls the plugin with these variables and no others.
fn call(vars: &[(&str, OsString)], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_aws-cni"))
        .env_clear()
        .envs(vars.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A plugin that has seen enough of its variables need not read what is sent.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

fn assert_one_answer(output: &Output) {
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    match output.status.code() {
        Some(0) if said.is_empty() => {}
        Some(0) => assert!(serde_json::from_str::<Value>(&said).unwrap().is_object(), "{said}"),
        Some(1) => {
            let object: Value = serde_json::from_str(&said).unwrap();
            let code = object["code"].as_u64().unwrap();
            assert!(matches!(code, 1..=7 | 11 | 50 | 51 | 100..), "{said}");
            assert!(code != BUG && code != 999, "{said}");
            assert!(object["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{said}");
            assert!(VERSIONS.contains(&object["cniVersion"].as_str().unwrap()), "{said}");
        }
        _ => panic!("{:?} after {said}", output.status),
    }
}

/// Bytes that an environment can hold.
fn bytes() -> impl Strategy<Value = OsString> {
    prop_oneof![
        "[a-z0-9]{1,12}".prop_map(OsString::from),
        prop::collection::vec(1u8.., 0..24).prop_map(OsString::from_vec),
        "\\PC{0,200}".prop_map(|text| OsString::from(text.replace('\0', ""))),
    ]
}

fn verb() -> impl Strategy<Value = OsString> {
    let known = select(vec!["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]).prop_map(OsString::from);
    prop_oneof![9 => known, 1 => bytes()]
}

fn value() -> impl Strategy<Value = Value> {
    let texts = ["", "eth0", "1.1.0", "10.0.0.1/32", "/x", "9001", "DEBUG", "strict", "aws-cni", "\u{0}"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        select(texts.to_vec()).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    let keys =
        ["interfaces", "ips", "name", "mac", "sandbox", "interface", "address", "cniVersion", "ip4", "routes", "dst"];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(select(keys.to_vec()).prop_map(str::to_owned), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A configuration with some keys of any kind, whose files and sockets stay in a folder of the test.
fn configuration() -> impl Strategy<Value = Value> {
    let keys = [
        "prevResult",
        "mtu",
        "vethPrefix",
        "runtimeConfig",
        "dns",
        "cni.dev/valid-attachments",
        "cni.dev/attachments",
        "pluginLogLevel",
        "podSGEnforcingMode",
        "name",
        "args",
        "type",
    ];
    let more = prop::collection::vec((select(keys.to_vec()), value()), 0..6);
    (select(VERSIONS.to_vec()), prop::option::weighted(0.1, value()), more).prop_map(|(version, odd, more)| {
        let mut conf =
            json!({ "cniVersion": odd.unwrap_or_else(|| version.into()), "name": "aws-cni", "type": "aws-cni" });
        for (key, value) in more {
            conf[key] = value;
        }
        conf
    })
}

fn kept_in(folder: &Path, mut conf: Value) -> Vec<u8> {
    for (key, name) in [
        ("pluginLogFile", "plugin.log"),
        ("ipamdSocket", "ipamd.sock"),
        ("npaSocket", "npa.sock"),
        ("releaseQueueDir", "releases"),
    ] {
        conf[key] = folder.join(name).to_str().unwrap().into();
    }
    conf.to_string().into_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_standard_input_has_one_answer(verb in verb(), stdin in prop::collection::vec(any::<u8>(), 0..400)) {
        let vars = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "c1".into()),
            ("CNI_NETNS", "/nowhere/ns".into()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_PATH", "/nowhere".into()),
        ];
        assert_one_answer(&call(&vars, &stdin));
    }

    #[test]
    fn any_configuration_has_one_answer(verb in verb(), conf in configuration()) {
        let dir = tempfile::tempdir().unwrap();
        let vars = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "c1".into()),
            ("CNI_NETNS", "/nowhere/ns".into()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=p".into()),
            ("CNI_PATH", "/nowhere".into()),
        ];
        assert_one_answer(&call(&vars, &kept_in(dir.path(), conf)));
    }

    #[test]
    fn any_environment_has_one_answer(
        verb in verb(),
        id in bytes(),
        netns in bytes(),
        ifname in bytes(),
        args in prop_oneof![bytes(), "(K8S_POD_(NAME|NAMESPACE)=\\PC{0,12};?){0,3}".prop_map(OsString::from)],
        given in prop::array::uniform5(prop::bool::weighted(0.9)),
        version in select(VERSIONS.to_vec()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let all = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", id),
            // Below a folder that is not there: no call of this test may reach a namespace.
            ("CNI_NETNS", [OsString::from("/nowhere/"), netns].into_iter().collect()),
            ("CNI_IFNAME", ifname),
            ("CNI_ARGS", args),
        ];
        let vars: Vec<_> = all.into_iter().zip(given).filter(|(_, given)| *given).map(|(var, _)| var).collect();
        let conf = json!({ "cniVersion": version, "name": "aws-cni", "type": "aws-cni" });
        assert_one_answer(&call(&vars, &kept_in(dir.path(), conf)));
    }
}

/// Nothing of the above may be an answer because every call fails early: a proper DEL without a daemon is done by the queue.
#[test]
fn a_proper_call_gets_through() {
    let dir = tempfile::tempdir().unwrap();
    let conf = json!({ "cniVersion": "1.1.0", "name": "aws-cni", "type": "aws-cni" });
    let vars = [
        ("CNI_COMMAND", "DEL".into()),
        ("CNI_CONTAINERID", "c1".into()),
        ("CNI_IFNAME", "eth0".into()),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=p".into()),
    ];
    let output = call(&vars, &kept_in(dir.path(), conf));
    assert_one_answer(&output);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(std::fs::read_dir(dir.path().join("releases")).unwrap().count(), 1);
}
