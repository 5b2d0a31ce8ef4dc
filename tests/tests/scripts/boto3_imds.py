"""boto3 on a node of the lab: keys, region and identity come from IMDS. Arguments: the IMDS endpoint, the instance."""

import os
import sys

imds, instance = sys.argv[1:]
for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
    os.environ.pop(name, None)
os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = imds

import boto3  # noqa: E402: it reads the environment when it is loaded
from botocore.utils import IMDSRegionProvider  # noqa: E402

session = boto3.Session()
credentials = session.get_credentials()
assert credentials.method == "iam-role", credentials.method
assert credentials.token, "role credentials have a session token"
assert IMDSRegionProvider(session._session).provide() == "us-east-1"

arn = session.client("sts").get_caller_identity()["Arn"]
assert arn.endswith(f":assumed-role/lab-node/{instance}"), arn
ec2 = session.client("ec2")
shown = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
assert shown["InstanceType"] == "m5.large"
eni = shown["NetworkInterfaces"][0]["NetworkInterfaceId"]
assert len(ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4PrefixCount=1)["AssignedIpv4Prefixes"]) == 1
