//! The front of the lab's EC2: one lock around the state, and around each call what EC2 puts around it (faults,
//! throttle, permission, then the action).

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flatwire_core::ids::{AttachmentId, DeviceIndex, EniId, InstanceId, SecurityGroupId, SubnetId, Time, VpcId};
use flatwire_core::ports::{CloudRequest, Metadata};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::access::{Access, Caller, Credentials, unauthorized};
use crate::actions::{self, Call};
use crate::error::ApiError;
use crate::faults::{Injector, Outcome};
use crate::options::{Buckets, Delays, Faults, Options, UNFILTERED};
use crate::params::{Params, Reader};
use crate::policy;
use crate::sigv4::SignedRequest;
use crate::state::State;
use crate::state::eni::{NewEni, Wanted};
use crate::state::instance::{Interface, Launch};
use crate::state::ipv6::{Taken6, Wanted6};
use crate::typed::{Answered, PageAsked};
use crate::view::{Ending, EniInfo, Tags, View};
use crate::xml;

/// The answer to one Query API request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// XML.
    pub body: String,
    pub request_id: String,
    /// To be sent so much later.
    pub delay_ms: u64,
    /// Not to be sent at all: the connection breaks instead.
    pub broken: bool,
}

/// How often an action was called.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallCount {
    pub ok: u64,
    pub errors: u64,
}

/// What the lab asks for when it starts a node itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunInstance {
    /// An image id; any text will do.
    pub ami: Option<String>,
    pub instance_type: String,
    pub subnet: SubnetId,
    /// Empty for the VPC's default group.
    pub groups: Vec<SecurityGroupId>,
    /// Prefixes of the primary ENI from birth.
    pub ipv4_prefix_count: u32,
    pub secondary_private_ip_address_count: u32,
    pub ipv6_address_count: u32,
    pub ipv6_prefix_count: u32,
    /// With a public address for the primary private one.
    pub public_ip: bool,
    /// The `Name` tag.
    pub name: String,
    pub tags: Tags,
    /// Of IMDS answers; 2 lets pods read them.
    pub hop_limit: u32,
    /// The instance role; `None` for an instance without credentials.
    pub role: Option<String>,
}

impl RunInstance {
    pub fn new(instance_type: impl Into<String>, subnet: SubnetId) -> Self {
        Self {
            ami: None,
            instance_type: instance_type.into(),
            subnet,
            groups: Vec::new(),
            ipv4_prefix_count: 0,
            secondary_private_ip_address_count: 0,
            ipv6_address_count: 0,
            ipv6_prefix_count: 0,
            public_ip: false,
            name: String::new(),
            tags: Tags::new(),
            hop_limit: 2,
            role: Some(crate::access::NODE_ROLE.to_owned()),
        }
    }
}

type Hook = Arc<dyn Fn() + Send + Sync>;

/// One account in one region.
pub struct Ec2 {
    world: Mutex<World>,
    hooks: Mutex<Vec<Hook>>,
}

pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) access: Access,
    pub(crate) faults: Injector,
    calls: BTreeMap<(String, String), CallCount>,
}

impl Ec2 {
    pub fn new(options: Options) -> Self {
        let access = Access::new(options.seed, &options.account_id);
        let faults = Injector::new(options.seed);
        let world = World { state: State::new(options), access, faults, calls: BTreeMap::new() };
        Self { world: Mutex::new(world), hooks: Mutex::new(Vec::new()) }
    }

    /// A panic under the lock fails the test that caused it; others may still look.
    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the state as of `now` and tells those who watch if anything changed.
    pub(crate) fn with<T>(&self, now: Time, f: impl FnOnce(&mut World) -> T) -> T {
        let (result, changed) = {
            let mut world = self.lock();
            let before = world.state.version;
            world.state.advance(now);
            let result = f(&mut world);
            (result, world.state.version != before)
        };
        if changed {
            let hooks = self.hooks.lock().unwrap_or_else(PoisonError::into_inner).clone();
            hooks.iter().for_each(|hook| hook());
        }
        result
    }

    /// One Query API action of a caller who has been authenticated.
    pub fn query(&self, now: Time, caller: &Caller, params: &Params) -> Response {
        self.with(now, |world| world.query(now, caller, params))
    }

