//! Reads one call: the environment, then standard input. Nothing is believed before it is checked (section 2, Parameters).

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::spec::{self, CniArgs, CniVersion, NetConf};

/// A configuration with the result of a long chain takes a few kilobytes.
pub const MAX_STDIN_BYTES: u64 = 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub fn text(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version]
            .into_iter()
            .find(|verb| verb.text() == text)
    }

    /// The version of the specification that brought the verb.
    fn since(self) -> CniVersion {
        match self {
            Self::Add | Self::Del | Self::Version => CniVersion::V0_1_0,
            Self::Check => CniVersion::V0_4_0,
            Self::Gc | Self::Status => CniVersion::V1_1_0,
        }
    }

    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Gc => &["CNI_PATH"],
            Self::Status | Self::Version => &[],
        }
    }
}

/// One call of the plugin, checked. Texts a verb does not need are empty.
#[derive(Debug)]
pub struct Call {
    pub verb: Verb,
    pub container_id: String,
    pub if_name: String,
    pub netns: Option<PathBuf>,
    pub args: CniArgs,
    pub conf: NetConf,
}

impl Call {
    /// What every log line of this call carries.
    pub fn log_context(&self) -> Map<String, Value> {
        let pairs = [
            ("verb", self.verb.text()),
            ("network", &self.conf.name),
            ("container", &self.container_id),
            ("ifname", &self.if_name),
            ("namespace", &self.args.pod_namespace),
            ("pod", &self.args.pod_name),
        ];
        let netns = self.netns.as_ref().map(|path| path.to_string_lossy());
        let given = pairs.into_iter().chain(netns.as_deref().map(|path| ("netns", path)));
        given.filter(|(_, text)| !text.is_empty()).map(|(key, text)| (key.to_owned(), text.into())).collect()
    }
}

/// Which verb is asked, before anything else is looked at.
pub fn verb(env: &impl Fn(&str) -> Option<OsString>) -> Result<Verb, Failure> {
    let text = variable(env, "CNI_COMMAND")?.unwrap_or_default();
    match Verb::parse(&text) {
        Some(verb) => Ok(verb),
        None if text.is_empty() => Err(Failure::environment("CNI_COMMAND", "is missing; a container runtime sets it")),
        None => Err(Failure::environment("CNI_COMMAND", format!("is {text:?}, which is not a verb of CNI"))),
    }
}

/// How long the runtime may take to hand over the configuration.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// Reads what comes within a time: a caller may never close its end.
pub struct Patient<F> {
    input: F,
    until: Instant,
    after: Duration,
}

impl<F: Read + AsFd> Patient<F> {
    pub fn new(input: F, after: Duration) -> Self {
        Self { input, until: Instant::now() + after, after }
    }
}

impl<F: Read + AsFd> Read for Patient<F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        let mut waits = [PollFd::new(self.input.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waits, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO))? == 0 {
            let late = format!("its end did not come within {:?}", self.after);
            return Err(io::Error::new(io::ErrorKind::TimedOut, late));
        }
        self.input.read(bytes)
    }
}

/// Reads standard input up to its end, or up to more than any caller has reason to send.
pub fn stdin(input: impl Read) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    input.take(MAX_STDIN_BYTES + 1).read_to_end(&mut bytes).map_err(|source| Failure::Stdin { source })?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_STDIN_BYTES {
        return Err(Failure::Decode { problem: format!("it is larger than {MAX_STDIN_BYTES} bytes") });
    }
    Ok(bytes)
}

/// The checked call of any verb but VERSION, which has no configuration.
pub fn call(verb: Verb, env: &impl Fn(&str) -> Option<OsString>, stdin: &[u8]) -> Result<Call, Failure> {
    let missing: Vec<&str> =
        verb.required().iter().copied().filter(|name| env(name).is_none_or(|v| v.is_empty())).collect();
    if !missing.is_empty() {
        return Err(Failure::environment(&missing.join(", "), format!("is missing; {} needs it", verb.text())));
    }
    let attachment = matches!(verb, Verb::Add | Verb::Del | Verb::Check);
    let read = |name| if attachment { variable(env, name).map(Option::unwrap_or_default) } else { Ok(String::new()) };
    let container_id = read("CNI_CONTAINERID")?;
    let if_name = read("CNI_IFNAME")?;
    if attachment {
        if !spec::is_identifier(&container_id) {
            return Err(Failure::environment(
                "CNI_CONTAINERID",
                format!(
                    "is {container_id:?}; allowed are letters, digits, '_', '.' and '-', the first a letter or digit"
                ),
            ));
        }
        if let Some(problem) = spec::interface_name_problem(&if_name) {
            return Err(Failure::environment("CNI_IFNAME", problem));
        }
    }
    let netns = if attachment { env("CNI_NETNS").filter(|path| !path.is_empty()).map(PathBuf::from) } else { None };
    let args = match read("CNI_ARGS").and_then(|text| CniArgs::parse(&text)) {
        Ok(args) => args,
        // A release must not fail for something it can do without.
        Err(_) if verb == Verb::Del => CniArgs::default(),
        Err(failure) => return Err(failure),
    };
    let conf = NetConf::decode(stdin)?;
    if conf.version < verb.since() {
        let (given, needed) = (conf.version.text(), verb.since().text());
        return Err(Failure::VerbTooNew { verb: verb.text(), given, needed });
    }
    Ok(Call { verb, container_id, if_name, netns, args, conf })
}

