//! The cloud's body for one node: requests of the core carried to the lab's EC2, page by page, and its words brought back
//! as the core's.

use std::collections::BTreeSet;
use std::collections::VecDeque;

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, Time};
use flatwire_core::pool::OpId;
use flatwire_core::ports::{CloudError, CloudErrorKind, CloudReply, CloudRequest, Metadata};
use ipnet::IpNet;
use lab_ec2::{Answered, ApiError, Caller, Ec2, PageAsked};

use crate::dice::Dice;

/// One node's way to EC2 and IMDS.
#[derive(Debug, Clone)]
pub struct Cloud {
    pub caller: Caller,
    pub instance: InstanceId,
    /// `MaxResults` of every describe: small, so that whoever forgets the next page sees only part.
    pub page_size: u32,
    /// How far EC2's describes are behind, as the world has set it.
    pub describe_lag_ms: u64,
    /// IMDS leaves things out at times.
    pub imds_partial: bool,
    /// IMDS shows this, whatever has happened since.
    pub imds_stands: Option<Metadata>,
}

/// A request on its way.
#[derive(Debug, Clone)]
pub struct Call {
    pub op: OpId,
    /// Of the daemon that asked; a later one does not hear the answer.
    pub life: u32,
    /// The request, as the EC2 calls it takes.
    parts: VecDeque<CloudRequest>,
    token: Option<String>,
    so_far: Option<CloudReply>,
    pub started: Time,
    /// The moment that the first page shows.
    read_at: Option<Time>,
}

/// Where a call stands after EC2 has seen a part of it.
#[derive(Debug)]
pub enum Reached {
    /// There is more to ask.
    Goes(Call),
    /// With the moment that a reading shows.
    Ends(Result<CloudReply, CloudError>, Option<Time>),
}

impl Call {
    pub fn new(op: OpId, life: u32, request: CloudRequest, now: Time) -> Self {
        Self { op, life, parts: parts(request), token: None, so_far: None, started: now, read_at: None }
    }

    /// What is asked next.
    pub fn request(&self) -> &CloudRequest {
        self.parts.front().expect("invariant: a call ends with its last part")
    }
}

/// EC2 takes addresses and prefixes by name in calls of their own.
fn parts(request: CloudRequest) -> VecDeque<CloudRequest> {
    let CloudRequest::AssignNamed { eni, slots } = &request else { return VecDeque::from([request]) };
    let (single, prefixes): (BTreeSet<IpNet>, BTreeSet<IpNet>) = slots.iter().partition(|slot| slot.prefix_len() == 32);
    let named = [single, prefixes].into_iter().filter(|slots| !slots.is_empty());
    named.map(|slots| CloudRequest::AssignNamed { eni: eni.clone(), slots }).collect()
}

impl Cloud {
    /// The next part of the call reaches EC2 (or IMDS) now. Also gives what was injected, and how much later to answer.
    pub fn reach(&self, now: Time, ec2: &Ec2, mut call: Call, dice: &mut Dice) -> (Reached, Met) {
        let action = call.request().action();
        let read_at = *call.read_at.get_or_insert(Time(now.0.saturating_sub(self.describe_lag_ms)));
        if matches!(call.request(), CloudRequest::ReadMetadata) {
            let read = ec2.metadata(now, &self.instance).map(|m| self.imds_stands.clone().unwrap_or(m));
            let result = read.map(|m| CloudReply::Metadata(self.as_seen(m, dice))).map_err(|e| error(action, e));
            return (Reached::Ends(result, None), Met::default());
        }
        let page = PageAsked { size: Some(self.page_size), token: call.token.as_deref() };
        let Answered { result, next_token, lost, broken, delay_ms } =
            ec2.call(now, &self.caller, call.request(), &page);
        let met = Met { lost, broken, delay_ms };
        if broken {
            return (Reached::Ends(Err(connection(action, "the connection broke before the answer")), None), met);
        }
        let reached = match result {
            Err(refusal) => Reached::Ends(Err(error(action, refusal)), None),
            Ok(reply) => {
                call.so_far = Some(join(call.so_far.take(), reply));
                call.token = next_token;
                follow(call, read_at)
            }
        };
        (reached, met)
    }

    /// A list that IMDS has not finished making: an ENI or some of its addresses are not in it yet.
    fn as_seen(&self, mut metadata: Metadata, dice: &mut Dice) -> Metadata {
        if self.imds_partial && dice.one_in(2) {
            metadata.enis.retain(|eni| eni.device == DeviceIndex::PRIMARY || !dice.one_in(3));
            for eni in &mut metadata.enis {
                if dice.one_in(3) {
                    eni.slots.retain(|_| !dice.one_in(2));
                }
            }
        }
        metadata
    }
}

/// An answer is whole when there is no further page and no further part; else the next is asked for.
fn follow(mut call: Call, read_at: Time) -> Reached {
    if call.token.is_none() {
        call.parts.pop_front();
    }
    match (call.parts.is_empty(), call.so_far.take()) {
        (true, Some(whole)) => Reached::Ends(Ok(whole), Some(read_at)),
        (_, so_far) => Reached::Goes(Call { so_far, ..call }),
    }
}