    /// The same action without the wire: a request of the core's port, answered in its words. IMDS is not EC2: see
    /// `metadata`.
    pub fn call(&self, now: Time, caller: &Caller, request: &CloudRequest, page: &PageAsked<'_>) -> Answered {
        self.with(now, |world| world.call(now, caller, request, page))
    }

    /// What the metadata service shows to an instance, as its readers put it together.
    pub fn metadata(&self, now: Time, instance: &InstanceId) -> Result<Metadata, ApiError> {
        self.with(now, |world| world.metadata(now, instance))
    }

    /// The ENIs as they are, without any lag, without a copy.
    pub fn with_enis<T>(&self, now: Time, look: impl FnOnce(&BTreeMap<EniId, EniInfo>) -> T) -> T {
        self.with(now, |world| look(world.state.enis()))
    }

    /// Addresses of a subnet that may be picked, and whether a /28 may be; `None` if there is no such subnet.
    pub fn room(&self, now: Time, subnet: &SubnetId) -> Option<(u32, bool)> {
        self.with(now, |world| {
            let mut pool = world.state.subnets.get(subnet)?.pool.clone();
            let addresses = pool.available();
            Some((addresses, pool.pick_prefix(&mut crate::rng::Rng::new(0)).is_some()))
        })
    }

    /// Who signed the request; refused in EC2's words if nobody did, or wrongly, or too long ago.
    pub fn authenticate(&self, now: Time, request: &SignedRequest<'_>) -> Result<Caller, ApiError> {
        self.with(now, |world| {
            let region = world.state.options.region.clone();
            world.access.authenticate(now, &region, request)
        })
    }

    /// The answer to a request that did not get as far as an action.
    pub fn refuse(&self, now: Time, error: &ApiError, params: &Params) -> Response {
        self.with(now, |world| {
            let request_id = world.state.rng.uuid();
            refusal(error, params, request_id)
        })
    }

    /// Carries out the asynchronous changes that are due.
    pub fn advance(&self, now: Time) {
        self.with(now, |_| ());
    }

    /// When the next asynchronous change is due.
    pub fn next_transition(&self) -> Option<Time> {
        self.lock().state.next_transition()
    }

    /// Everything as plain data, without any lag.
    pub fn view(&self, now: Time) -> View {
        self.with(now, |world| world.state.view(now))
    }

    /// Grows with every change.
    pub fn version(&self) -> u64 {
        self.lock().state.version
    }