fn variable(env: &impl Fn(&str) -> Option<OsString>, name: &str) -> Result<Option<String>, Failure> {
    match env(name).map(OsString::into_string) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(_)) => Err(Failure::environment(name, "is not UTF-8")),
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::HashMap;
    use std::io;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A checked call of `verb` with a full environment and `conf`.
    pub fn sample(verb: &str, conf: &Value) -> Call {
        read(&[("CNI_COMMAND", verb)], conf.to_string().as_bytes()).unwrap()
    }

    pub fn read(overrides: &[(&str, &str)], stdin: &[u8]) -> Result<Call, Failure> {
        let mut vars = HashMap::from([
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/var/run/netns/cni-1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=sample-pod-1;K8S_POD_UID=u"),
            ("CNI_PATH", "/opt/cni/bin"),
        ]);
        vars.extend(overrides.iter().copied());
        let env = |name: &str| vars.get(name).map(OsString::from);
        call(verb(&env)?, &env, stdin)
    }

    const CONF: &str = r#"{"cniVersion":"1.1.0","name":"aws-cni","type":"aws-cni"}"#;

    #[test]
    fn variables_are_required_per_verb() {
        let table: [(&str, &[&str]); 5] = [
            ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
            ("GC", &["CNI_PATH"]),
            ("STATUS", &[]),
        ];
        let all = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"];
        for (verb, required) in table {
            for name in all {
                let outcome = read(&[("CNI_COMMAND", verb), (name, "")], CONF.as_bytes());
                match outcome {
                    Ok(_) => assert!(!required.contains(&name), "{verb} without {name} passed"),
                    Err(failure) => {
                        assert!(required.contains(&name), "{verb} without {name}: {failure}");
                        assert_eq!(failure.code(), 4);
                        assert!(failure.to_string().contains(name), "{failure}");
                    }
                }
            }
        }
    }

    #[test]
    fn unusable_variables_are_named() {
        let table = [
            ("CNI_COMMAND", "PLUG"),
            ("CNI_COMMAND", "add"),
            ("CNI_COMMAND", ""),
            ("CNI_CONTAINERID", "-c"),
            ("CNI_CONTAINERID", "a/b"),
            ("CNI_CONTAINERID", "a b"),
            ("CNI_CONTAINERID", "../x"),
            ("CNI_IFNAME", "sixteen-letters."),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_IFNAME", "a b"),
            ("CNI_IFNAME", "eth%d"),
            ("CNI_IFNAME", "."),
            ("CNI_IFNAME", ".."),
            ("CNI_ARGS", "K8S_POD_NAME"),
        ];
        for (name, value) in table {
            let failure = read(&[(name, value)], CONF.as_bytes()).unwrap_err();
            assert_eq!(failure.code(), 4, "{name}={value}");
            assert!(failure.to_string().contains(name), "{failure}");
        }
    }

    #[test]
    fn del_does_without_readable_args() {
        let call = read(&[("CNI_COMMAND", "DEL"), ("CNI_ARGS", "nonsense")], CONF.as_bytes()).unwrap();
        assert_eq!(call.args, CniArgs::default());
    }

    #[test]
    fn configurations_that_do_not_decode_or_make_no_sense() {
        let table = [
            ("", 6),
            ("  \n", 6),
            ("{", 6),
            ("[]", 6),
            ("7", 6),
            (r#"{"cniVersion":7,"name":"n"}"#, 6),
            (r#"{"cniVersion":"0.9.9","name":"n"}"#, 1),
            (r#"{"cniVersion":"2.0.0","name":"n"}"#, 1),
            (r#"{"cniVersion":"1.1.0"}"#, 7),
            (r#"{"cniVersion":"1.1.0","name":""}"#, 7),
            (r#"{"cniVersion":"1.1.0","name":"a/b"}"#, 7),
            (r#"{"cniVersion":"1.1.0","name":5}"#, 7),
        ];
        for (stdin, code) in table {
            assert_eq!(read(&[], stdin.as_bytes()).unwrap_err().code(), code, "{stdin}");
        }
    }

    #[test]
    fn a_configuration_without_version_is_the_first() {
        for conf in [r#"{"name":"n"}"#, r#"{"name":"n","cniVersion":""}"#] {
            assert_eq!(read(&[], conf.as_bytes()).unwrap().conf.version, CniVersion::V0_1_0);
        }
    }

    #[test]
    fn verbs_need_the_version_that_brought_them() {
        for version in CniVersion::ALL {
            let conf = json!({ "cniVersion": version.text(), "name": "n" }).to_string();
            for (verb, since) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0"), ("DEL", "0.1.0")] {
                let outcome = read(&[("CNI_COMMAND", verb)], conf.as_bytes());
                assert_eq!(outcome.is_ok(), version.text() >= since, "{verb} in {}", version.text());
                assert!(outcome.err().is_none_or(|failure| failure.code() == 1));
            }
        }
    }

    #[test]
    fn more_than_any_caller_sends_is_not_read() {
        let failure = stdin(io::repeat(b' ')).unwrap_err();
        assert_eq!(failure.code(), 6);
        assert!(failure.to_string().contains("larger"), "{failure}");
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[ -~]{0,20}".prop_map(Value::from),
            Just(json!("eth0")),
            Just(json!("10.0.0.1/32")),
            Just(json!("1.1.0")),
        ];
        let keys = prop_oneof![
            Just("interfaces"),
            Just("ips"),
            Just("interface"),
            Just("name"),
            Just("sandbox"),
            Just("mac"),
            Just("address"),
            Just("runtimeConfig"),
            Just("mtu"),
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(keys.clone(), inner, 0..6)
                    .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ]
        })
    }

    /// Everything a verb reads from a configuration. It may fail, but it may not panic.
    fn read_everything(call: &Call) -> Vec<Failure> {
        let conf = &call.conf;
        let mut failures: Vec<Failure> = [
            conf.check_for_add().err(),
            conf.veth_prefix().err(),
            conf.mtu().err(),
            conf.ipamd_socket().err(),
            conf.npa_socket().err(),
            conf.release_queue_dir().err(),
            conf.valid_attachments().err(),
        ]
        .into_iter()
        .flatten()
        .collect();
        let _ = (conf.wants_multi_nic(), conf.log_file(), conf.log_level(), conf.dns(), call.log_context());
        match conf.prev_result() {
            Err(failure) => failures.push(failure),
            Ok(None) => {}
            Ok(Some(previous)) => {
                let _ = crate::pod::attached(previous, &call.if_name);
                let result = crate::pod::result(call, "eni", 9001, &[]);
                for version in CniVersion::ALL {
                    assert!(result.encode(version, Some(previous)).is_object());
                }
            }
        }
        failures
    }

    fn assert_well_formed(failure: &Failure) {
        let object = serde_json::to_value(failure.object(CniVersion::NEWEST)).unwrap();
        assert!(object["code"].as_u64().is_some_and(|code| code > 0 && code != 999), "{object}");
        assert!(object["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{object}");
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_call_or_an_error_object(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
                if let Err(failure) = read(&[("CNI_COMMAND", verb)], &bytes) {
                    assert_well_formed(&failure);
                }
            }
            if let Err(failure) = crate::spec::version_answer(&bytes) {
                assert_well_formed(&failure);
            }
        }

        #[test]
        fn any_object_gives_a_call_or_an_error_object(
            values in prop::collection::vec((
                prop_oneof![
                    Just("prevResult"), Just("mtu"), Just("vethPrefix"), Just("runtimeConfig"), Just("dns"),
                    Just("cni.dev/valid-attachments"), Just("pluginLogFile"), Just("ipamdSocket"), Just("capabilities"),
                    Just("podSGEnforcingMode"), Just("releaseQueueDir"), Just("name"), Just("cniVersion"), Just("args"),
                ],
                json_value(),
            ), 0..8),
            verb in prop_oneof![Just("ADD"), Just("DEL"), Just("CHECK"), Just("GC"), Just("STATUS")],
        ) {
            let mut conf = json!({ "cniVersion": "1.1.0", "name": "aws-cni" });
            for (key, value) in values {
                conf[key] = value;
            }
            match read(&[("CNI_COMMAND", verb)], conf.to_string().as_bytes()) {
                Ok(call) => read_everything(&call).iter().for_each(assert_well_formed),
                Err(failure) => assert_well_formed(&failure),
            }
        }

        #[test]
        fn any_environment_gives_a_call_or_an_error_object(
            id in "\\PC{0,20}", ifname in "\\PC{0,20}", args in "[A-Z_0-9=;a-z]{0,60}", netns in "\\PC{0,20}",
        ) {
            let vars = [
                ("CNI_CONTAINERID", id.as_str()), ("CNI_IFNAME", &ifname), ("CNI_ARGS", &args), ("CNI_NETNS", &netns),
            ];
            match read(&vars, CONF.as_bytes()) {
                Ok(call) => {
                    let name = crate::pod::Names::of(&call).host_if("eni", 0);
                    prop_assert!(crate::spec::interface_name_problem(&name).is_none(), "{name}");
                }
                Err(failure) => assert_well_formed(&failure),
            }
        }
    }
}
