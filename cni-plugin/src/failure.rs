//! Everything that can go wrong, and the one place that gives it a CNI error code.
//!
//! | code | meaning here |
//! |---|---|
//! | 1 | the version of the configuration is unknown, or too old for the verb |
//! | 2 | a configuration key asks for something this plugin does not do; the message has key and value |
//! | 3 | ADD for a namespace that does not exist: nothing was made, no DEL is needed |
//! | 4 | an environment variable is missing or unusable; the message names it |
//! | 5 | reading standard input, or writing the release queue, failed |
//! | 6 | standard input does not decode |
//! | 7 | a configuration key has an unusable value |
//! | 11 | transient: no address yet, ipamd away or late; the same call may succeed later |
//! | 50 | STATUS: an ADD would fail now |
//! | 100 | ipamd refuses and says neither why nor that it will pass |
//! | 101 | the subnet has no free address |
//! | 102 | the subnet has no free /28 |
//! | 103 | EC2 denies an action to the node's role |
//! | 104 | the instance type carries no more addresses |
//! | 105 | cloud changes are switched off, or the node is on its way out |
//! | 106 | ipamd cannot write its journal |
//! | 107 | something is asked for that this version, or the daemon's, does not do |
//! | 108 | ipamd takes the request for wrong |
//! | 109 | ipamd's answer makes no sense |
//! | 110 | the kernel refused to set up or take down the pod |
//! | 111 | CHECK found a difference |
//! | 112 | ipamd knows nothing of this sandbox |
//! | 113 | the network policy agent refused, or is away |
//! | 114 | GC could not remove everything |
//! | 115 | a bug in this plugin |
//!
//! Code 51 is never given: pods that run keep their connectivity without ipamd, so its absence only stops new ones (50).

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use flatwire_core::error::chain;
use flatwire_kernel::KernelError;
use flatwire_proto::Reason;

use crate::daemon::POLICY_AGENT;
use crate::spec::{CniVersion, ErrorObject};

const TRY_AGAIN_LATER: u32 = 11;
const NOT_AVAILABLE: u32 = 50;