    /// `f` is called after each change, outside the lock and on the thread that made the change.
    pub fn on_change(&self, f: Box<dyn Fn() + Send + Sync>) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::from(f));
    }

    /// Calls per action, of everybody.
    pub fn calls(&self) -> BTreeMap<String, CallCount> {
        self.count_calls(|_| true)
    }

    /// Calls per action, of one access key.
    pub fn calls_of(&self, access_key: &str) -> BTreeMap<String, CallCount> {
        self.count_calls(|key| key == access_key)
    }

    fn count_calls(&self, of: impl Fn(&str) -> bool) -> BTreeMap<String, CallCount> {
        let mut sum: BTreeMap<String, CallCount> = BTreeMap::new();
        for ((key, action), count) in &self.lock().calls {
            if of(key) {
                let total = sum.entry(action.clone()).or_default();
                total.ok += count.ok;
                total.errors += count.errors;
            }
        }
        sum
    }

    pub fn region(&self) -> String {
        self.lock().state.options.region.clone()
    }

    pub fn account_id(&self) -> String {
        self.lock().state.options.account_id.clone()
    }

    /// Credentials of an administrator, made from the seed.
    pub fn admin(&self) -> Credentials {
        self.lock().access.admin()
    }

    pub fn add_credentials(&self, credentials: Credentials) {
        self.lock().access.add(credentials);
    }

    /// What an instance role may do; `None` allows everything. Holds for credentials handed out before, too.
    pub fn set_role(&self, role: &str, allow: Option<std::collections::BTreeSet<String>>) {
        self.lock().access.set_role(role, allow);
    }

    /// As `set_role`, by a policy that looks at resources and tags as well.
    pub fn set_role_policy(&self, role: &str, policy: crate::Policy) {
        self.lock().access.set_policy(role, policy);
    }

    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults.set(faults);
    }

    pub fn set_delays(&self, delays: Delays) {
        self.lock().state.options.delays = delays;
    }

    /// How far `Describe*` is behind from now on. What changed before is seen as it is.
    pub fn set_describe_lag(&self, ms: u64) {
        self.lock().state.options.describe_lag_ms = ms;
    }

    pub fn set_throttle(&self, buckets: Option<Buckets>) {
        self.lock().state.throttle.set(buckets);
    }

    /// Others in the account use up so many thousandths of every bucket's refill, all the time.
    pub fn share_buckets(&self, per_mille: u32) {
        self.lock().state.throttle.share(per_mille);
    }

    /// Somebody else in the account makes so many calls: the bucket is not all ours.
    pub fn drain(&self, now: Time, action: &str, calls: u32) {
        let mutating = actions::find(action).is_none_or(|action| action.mutating);
        self.lock().state.throttle.drain(now, action, mutating, calls);
    }

    // What follows is the same code as behind the actions, for the lab itself: no permission, no throttle, no faults.

    pub fn create_vpc(&self, now: Time, cidr: Ipv4Net, name: &str) -> Result<VpcId, ApiError> {
        self.with(now, |world| world.state.create_vpc(cidr, name_tag(name)))
    }

    pub fn associate_vpc_cidr(&self, now: Time, vpc: &VpcId, cidr: Ipv4Net) -> Result<(), ApiError> {
        self.with(now, |world| world.state.associate_cidr(vpc, cidr).map(drop))
    }

    /// Gives the VPC its IPv6 block, a /56.
    pub fn give_vpc_ipv6(&self, now: Time, vpc: &VpcId) -> Result<Ipv6Net, ApiError> {
        self.with(now, |world| world.state.give_vpc_ipv6(vpc))
    }

    /// Gives the subnet its IPv6 block, a /64 of the VPC's.
    pub fn give_subnet_ipv6(&self, now: Time, subnet: &SubnetId, block: Ipv6Net) -> Result<(), ApiError> {
        self.with(now, |world| world.state.give_subnet_ipv6(subnet, block))
    }

    /// `zone` is a zone's name or id; the region's first if it is not given.
    pub fn create_subnet(
        &self,
        now: Time,
        vpc: &VpcId,
        cidr: Ipv4Net,
        zone: Option<&str>,
        tags: Tags,
    ) -> Result<SubnetId, ApiError> {
        self.with(now, |world| world.state.create_subnet(vpc, cidr, zone, tags))
    }

    pub fn create_security_group(&self, now: Time, vpc: &VpcId, name: &str) -> Result<SecurityGroupId, ApiError> {
        self.with(now, |world| world.state.create_group(vpc, name, name, name_tag(name)))
    }

    /// Lets everybody reach the members of the group that the VPC was born with.
    pub fn open_default_group(&self, now: Time, vpc: &VpcId) -> Result<(), ApiError> {
        self.with(now, |world| world.state.open_default_group(vpc))
    }

    /// Creates an internet gateway and attaches it; its id.
    pub fn create_internet_gateway(&self, now: Time, vpc: &VpcId) -> Result<String, ApiError> {
        self.with(now, |world| {
            world.state.vpc(vpc)?;
            let id = world.state.create_gateway(Tags::new());
            world.state.attach_gateway(&id, vpc)?;
            Ok(id)
        })
    }

    /// Requests a peering connection and accepts it; its id.
    pub fn peer_vpcs(&self, now: Time, a: &VpcId, b: &VpcId) -> Result<String, ApiError> {
        self.with(now, |world| {
            let id = world.state.request_peering(a, b, Tags::new())?;
            world.state.accept_peering(&id)?;
            Ok(id)
        })
    }

    pub fn run_instance(&self, now: Time, run: &RunInstance) -> Result<InstanceId, ApiError> {
        self.with(now, |world| {
            let wanted = Wanted {
                count: run.secondary_private_ip_address_count,
                prefix_count: run.ipv4_prefix_count,
                ipv6: Wanted6 {
                    count: run.ipv6_address_count,
                    prefix_count: run.ipv6_prefix_count,
                    ..Wanted6::default()
                },
                ..Wanted::default()
            };
            let mut tags = run.tags.clone();
            tags.extend(name_tag(&run.name));
            let launch = Launch {
                image: run.ami.clone().unwrap_or_else(|| "ami-00000000".to_owned()),
                instance_type: run.instance_type.clone(),
                min: 1,
                max: 1,
                interfaces: vec![Interface {
                    device: DeviceIndex::PRIMARY,
                    card: 0,
                    existing: None,
                    subnet: Some(run.subnet.clone()),
                    groups: run.groups.clone(),
                    description: String::new(),
                    primary: None,
                    wanted,
                    public: Some(run.public_ip),
                    delete_on_termination: true,
                    interface_type: "interface".to_owned(),
                }],
                tags,
                eni_tags: Tags::new(),
                hop_limit: run.hop_limit,
                tokens_required: true,
                role: run.role.clone(),
                client_token: None,
                key_name: None,
                user_data: None,
            };
            world.state.launch(now, &launch)?.pop().ok_or_else(ApiError::internal)
        })
    }

    pub fn terminate_instance(&self, now: Time, instance: &InstanceId) -> Result<(), ApiError> {
        self.with(now, |world| world.state.terminate(now, instance).map(drop))
    }

    /// The instance's metadata service announces its end; the end itself is `terminate_instance`.
    pub fn announce_end(&self, now: Time, instance: &InstanceId, ending: Ending) -> Result<(), ApiError> {
        self.with(now, |world| world.state.announce_end(now, instance, ending))
    }

    pub fn create_eni(
        &self,
        now: Time,
        subnet: &SubnetId,
        groups: &[SecurityGroupId],
        description: &str,
        tags: Tags,
    ) -> Result<EniId, ApiError> {
        let new = NewEni {
            subnet: subnet.clone(),
            groups: groups.to_vec(),
            description: description.to_owned(),
            primary: None,
            wanted: Wanted::default(),
            tags,
            interface_type: "interface".to_owned(),
        };
        self.with(now, |world| world.state.create_eni(now, new))
    }

    pub fn attach_eni(
        &self,
        now: Time,
        eni: &EniId,
        instance: &InstanceId,
        device: DeviceIndex,
        card: u32,
    ) -> Result<AttachmentId, ApiError> {
        self.with(now, |world| world.state.attach(now, eni, instance, device, card))
    }

    pub fn detach_eni(&self, now: Time, attachment: &AttachmentId) -> Result<(), ApiError> {
        self.with(now, |world| world.state.detach(now, attachment, false))
    }

    pub fn delete_eni(&self, now: Time, eni: &EniId) -> Result<(), ApiError> {
        self.with(now, |world| world.state.delete_eni(now, eni))
    }

    /// Assigns so many random addresses.
    pub fn assign_addresses(&self, now: Time, eni: &EniId, count: u32) -> Result<Vec<Ipv4Addr>, ApiError> {
        let wanted = Wanted { count, ..Wanted::default() };
        self.with(now, |world| world.state.assign(now, eni, &wanted, false))
            .map(|taken| taken.addresses.into_iter().collect())
    }

    /// Assigns so many random prefixes.
    pub fn assign_prefixes(&self, now: Time, eni: &EniId, count: u32) -> Result<Vec<Ipv4Net>, ApiError> {
        let wanted = Wanted { prefix_count: count, ..Wanted::default() };
        self.with(now, |world| world.state.assign(now, eni, &wanted, false))
            .map(|taken| taken.prefixes.into_iter().collect())
    }

    /// Assigns so many random /80s.
    pub fn assign_ipv6_prefixes(&self, now: Time, eni: &EniId, count: u32) -> Result<Vec<Ipv6Net>, ApiError> {
        let wanted = Wanted6 { prefix_count: count, ..Wanted6::default() };
        self.with(now, |world| world.state.assign_ipv6(now, eni, &wanted))
            .map(|taken| taken.prefixes.into_iter().collect())
    }

    pub fn unassign_ipv6_prefixes(&self, now: Time, eni: &EniId, prefixes: &[Ipv6Net]) -> Result<(), ApiError> {
        let gone = Taken6 { prefixes: prefixes.iter().copied().collect(), ..Taken6::default() };
        self.with(now, |world| world.state.unassign_ipv6(now, eni, &gone))
    }

    pub fn unassign(
        &self,
        now: Time,
        eni: &EniId,
        addresses: &[Ipv4Addr],
        prefixes: &[Ipv4Net],
    ) -> Result<(), ApiError> {
        self.with(now, |world| world.state.unassign(now, eni, addresses, prefixes))
    }

    pub fn set_source_dest_check(&self, now: Time, eni: &EniId, check: bool) -> Result<(), ApiError> {
        self.with(now, |world| {
            world.state.eni(eni)?;
            world.state.change_eni(now, eni, |eni| eni.source_dest_check = check);
            Ok(())
        })
    }

    pub fn set_tags(&self, now: Time, resource: &str, tags: &Tags) -> Result<(), ApiError> {
        self.with(now, |world| world.state.change_tags(now, &[resource], |old| old.extend(tags.clone())))
    }
}