/// Two pages, or two parts, as one.
fn join(so_far: Option<CloudReply>, reply: CloudReply) -> CloudReply {
    match (so_far, reply) {
        (Some(CloudReply::Enis(mut all)), CloudReply::Enis(more)) => {
            all.extend(more);
            CloudReply::Enis(all)
        }
        (Some(CloudReply::Subnets(mut all)), CloudReply::Subnets(more)) => {
            all.extend(more);
            CloudReply::Subnets(all)
        }
        (Some(CloudReply::Assigned(mut all)), CloudReply::Assigned(more)) => {
            all.extend(more);
            CloudReply::Assigned(all)
        }
        (_, reply) => reply,
    }
}

/// What was done to a call on its way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Met {
    /// Carried out, and the answer does not say so.
    pub lost: bool,
    pub broken: bool,
    pub delay_ms: u64,
}

fn error(action: &str, from: ApiError) -> CloudError {
    CloudError {
        kind: CloudErrorKind::classify(action, &from.code, &from.message),
        action: action.to_owned(),
        code: from.code,
        message: from.message,
        request_id: None,
    }
}

/// No answer came: the call may have happened.
pub fn connection(action: &str, message: &str) -> CloudError {
    CloudError {
        kind: CloudErrorKind::Transient,
        action: action.to_owned(),
        code: "Connection".to_owned(),
        message: message.to_owned(),
        request_id: None,
    }
}

/// The ENI a request changes, if it changes one that exists.
pub fn mutated(request: &CloudRequest) -> Option<&EniId> {
    match request {
        CloudRequest::AttachEni { eni, .. }
        | CloudRequest::SetDeleteOnTermination { eni, .. }
        | CloudRequest::SetSecurityGroups { eni, .. }
        | CloudRequest::Assign { eni, .. }
        | CloudRequest::AssignNamed { eni, .. }
        | CloudRequest::AssignIpv6Prefix { eni, .. }
        | CloudRequest::Unassign { eni, .. }
        | CloudRequest::DetachEni { eni, .. }
        | CloudRequest::DeleteEni { eni }
        | CloudRequest::TagEni { eni, .. } => Some(eni),
        CloudRequest::ReadMetadata
        | CloudRequest::DescribeInstanceType { .. }
        | CloudRequest::DescribeNode { .. }
        | CloudRequest::DescribeEni { .. }
        | CloudRequest::DescribeUnattached { .. }
        | CloudRequest::DescribeSubnets { .. }
        | CloudRequest::CreateEni { .. } => None,
    }
}

/// The request in a few words.
pub fn words(request: &CloudRequest) -> String {
    let action = request.action();
    match request {
        CloudRequest::Assign { eni, want } => format!("{action} {eni} {want}"),
        CloudRequest::AssignNamed { eni, slots } | CloudRequest::Unassign { eni, slots } => {
            format!("{action} {eni} {}", list(slots))
        }
        CloudRequest::AssignIpv6Prefix { eni, prefix } => match prefix {
            Some(prefix) => format!("{action} {eni} {prefix}"),
            None => format!("{action} {eni} one prefix"),
        },
        CloudRequest::CreateEni { subnet, want, client_token, .. } => {
            format!("{action} in {subnet} with {want} ({client_token})")
        }
        CloudRequest::AttachEni { eni, device, .. } => format!("{action} {eni} as device {device}"),
        CloudRequest::DescribeEni { eni }
        | CloudRequest::SetDeleteOnTermination { eni, .. }
        | CloudRequest::SetSecurityGroups { eni, .. }
        | CloudRequest::DetachEni { eni, .. }
        | CloudRequest::DeleteEni { eni }
        | CloudRequest::TagEni { eni, .. } => format!("{action} {eni}"),
        CloudRequest::DescribeNode { .. } => format!("{action} of the node"),
        CloudRequest::DescribeUnattached { .. } => format!("{action} unattached"),
        CloudRequest::ReadMetadata
        | CloudRequest::DescribeInstanceType { .. }
        | CloudRequest::DescribeSubnets { .. } => action.to_owned(),
    }
}

pub fn list<T: ToString>(of: impl IntoIterator<Item = T>) -> String {
    of.into_iter().map(|one| one.to_string()).collect::<Vec<_>>().join(" ")
}

/// The answer in a few words.
pub fn outcome(result: &Result<CloudReply, CloudError>) -> String {
    match result {
        Err(error) => format!("{} ({:?})", error.code, error.kind),
        Ok(CloudReply::Assigned(slots)) => list(slots),
        Ok(CloudReply::Created(eni)) => format!("{} with {}", eni.id, list(&eni.slots)),
        Ok(CloudReply::Eni(eni)) => format!("{:?} {}", eni.status, list(&eni.slots)),
        Ok(CloudReply::Enis(enis)) => {
            let each = enis.iter().map(|eni| format!("{}:{:?}:{}", eni.id, eni.status, eni.slots.len()));
            if enis.is_empty() { "none".to_owned() } else { list(each) }
        }
        Ok(CloudReply::Metadata(m)) => list(m.enis.iter().map(|eni| format!("{}:{}", eni.id, eni.slots.len()))),
        Ok(CloudReply::Attached { attachment }) => attachment.to_string(),
        Ok(CloudReply::Subnets(subnets)) => list(subnets.iter().map(|s| format!("{}:{} free", s.id, s.free_addresses))),
        Ok(CloudReply::InstanceType(_) | CloudReply::Done) => "ok".to_owned(),
    }
}