/// Why a verb fails. `Display` is the `msg` of the CNI error object: one sentence that names the thing.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("CNI version {given:?} of the network configuration is not supported")]
    Version { given: String },
    #[error("{verb} does not exist in CNI version {given}; it needs {needed}")]
    VerbTooNew { verb: &'static str, given: &'static str, needed: &'static str },
    #[error("network configuration key {key} = {value} is not supported")]
    UnsupportedField { key: String, value: String },
    #[error("CNI_NETNS {} does not exist", netns.display())]
    SandboxGone { netns: PathBuf },
    #[error("environment variable {variable} {problem}")]
    Environment { variable: String, problem: String },
    #[error("cannot read the network configuration from standard input")]
    Stdin { source: io::Error },
    #[error("cannot decode the network configuration: {problem}")]
    Decode { problem: String },
    #[error("network configuration key {key} {problem}")]
    Config { key: String, problem: String },
    #[error("{peer} does not answer on {}", socket.display())]
    PeerAway { peer: &'static str, socket: PathBuf, why: String },
    #[error("{peer} did not answer {call} within {after:?}")]
    PeerLate { peer: &'static str, call: &'static str, after: Duration },
    #[error("{peer} does not know the call {call}")]
    PeerTooOld { peer: &'static str, call: &'static str },
    #[error("{peer} refused {call}: {message}")]
    PeerRefused { peer: &'static str, call: &'static str, message: String },
    #[error("{message}")]
    Reason { reason: Reason, retryable: bool, message: String },
    #[error("ipamd answered {call} with {problem}")]
    Nonsense { call: &'static str, problem: String },
    #[error("pod {pod} asks for {wish}, which this version does not do")]
    NotOffered { pod: String, wish: &'static str },
    #[error("cannot {verb} the network of {pod}: {source}")]
    Kernel { verb: &'static str, pod: String, source: KernelError },
    #[error("the network of {pod} was not {done} within {after:?}")]
    KernelLate { done: &'static str, pod: String, after: Duration },
    #[error("{what}")]
    Difference { what: String },
    #[error("the network policy agent did not apply its policy to pod {pod}")]
    PolicyRefused { pod: String },
    #[error("cannot {operation} the release queue entry {}", path.display())]
    Queue { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("the address of {pod} could be released neither by ipamd nor through the release queue")]
    ReleaseLost { pod: String, daemon: Box<Failure>, queue: Box<Failure> },
    #[error("{} of the stale attachments could not be removed", errors.len())]
    Gc { errors: Vec<Failure> },
    #[error("no pod can be added now: {source}")]
    NotReady { source: Box<Failure> },
    #[error("aws-cni stopped on a bug: {message}")]
    Bug { message: String },
}

impl Failure {
    pub fn config(key: &str, problem: &str) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }

    pub fn environment(variable: &str, problem: impl Into<String>) -> Self {
        Self::Environment { variable: variable.into(), problem: problem.into() }
    }

    /// What the daemon said, or that it said nothing, as every daemon older than the field does. Those refuse mostly for
    /// want of an address, which passes.
    pub fn from_daemon(call: &'static str, failure: Option<flatwire_proto::Failure>) -> Self {
        let Some(failure) = failure else {
            return Self::Reason {
                reason: Reason::Unspecified,
                retryable: true,
                message: format!("ipamd refused {call} and gave no reason"),
            };
        };
        let reason = failure.reason();
        let message = match failure.message.as_str() {
            "" => format!("ipamd refused {call}: {}", reason.as_str_name()),
            text => text.to_owned(),
        };
        Self::Reason { reason, retryable: failure.retryable, message }
    }

    /// The daemon answered that the sandbox is unknown to it: for a release, done. The add-on says it in an error text.
    pub fn is_unknown_sandbox(&self) -> bool {
        match self {
            Self::Reason { reason, .. } => *reason == Reason::UnknownSandbox,
            Self::PeerRefused { message, .. } => message.contains("datastore: unknown pod"),
            _ => false,
        }
    }

    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::VerbTooNew { .. } => 1,
            Self::UnsupportedField { .. } => 2,
            Self::SandboxGone { .. } => 3,
            Self::Environment { .. } => 4,
            Self::Stdin { source } if source.kind() == io::ErrorKind::TimedOut => TRY_AGAIN_LATER,
            Self::Stdin { .. } | Self::Queue { .. } => 5,
            Self::Decode { .. } => 6,
            Self::Config { .. } => 7,
            Self::PeerAway { .. } | Self::PeerLate { .. } => TRY_AGAIN_LATER,
            Self::KernelLate { .. } | Self::ReleaseLost { .. } => TRY_AGAIN_LATER,
            Self::NotReady { .. } => NOT_AVAILABLE,
            Self::Reason { retryable: true, .. } => TRY_AGAIN_LATER,
            Self::Reason { reason, .. } => reason_code(*reason),
            Self::PeerTooOld { .. } | Self::NotOffered { .. } => 107,
            Self::PeerRefused { .. } => 100,
            Self::Nonsense { .. } => 109,
            Self::Kernel { source, .. } => kernel_code(source),
            Self::Difference { .. } => 111,
            Self::PolicyRefused { .. } => 113,
            Self::Gc { .. } => 114,
            Self::Bug { .. } => 115,
        }
    }

    /// The `details` of the error object: the cause where there is one, then what to do.
    fn details(&self) -> String {
        let advice = match self {
            Self::Version { .. } => {
                let known = CniVersion::ALL.map(CniVersion::text).join(", ");
                return format!("supported are {known}; set cniVersion in the network configuration to one of them");
            }
            Self::VerbTooNew { .. } => "raise cniVersion in the network configuration, or do not call the verb",
            Self::UnsupportedField { .. } => {
                "the address and MAC of a pod come from the VPC; remove the capability from the network configuration"
            }
            Self::SandboxGone { .. } => {
                "the sandbox ended before its network was set up; nothing was created for it, and the runtime makes a \
                 new one if the pod is still wanted"
            }
            Self::Environment { .. } => "this is a fault of the caller, the container runtime",
            Self::Stdin { .. } | Self::Decode { .. } => {
                "the container runtime passes the network configuration as a JSON object; see the conflist it uses"
            }
            Self::Config { .. } => {
                "correct the conflist on this node, or the setting of the daemon set it is written from"
            }
            Self::PeerAway { peer: POLICY_AGENT, why, .. } => {
                return format!(
                    "{why}; ipamd's NETWORK_POLICY_ENFORCING_MODE asks for it: run it on this node, or unset that where there \
                     is none"
                );
            }
            Self::PeerAway { why, .. } => {
                return format!(
                    "{why}; see whether the aws-node pod of this node runs and what its log says; pods that run are not \
                     affected, and the runtime tries again"
                );
            }
            Self::PeerLate { .. } | Self::KernelLate { .. } => {
                "the runtime tries again; if it stays so, see the ipamd log and the load of the node"
            }
            Self::PeerTooOld { .. } => "the daemon is older than this plugin, or the add-on's: upgrade it",
            Self::PeerRefused { .. } => "see the ipamd log of this node",
            Self::Reason { reason, .. } => reason_advice(*reason),
            Self::Nonsense { .. } => "daemon and plugin do not fit together: see that both are of the same version",
            Self::NotOffered { .. } => "remove the request from the pod, or run the pod on a node of the add-on",
            Self::Kernel { source, .. } => kernel_advice(source),
            Self::Difference { .. } => "the pod's network was changed since ADD; recreate the pod",
            Self::PolicyRefused { .. } => "see the log of the network policy agent on this node",
            Self::Queue { .. } => "see that the file system has room and is writable",
            Self::ReleaseLost { daemon, queue, .. } => {
                return format!("ipamd: {}; queue: {}; the runtime calls DEL again", chain(daemon), chain(queue));
            }
            Self::Gc { errors } => {
                let all: Vec<String> = errors.iter().map(|error| chain(error)).collect();
                return format!("everything else was removed; left over: {}", all.join("; "));
            }
            Self::NotReady { source } => return source.details(),
            Self::Bug { .. } => "report it with the plugin log of this node",
        };
        match self {
            Self::Stdin { source } | Self::Queue { source, .. } => format!("{source}; {advice}"),
            _ => advice.to_owned(),
        }
    }

    pub fn object(&self, version: CniVersion) -> ErrorObject<'static> {
        let msg = match self {
            Self::Kernel { verb, pod, source } => {
                format!("cannot {verb} the network of {pod}: {}", chain(source))
            }
            other => other.to_string(),
        };
        ErrorObject { cni_version: version.text(), code: self.code(), msg, details: self.details() }
    }
}

/// Codes of the reasons when the daemon does not expect them to pass. Those that pass by nature stay "try again later".
fn reason_code(reason: Reason) -> u32 {
    match reason {
        Reason::Starting
        | Reason::Assigning
        | Reason::Attaching
        | Reason::Cooling
        | Reason::Throttled
        | Reason::CloudUnavailable => TRY_AGAIN_LATER,
        Reason::Unspecified => 100,
        Reason::SubnetEmpty => 101,
        Reason::Fragmented => 102,
        Reason::Denied => 103,
        Reason::InstanceLimit => 104,
        Reason::ProvisioningDisabled => 105,
        Reason::Ledger => 106,
        Reason::Unsupported => 107,
        Reason::InvalidRequest => 108,
        Reason::UnknownSandbox => 112,
    }
}

fn reason_advice(reason: Reason) -> &'static str {
    match reason {
        Reason::Unspecified => "see the ipamd log of this node",
        Reason::Starting => "the daemon has just started; the runtime tries again",
        Reason::Assigning => "addresses are on their way from EC2; the runtime tries again",
        Reason::Attaching => "a network interface is being attached; the runtime tries again",
        Reason::Cooling => "addresses come back when their cool-down ends; the runtime tries again",
        Reason::SubnetEmpty => "free addresses in the subnet, or give the node another subnet",
        Reason::Fragmented => {
            "reserve a CIDR for prefixes in the subnet, use another subnet, or let single addresses be used"
        }
        Reason::Throttled => "EC2 limits the rate of calls of this account; the daemon slows down and goes on",
        Reason::Denied => "add the named action to the policy of the node's or the service account's role",
        Reason::InstanceLimit => "lower the number of pods on this node, use prefixes, or a larger instance type",
        Reason::CloudUnavailable => "see whether the node reaches the EC2 endpoint and IMDS; the daemon tries on",
        Reason::ProvisioningDisabled => "an operator, or the end of this node, stopped cloud changes; use another node",
        Reason::InvalidRequest => "this is a fault of the caller, the container runtime",
        Reason::Ledger => "see that the daemon's state folder has room and is writable, and what its log says",
        Reason::UnknownSandbox => "the daemon holds no address for this sandbox; recreate the pod",
        Reason::Unsupported => "remove the request from the pod, or upgrade the daemon",
    }
}