fn name_tag(name: &str) -> Tags {
    if name.is_empty() { Tags::new() } else { Tags::from([("Name".to_owned(), name.to_owned())]) }
}

impl World {
    fn query(&mut self, now: Time, caller: &Caller, params: &Params) -> Response {
        let request_id = self.state.rng.uuid();
        let action = params.action().to_owned();
        let (outcome, result) = self.meet(&action, caller, |world| world.perform(now, caller, params));
        let mut response = match result {
            Ok(_) if outcome == Outcome::LoseReply => refusal(&ApiError::internal(), params, request_id),
            Ok(body) if is_sts(params) => Response::new(200, xml::sts_answer(&action, &request_id, body), request_id),
            Ok(body) => Response::new(200, xml::answer(&action, &request_id, body), request_id),
            Err(error) => refusal(&error, params, request_id),
        };
        match outcome {
            Outcome::Delay(ms) => response.delay_ms = ms,
            Outcome::Break => response.broken = true,
            Outcome::Nothing | Outcome::Refuse(_) | Outcome::LoseReply => {}
        }
        response
    }

    /// Lets an injected fault meet the call, carries it out unless that refuses it, and counts it.
    pub(crate) fn meet<T>(
        &mut self,
        action: &str,
        caller: &Caller,
        perform: impl FnOnce(&mut Self) -> Result<T, ApiError>,
    ) -> (Outcome, Result<T, ApiError>) {
        let outcome = self.faults.decide(action, &caller.access_key);
        let result = match &outcome {
            Outcome::Refuse(error) => Err(error.clone()),
            _ => perform(self),
        };
        let known = actions::find(action).map_or("unknown", |action| action.name);
        let count = self.calls.entry((caller.access_key.clone(), known.to_owned())).or_default();
        match &result {
            Ok(_) => count.ok += 1,
            Err(_) => count.errors += 1,
        }
        (outcome, result)
    }

