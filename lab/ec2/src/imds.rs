//! IMDSv2: tokens, and the metadata tree of one instance, drawn from EC2's state with a lag of its own.
//!
//! Absent things answer 404, and so do empty lists; a directory lists its entries, those that are directories with a
//! slash.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use flatwire_core::ids::{DeviceIndex, EniId, InstanceId, Time};

use crate::ec2::{Ec2, World};
use crate::state::history::Past;
use crate::view::{AttachmentState, Ending, EniInfo, InstanceState};

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TTL_MAX_SECS: u64 = 21_600;
/// What a spot instance is given between the notice and its end.
const SPOT_NOTICE_MS: u64 = 120_000;
/// What every token begins with.
const TOKEN_START: &str = "AQAAAE";

/// A request to the metadata service, from inside an instance.
#[derive(Debug, Clone, Copy)]
pub struct ImdsRequest<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub headers: &'a [(String, String)],
}

impl ImdsRequest<'_> {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImdsResponse {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// The time-to-live of the answer's packets: `HttpPutResponseHopLimit` for a token, else the kernel's default.
    pub ttl: Option<u32>,
}

impl ImdsResponse {
    fn plain(status: u16, body: impl Into<String>) -> Self {
        let headers = vec![("content-type".to_owned(), "text/plain".to_owned())];
        Self { status, headers, body: body.into(), ttl: None }
    }

    fn refused(status: u16) -> Self {
        let reason = match status {
            400 => "Bad Request",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            429 => "Too Many Requests",
            _ => "Service Unavailable",
        };
        Self::plain(status, format!("{status} - {reason}"))
    }
}

/// The metadata of one instance: values by path below `latest/`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imds {
    values: BTreeMap<String, String>,
}

impl Imds {
    fn put(&mut self, path: impl Into<String>, value: impl ToString) {
        self.values.insert(path.into(), value.to_string());
    }

    fn put_list<T: ToString>(&mut self, path: impl Into<String>, values: impl IntoIterator<Item = T>) {
        let lines: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
        if !lines.is_empty() {
            self.put(path, lines.join("\n"));
        }
    }

    /// The value at a path such as `meta-data/mac`, or a directory's listing; `None` for what is not there. A slash
    /// at the end changes nothing.
    pub fn get(&self, path: &str) -> Option<String> {
        let path = path.trim_matches('/');
        if let Some(value) = self.values.get(path) {
            return Some(value.clone());
        }
        let start = if path.is_empty() { String::new() } else { format!("{path}/") };
        let mut entries: Vec<String> = Vec::new();
        for rest in self.values.keys().filter_map(|key| key.strip_prefix(&start)) {
            let entry = match rest.split_once('/') {
                Some((directory, _)) => format!("{directory}/"),
                None => rest.to_owned(),
            };
            if entries.last() != Some(&entry) {
                entries.push(entry);
            }
        }
        (!entries.is_empty()).then(|| entries.join("\n"))
    }
}

impl Ec2 {
    /// What the metadata service shows to an instance now; `None` if there is no such instance.
    pub fn imds(&self, now: Time, instance: &InstanceId) -> Option<Imds> {
        self.with(now, |world| world.imds(now, instance))
    }

    /// One request of an instance to its metadata service.
    pub fn imds_request(&self, now: Time, instance: &InstanceId, request: &ImdsRequest<'_>) -> ImdsResponse {
        self.with(now, |world| world.imds_request(now, instance, request))
    }
}

impl World {
    fn imds_request(&mut self, now: Time, instance: &InstanceId, request: &ImdsRequest<'_>) -> ImdsResponse {
        if let Some(status) = self.faults.decide_imds(request.path) {
            return ImdsResponse::refused(status);
        }
        let Some(host) = self.state.instances.get(instance) else { return ImdsResponse::refused(404) };
        let (tokens_required, hop_limit) = (host.tokens_required, host.info.hop_limit);
        if request.path == TOKEN_PATH {
            return self.issue_token(now, instance, hop_limit, request);
        }
        if !matches!(request.method, "GET" | "HEAD") {
            return ImdsResponse::refused(405);
        }
        let token_is_good = match request.header(TOKEN_HEADER) {
            Some(token) => self.token_is_good(now, instance, token),
            None => !tokens_required,
        };
        if !token_is_good {
            return ImdsResponse::refused(401);
        }
        let found = self.imds(now, instance).and_then(|imds| imds.get(below_version(request.path)?));
        match found {
            Some(body) => ImdsResponse::plain(200, body),
            None => ImdsResponse::refused(404),
        }
    }