/// The spec asks for an error when the interface name is in use and gives it no code: it is the variable that cannot be
/// used, so 4.
fn kernel_code(error: &KernelError) -> u32 {
    match error {
        KernelError::PodInterfaceTaken { .. } | KernelError::NotANetns { .. } => 4,
        KernelError::NetnsMissing { .. } => 3,
        KernelError::Timeout { .. } | KernelError::Torn { .. } => TRY_AGAIN_LATER,
        _ => 110,
    }
}

fn kernel_advice(error: &KernelError) -> &'static str {
    match error {
        KernelError::PodInterfaceTaken { .. } => {
            "CNI_IFNAME must be free in the sandbox: another network of the pod, or an earlier ADD without DEL, has it"
        }
        KernelError::NotANetns { .. } | KernelError::NetnsMissing { .. } => "CNI_NETNS must name a network namespace",
        KernelError::HostInterfaceTaken { .. } => "a foreign interface has the name of this pod's: rename or remove it",
        KernelError::Denied { .. } => "the container runtime must run its plugins as root with all capabilities",
        _ => "what was made for this call has been undone; see the kernel log of this node",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(reason: Reason, retryable: bool) -> Failure {
        Failure::Reason { reason, retryable, message: "m".into() }
    }

    #[test]
    fn a_retryable_reason_is_try_again_later_whatever_it_is() {
        for number in 0..=15 {
            let any = Reason::try_from(number).unwrap();
            assert_eq!(reason(any, true).code(), TRY_AGAIN_LATER, "{any:?}");
        }
    }

    #[test]
    fn permanent_reasons_have_codes_of_their_own() {
        let table = [
            (Reason::Unspecified, 100),
            (Reason::Starting, 11),
            (Reason::Assigning, 11),
            (Reason::Attaching, 11),
            (Reason::Cooling, 11),
            (Reason::SubnetEmpty, 101),
            (Reason::Fragmented, 102),
            (Reason::Throttled, 11),
            (Reason::Denied, 103),
            (Reason::InstanceLimit, 104),
            (Reason::CloudUnavailable, 11),
            (Reason::ProvisioningDisabled, 105),
            (Reason::InvalidRequest, 108),
            (Reason::Ledger, 106),
            (Reason::UnknownSandbox, 112),
            (Reason::Unsupported, 107),
        ];
        for (cause, code) in table {
            assert_eq!(reason(cause, false).code(), code, "{cause:?}");
        }
    }

    #[test]
    fn a_daemon_without_reasons_is_taken_for_short_of_addresses() {
        let failure = Failure::from_daemon("AddNetwork", None);
        assert_eq!(failure.code(), TRY_AGAIN_LATER);
        assert!(failure.to_string().contains("AddNetwork"));
    }

    #[test]
    fn the_object_carries_cause_and_advice() {
        let source = io::Error::from_raw_os_error(28);
        let failure = Failure::Queue { operation: "write", path: "/q/x.json".into(), source };
        let object = failure.object(CniVersion::V1_0_0);
        assert_eq!((object.cni_version, object.code), ("1.0.0", 5));
        assert!(object.msg.contains("/q/x.json"), "{}", object.msg);
        assert!(object.details.contains("No space left"), "{}", object.details);
    }
}
