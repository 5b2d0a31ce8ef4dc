"""boto3 against the lab's EC2: the life of an interface, pages, refusals. Endpoint and keys: from the environment."""

import ipaddress

import boto3
from botocore.exceptions import ClientError

ec2 = boto3.client("ec2")


def refused(code, call, **arguments):
    try:
        call(**arguments)
    except ClientError as error:
        got = error.response["Error"]["Code"]
        assert got == code, f"{call.__name__}: {got}, not {code}"
        assert error.response["ResponseMetadata"]["RequestId"], "a refusal has a request id"
        return error.response
    raise AssertionError(f"{call.__name__} was not refused with {code}")


vpc = ec2.create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.1.0.0/24", AvailabilityZone="us-east-1b")["Subnet"]["SubnetId"]
group = ec2.create_security_group(GroupName="pods", Description="pods", VpcId=vpc)["GroupId"]
ec2.authorize_security_group_ingress(
    GroupId=group,
    IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}],
)

run = ec2.run_instances(
    ImageId="ami-1",
    InstanceType="m5.large",
    MinCount=1,
    MaxCount=1,
    NetworkInterfaces=[{"DeviceIndex": 0, "SubnetId": subnet, "Groups": [group], "Ipv4PrefixCount": 1}],
    TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "n <1> & co"}]}],
)
instance = run["Instances"][0]
assert instance["State"]["Name"] == "pending"
assert instance["Tags"] == [{"Key": "Name", "Value": "n <1> & co"}]
assert len(instance["NetworkInterfaces"][0]["Ipv4Prefixes"]) == 1
instance_id = instance["InstanceId"]
ec2.get_waiter("instance_running").wait(InstanceIds=[instance_id], WaiterConfig={"Delay": 1})

arguments = dict(
    SubnetId=subnet,
    Groups=[group],
    Description="second",
    Ipv4PrefixCount=2,
    ClientToken="token-1",
    TagSpecifications=[{"ResourceType": "network-interface", "Tags": [{"Key": "who", "Value": "me"}]}],
)
eni = ec2.create_network_interface(**arguments)["NetworkInterface"]
assert eni["Status"] == "pending"
assert len(eni["Ipv4Prefixes"]) == 2
eni = eni["NetworkInterfaceId"]
again = ec2.create_network_interface(**arguments)["NetworkInterface"]["NetworkInterfaceId"]
assert again == eni, "a client token gives the same interface"
refused("IdempotentParameterMismatch", ec2.create_network_interface, **{**arguments, "Description": "other"})

attachment = ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=instance_id, DeviceIndex=1)["AttachmentId"]
second = dict(NetworkInterfaceId=eni, InstanceId=instance_id, DeviceIndex=2)
refused("InvalidNetworkInterface.InUse", ec2.attach_network_interface, **second)
refused("InvalidParameterValue", ec2.delete_network_interface, NetworkInterfaceId=eni)
ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, SourceDestCheck={"Value": False})

assigned = ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=2)
addresses = [entry["PrivateIpAddress"] for entry in assigned["AssignedPrivateIpAddresses"]]
assert len(addresses) == 2

# A prefix by name: the first whole one that nobody holds. The first and the last of a subnet are never whole.
taken = []
for shown in ec2.describe_network_interfaces(Filters=[{"Name": "subnet-id", "Values": [subnet]}])["NetworkInterfaces"]:
    taken += [ipaddress.ip_network(entry["PrivateIpAddress"]) for entry in shown["PrivateIpAddresses"]]
    taken += [ipaddress.ip_network(entry["Ipv4Prefix"]) for entry in shown.get("Ipv4Prefixes", [])]
blocks = list(ipaddress.ip_network("10.1.0.0/24").subnets(new_prefix=28))[1:-1]
prefix = str(next(block for block in blocks if not any(block.overlaps(other) for other in taken)))
named = ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=[prefix])
assert named["AssignedIpv4Prefixes"] == [{"Ipv4Prefix": prefix}]
too_many = dict(NetworkInterfaceId=eni, Ipv4PrefixCount=9)
answer = refused("PrivateIpAddressLimitExceeded", ec2.assign_private_ip_addresses, **too_many)
assert answer["Error"]["Message"] == "Number of private addresses will exceed limit."

# Secondary addresses are found by the filter that finds addresses.
found = ec2.describe_network_interfaces(Filters=[{"Name": "addresses.private-ip-address", "Values": addresses[:1]}])
assert [shown["NetworkInterfaceId"] for shown in found["NetworkInterfaces"]] == [eni]
shown = found["NetworkInterfaces"][0]
assert shown["SourceDestCheck"] is False and shown["TagSet"] == [{"Key": "who", "Value": "me"}]
assert shown["Attachment"]["AttachmentId"] == attachment and shown["Attachment"]["AttachTime"].year >= 2024
assert len(shown["PrivateIpAddresses"]) == 3 and len(shown["Ipv4Prefixes"]) == 3

ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, PrivateIpAddresses=addresses)
ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=[prefix])
again = dict(NetworkInterfaceId=eni, PrivateIpAddresses=addresses)
refused("InvalidParameterValue", ec2.unassign_private_ip_addresses, **again)
free = ec2.describe_subnets(SubnetIds=[subnet])["Subnets"][0]["AvailableIpAddressCount"]
assert free == 251 - 1 - 16 - 1 - 32, free

made = {ec2.create_network_interface(SubnetId=subnet)["NetworkInterface"]["NetworkInterfaceId"] for _ in range(12)}
pages = ec2.get_paginator("describe_network_interfaces").paginate(
    Filters=[{"Name": "vpc-id", "Values": [vpc]}], PaginationConfig={"PageSize": 5}
)
listed = [[shown["NetworkInterfaceId"] for shown in page["NetworkInterfaces"]] for page in pages]
assert [len(page) for page in listed] == [5, 5, 4], listed
assert made < {eni for page in listed for eni in page}

refused("DryRunOperation", ec2.create_network_interface, SubnetId=subnet, DryRun=True)
refused("InvalidSubnetID.NotFound", ec2.create_network_interface, SubnetId="subnet-0123456789abcdef0")
refused("InvalidSubnetID.Malformed", ec2.create_network_interface, SubnetId="subnet-zzz")
refused("InvalidGroup.NotFound", ec2.create_network_interface, SubnetId=subnet, Groups=["sg-0123456789abcdef0"])
refused("InvalidInstanceID.NotFound", ec2.describe_instances, InstanceIds=["i-0123456789abcdef0"])

types = ec2.get_paginator("describe_instance_types").paginate()
assert sum(len(page["InstanceTypes"]) for page in types) > 1_000
reservation = ec2.create_subnet_cidr_reservation(SubnetId=subnet, Cidr="10.1.0.192/27", ReservationType="prefix")
assert reservation["SubnetCidrReservation"]["ReservationType"] == "prefix"
assert len(ec2.get_subnet_cidr_reservations(SubnetId=subnet)["SubnetIpv4CidrReservations"]) == 1

ec2.terminate_instances(InstanceIds=[instance_id])
ec2.get_waiter("instance_terminated").wait(InstanceIds=[instance_id], WaiterConfig={"Delay": 1})
left = ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])["NetworkInterfaces"][0]
assert left["Status"] == "available" and "Attachment" not in left, "an interface that outlives its instance"