    fn issue_token(
        &mut self,
        now: Time,
        instance: &InstanceId,
        hop_limit: u32,
        request: &ImdsRequest<'_>,
    ) -> ImdsResponse {
        if request.method != "PUT" {
            return ImdsResponse::refused(405);
        }
        // A request that came through a proxy is refused, so that no proxy hands out somebody's identity.
        if request.header("x-forwarded-for").is_some() {
            return ImdsResponse::refused(403);
        }
        let ttl_secs = request.header(TTL_HEADER).and_then(|text| text.parse::<u64>().ok());
        let Some(ttl_secs) = ttl_secs.filter(|secs| (1..=TTL_MAX_SECS).contains(secs)) else {
            return ImdsResponse::refused(400);
        };
        let expires = now.plus_ms(ttl_secs * 1_000);
        let mut response = ImdsResponse::plain(200, self.token(instance, expires));
        response.headers.push((TTL_HEADER.to_owned(), ttl_secs.to_string()));
        response.ttl = Some(hop_limit);
        response
    }

    fn token(&self, instance: &InstanceId, expires: Time) -> String {
        let seal = self.access.digest(&format!("imds token {instance} {}", expires.0), 20);
        format!("{TOKEN_START}{:012x}{seal}", expires.0)
    }

    /// A token is good until it expires, and for the instance it was given to only.
    fn token_is_good(&self, now: Time, instance: &InstanceId, token: &str) -> bool {
        let expires = token
            .strip_prefix(TOKEN_START)
            .and_then(|rest| rest.get(..12))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok());
        expires.is_some_and(|expires| now.0 < expires && self.token(instance, Time(expires)) == token)
    }

    fn imds(&mut self, now: Time, id: &InstanceId) -> Option<Imds> {
        let instance = self.state.instances.get(id)?;
        let (info, reservation, index) = (instance.info.clone(), instance.reservation.clone(), instance.launch_index);
        let ending = instance.ending;
        if info.state == InstanceState::Terminated {
            return None;
        }
        let enis = self.enis_in_imds(now, id, info.launched_at);
        let primary = enis.iter().find(|(_, device, card)| *device == DeviceIndex::PRIMARY && *card == 0)?.0.clone();
        let credentials = info.role.clone().map(|role| (self.access.role_credentials(now, id, &role), role));
        let state = &self.state;
        let zone_id = state.subnets.get(&info.subnet).map(|subnet| subnet.zone.id.clone()).unwrap_or_default();
        let hostname = state.private_dns(primary.primary_ipv4);
        let mut imds = Imds::default();
        let mut meta = |path: &str, value: &str| imds.put(format!("meta-data/{path}"), value);
        meta("ami-id", &info.image);
        meta("ami-launch-index", &index.to_string());
        meta("hostname", &hostname);
        meta("instance-id", id.as_str());
        meta("instance-life-cycle", "on-demand");
        meta("instance-type", &info.instance_type);
        meta("local-hostname", &hostname);
        meta("local-ipv4", &primary.primary_ipv4.to_string());
        if let Some(ipv6) = primary.ipv6.first() {
            meta("ipv6", &ipv6.to_string());
        }
        meta("mac", &primary.mac.to_string());
        meta("placement/availability-zone", &info.availability_zone);
        meta("placement/availability-zone-id", &zone_id);
        meta("placement/region", &state.options.region);
        meta("profile", "default-hvm");
        meta("reservation-id", &reservation);
        meta("services/domain", "amazonaws.com");
        meta("services/partition", "aws");
        match ending {
            Some((Ending::Spot, at)) => {
                let time = seconds(at.plus_ms(SPOT_NOTICE_MS));
                let notice = serde_json::json!({ "action": "terminate", "time": time });
                meta("spot/instance-action", &notice.to_string());
            }
            Some((Ending::ScaleIn, _)) => meta("autoscaling/target-lifecycle-state", "Terminated"),
            None => {}
        }
        let group_names: Vec<&str> = primary
            .security_groups
            .iter()
            .filter_map(|group| state.groups.get(group))
            .map(|group| group.name.as_str())
            .collect();
        meta("security-groups", &group_names.join("\n"));
        if let Some(public) = primary.public.get(&primary.primary_ipv4) {
            imds.put("meta-data/public-ipv4", public);
            imds.put("meta-data/public-hostname", public_name(*public, &state.options.region));
        }
        if let Some((credentials, role)) = credentials {
            let account = &state.options.account_id;
            let info = serde_json::json!({
                "Code": "Success",
                "LastUpdated": seconds(credentials.issued),
                "InstanceProfileArn": format!("arn:aws:iam::{account}:instance-profile/{role}"),
                "InstanceProfileId": "AIPALAB00000000000000",
            });
            imds.put("meta-data/iam/info", pretty(&info));
            let keys = serde_json::json!({
                "Code": "Success",
                "LastUpdated": seconds(credentials.issued),
                "Type": "AWS-HMAC",
                "AccessKeyId": credentials.access_key,
                "SecretAccessKey": credentials.secret,
                "Token": credentials.token,
                "Expiration": seconds(credentials.expires),
            });
            imds.put(format!("meta-data/iam/security-credentials/{role}"), pretty(&keys));
        }
        let document = serde_json::json!({
            "accountId": state.options.account_id,
            "architecture": flatwire_core::limits::lookup(&info.instance_type)
                .and_then(|kind| kind.architectures.last().copied()).unwrap_or("x86_64"),
            "availabilityZone": info.availability_zone,
            "imageId": info.image,
            "instanceId": id,
            "instanceType": info.instance_type,
            "pendingTime": seconds(info.launched_at),
            "privateIp": primary.primary_ipv4,
            "region": state.options.region,
            "version": "2017-09-30",
        });
        imds.put("dynamic/instance-identity/document", pretty(&document));
        if let Some(user_data) = &info.user_data {
            imds.put("user-data", user_data);
        }
        for (eni, device, card) in &enis {
            self.put_eni(&mut imds, eni, *device, *card);
        }
        Some(imds)
    }

    /// The instance's ENIs as IMDS knows them: as they were a while ago. What an instance is born with it sees from
    /// the start.
    pub(crate) fn enis_in_imds(
        &self,
        now: Time,
        id: &InstanceId,
        launched: Time,
    ) -> Vec<(Arc<EniInfo>, DeviceIndex, u32)> {
        let moment = Time(now.0.saturating_sub(self.state.options.delays.imds_lag_ms));
        let here = self.state.enis().values().filter(|eni| eni.is_on(id)).map(|eni| &eni.id);
        let mut ids: Vec<_> = here.chain(self.state.history.ids()).collect();
        ids.sort();
        ids.dedup();
        let history = &self.state.history;
        let newborn = launched > moment;
        let seen = |eni: &EniId| {
            let eni = match history.at(eni, moment) {
                Past::Current => self.state.enis().get(eni).cloned().map(Arc::new),
                Past::Was(eni) => Some(eni),
                Past::Absent => None,
            };
            eni.filter(|eni| eni.is_on(id))
        };
        let mut enis: Vec<_> = ids
            .into_iter()
            .filter_map(|eni| seen(eni).or_else(|| newborn.then(|| history.born_on(eni, id, launched))?))
            .filter_map(|eni| {
                let attachment = eni.attachment.as_ref()?;
                let (device, card) = (attachment.device, attachment.card);
                let born = attachment.attached_at == launched;
                (born || attachment.state != AttachmentState::Attaching).then_some((eni, device, card))
            })
            .collect();
        enis.sort_by_key(|(_, device, card)| (*card, *device));
        enis
    }

    fn put_eni(&self, imds: &mut Imds, eni: &EniInfo, device: DeviceIndex, card: u32) {
        let state = &self.state;
        let base = format!("meta-data/network/interfaces/macs/{}", eni.mac);
        let at = |name: &str| format!("{base}/{name}");
        imds.put(at("device-number"), device);
        imds.put(at("interface-id"), &eni.id);
        imds.put_list(at("ipv4-prefix"), &eni.prefixes);
        imds.put_list(at("ipv6-prefix"), &eni.ipv6_prefixes);
        imds.put_list(at("ipv6s"), &eni.ipv6);
        imds.put(at("local-hostname"), state.private_dns(eni.primary_ipv4));
        imds.put_list(at("local-ipv4s"), std::iter::once(&eni.primary_ipv4).chain(&eni.secondary));
        imds.put(at("mac"), eni.mac);
        imds.put(at("network-card"), card);
        imds.put(at("network-card-index"), card);
        imds.put(at("owner-id"), &state.options.account_id);
        imds.put_list(at("public-ipv4s"), eni.public.values());
        for (private, public) in &eni.public {
            imds.put(at(&format!("ipv4-associations/{public}")), private);
        }
        imds.put_list(at("security-group-ids"), &eni.security_groups);
        let groups = eni.security_groups.iter().filter_map(|group| state.groups.get(group));
        imds.put_list(at("security-groups"), groups.map(|group| &group.name));
        imds.put(at("subnet-id"), &eni.subnet);
        if let Some(subnet) = state.subnets.get(&eni.subnet) {
            imds.put(at("subnet-ipv4-cidr-block"), subnet.cidr);
            imds.put_list(at("subnet-ipv6-cidr-blocks"), subnet.ipv6);
        }
        imds.put(at("vpc-id"), &eni.vpc);
        if let Some(vpc) = state.vpcs.get(&eni.vpc) {
            imds.put_list(at("vpc-ipv4-cidr-block"), vpc.cidrs.first().map(|association| association.cidr));
            imds.put_list(at("vpc-ipv4-cidr-blocks"), vpc.cidrs.iter().map(|association| association.cidr));
            imds.put_list(at("vpc-ipv6-cidr-blocks"), vpc.ipv6);
        }
    }
}

/// A path without its version, which is `latest` or a date.
fn below_version(path: &str) -> Option<&str> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let (version, rest) = path.split_once('/').unwrap_or((path, ""));
    let dated = version.len() == 10 && version.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    (version == "latest" || dated).then_some(rest)
}

fn public_name(public: Ipv4Addr, region: &str) -> String {
    let host = public.to_string().replace('.', "-");
    match region {
        "us-east-1" => format!("ec2-{host}.compute-1.amazonaws.com"),
        region => format!("ec2-{host}.{region}.compute.amazonaws.com"),
    }
}

fn seconds(moment: Time) -> String {
    crate::stamp(moment).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).expect("invariant: plain values have no keys that are not text")
}