    /// The throttle, then the permission.
    pub(crate) fn admit<'c>(
        &mut self,
        now: Time,
        caller: &'c Caller,
        name: &str,
        unfiltered: bool,
    ) -> Result<(&'static actions::Action, Call<'c>), ApiError> {
        let action = actions::find(name).ok_or_else(|| {
            ApiError::new("InvalidAction", format!("The action {name} is not valid for this web service."))
        })?;
        self.state.throttle.take(now, name, action.mutating, unfiltered)?;
        let call = Call { now, caller, action: action.name };
        if action.needs_permission {
            call.permit(action.name)?;
        }
        Ok((action, call))
    }

    fn perform(&mut self, now: Time, caller: &Caller, params: &Params) -> Result<xml::Xml, ApiError> {
        let name = params
            .get("Action")
            .filter(|name| !name.is_empty())
            .ok_or_else(|| ApiError::new("MissingAction", "The request must contain the parameter Action"))?;
        let unfiltered = UNFILTERED.contains(&name)
            && params.iter().all(|(key, _)| !key.starts_with("Filter.") && !key.contains("Id.") && key != "MaxResults");
        let (action, call) = self.admit(now, caller, name, unfiltered)?;
        if let Some(policy) = &caller.policy {
            for asked in policy::asked(&self.state, name, params) {
                if !policy.allows(&asked) {
                    return Err(unauthorized(caller, &asked.action));
                }
            }
        }
        let reader = Reader::new(params);
        (action.run)(&mut self.state, &call, &reader)
    }
}

fn is_sts(params: &Params) -> bool {
    params.get("Version").is_some_and(|version| version == "2011-06-15")
}

fn refusal(error: &ApiError, params: &Params, request_id: String) -> Response {
    let body = match is_sts(params) {
        true => xml::sts_refusal(&error.code, &error.message, &request_id),
        false => xml::refusal(&error.code, &error.message, &request_id),
    };
    Response::new(error.status, body, request_id)
}

impl Response {
    fn new(status: u16, body: String, request_id: String) -> Self {
        Self { status, body, request_id, delay_ms: 0, broken: false }
    }
}
