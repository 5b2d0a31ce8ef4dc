//! EC2's rules, seen through the Query API alone: each test asserts what a client would see.

#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for something else")]

mod addresses;
mod attachment;
mod faults;
mod http;
mod imds;
mod ipv6;
mod protocol;
mod reading;
mod signing;

use std::collections::BTreeSet;

use flatwire_core::ids::Time;
use lab_ec2::{Caller, Delays, Ec2, Options, Params};

/// A VPC with a few subnets and a clock that tests move by hand.
struct World {
    ec2: Ec2,
    now: Time,
    caller: Caller,
    vpc: String,
    /// 10.0.0.0/24 in the first zone.
    subnet: String,
    /// 10.0.1.0/26 in the first zone.
    small: String,
    /// 10.0.2.0/24 in the second zone.
    elsewhere: String,
}

/// An answer's XML, read as little as possible: elements by name, in order.
struct Answer(String);

impl Answer {
    fn all(&self, name: &str) -> Vec<String> {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        let parts = self.0.split(&open).skip(1).filter_map(|part| part.split(&close).next());
        parts.map(str::to_owned).collect()
    }

    fn one(&self, name: &str) -> String {
        self.all(name).into_iter().next().unwrap_or_else(|| panic!("no <{name}> in {}", self.0))
    }

    fn set(&self, name: &str) -> BTreeSet<String> {
        self.all(name).into_iter().collect()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: u16,
    code: String,
    message: String,
}

impl World {
    fn new() -> Self {
        Self::with(Options { throttle: None, delays: Delays::NONE, seed: 11, ..Options::default() })
    }

    fn with(options: Options) -> Self {
        let caller = Caller::lab(&options.account_id);
        let mut world = Self {
            ec2: Ec2::new(options),
            now: Time(1_700_000_000_000),
            caller,
            vpc: String::new(),
            subnet: String::new(),
            small: String::new(),
            elsewhere: String::new(),
        };
        world.vpc = world.ok("CreateVpc", &[("CidrBlock", "10.0.0.0/16")]).one("vpcId");
        world.subnet = world.new_subnet("10.0.0.0/24", "us-east-1a");
        world.small = world.new_subnet("10.0.1.0/26", "us-east-1a");
        world.elsewhere = world.new_subnet("10.0.2.0/24", "us-east-1b");
        world
    }

    fn new_subnet(&self, cidr: &str, zone: &str) -> String {
        let answer = [("VpcId", self.vpc.as_str()), ("CidrBlock", cidr), ("AvailabilityZone", zone)];
        self.ok("CreateSubnet", &answer).one("subnetId")
    }

    fn call(&self, action: &str, pairs: &[(&str, &str)]) -> Result<Answer, Refusal> {
        self.call_as(&self.caller, action, pairs)
    }

    fn call_as(&self, caller: &Caller, action: &str, pairs: &[(&str, &str)]) -> Result<Answer, Refusal> {
        let head = [("Action", action), ("Version", "2016-11-15")];
        let params = Params::new(head.into_iter().chain(pairs.iter().copied()));
        let response = self.ec2.query(self.now, caller, &params);
        let answer = Answer(response.body);
        if response.status == 200 {
            return Ok(answer);
        }
        Err(Refusal { status: response.status, code: answer.one("Code"), message: answer.one("Message") })
    }

    #[track_caller]
    fn ok(&self, action: &str, pairs: &[(&str, &str)]) -> Answer {
        self.call(action, pairs).unwrap_or_else(|refusal| panic!("{action}: {refusal:?}"))
    }

    #[track_caller]
    fn refused(&self, action: &str, pairs: &[(&str, &str)]) -> Refusal {
        match self.call(action, pairs) {
            Ok(answer) => panic!("{action} was not refused: {}", answer.0),
            Err(refusal) => refusal,
        }
    }

    /// The refusal's code alone.
    #[track_caller]
    fn code(&self, action: &str, pairs: &[(&str, &str)]) -> String {
        self.refused(action, pairs).code
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
    }

    fn free(&self, subnet: &str) -> u32 {
        self.ok("DescribeSubnets", &[("SubnetId.1", subnet)]).one("availableIpAddressCount").parse().unwrap()
    }

    fn new_eni(&self, subnet: &str) -> String {
        self.ok("CreateNetworkInterface", &[("SubnetId", subnet)]).one("networkInterfaceId")
    }

    fn new_instance(&self, instance_type: &str) -> String {
        self.run(&[("InstanceType", instance_type), ("SubnetId", &self.subnet)]).one("instanceId")
    }

    fn run(&self, pairs: &[(&str, &str)]) -> Answer {
        let head = [("ImageId", "ami-1"), ("MinCount", "1"), ("MaxCount", "1")];
        let pairs: Vec<_> = head.into_iter().chain(pairs.iter().copied()).collect();
        self.ok("RunInstances", &pairs)
    }

    fn attach(&self, eni: &str, instance: &str, device: &str) -> Result<String, Refusal> {
        let pairs = [("NetworkInterfaceId", eni), ("InstanceId", instance), ("DeviceIndex", device)];
        self.call("AttachNetworkInterface", &pairs).map(|answer| answer.one("attachmentId"))
    }

    fn eni(&self, eni: &str) -> Answer {
        self.ok("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", eni)])
    }

    /// An ENI that hangs on an instance of the given type at device 1.
    fn attached_eni(&self, instance_type: &str) -> String {
        let (eni, instance) = (self.new_eni(&self.subnet), self.new_instance(instance_type));
        self.attach(&eni, &instance, "1").unwrap();
        eni
    }
}
