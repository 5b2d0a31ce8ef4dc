# The network and the nodes: what is asked of AWS, by plan.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
}

mock_provider "helm" {}

variables {
  name             = "demo"
  zones            = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
  api_access_cidrs = ["198.51.100.7/32"]
  image            = { repository = "registry.example/flatwire", tag = "v1" }
}

run "subnets" {
  command = plan

  assert {
    condition     = [for zone in var.zones : aws_subnet.nodes[zone].cidr_block] == ["10.0.0.0/18", "10.0.64.0/18", "10.0.128.0/18"]
    error_message = "node subnets: ${jsonencode(values(aws_subnet.nodes)[*].cidr_block)}"
  }

  assert {
    condition     = [for zone in var.zones : aws_subnet.pods[zone].cidr_block] == ["100.64.0.0/18", "100.64.64.0/18", "100.64.128.0/18"]
    error_message = "pod subnets: ${jsonencode(values(aws_subnet.pods)[*].cidr_block)}"
  }

  assert {
    condition     = alltrue([for subnet in aws_subnet.pods : subnet.tags["kubernetes.io/role/cni"] == "1"]) && alltrue([for subnet in aws_subnet.nodes : !contains(keys(subnet.tags), "kubernetes.io/role/cni")])
    error_message = "pod subnets, and only those, carry the tag by which ipamd finds them"
  }

  assert {
    condition     = alltrue([for reservation in aws_ec2_subnet_cidr_reservation.nodes : reservation.reservation_type == "prefix"]) && aws_ec2_subnet_cidr_reservation.nodes["eu-central-1b"].cidr_block == "10.0.96.0/19"
    error_message = "half of each node subnet is reserved for prefixes"
  }

  assert {
    condition     = length(setintersection([for subnet in aws_subnet.public : subnet.cidr_block], [for subnet in aws_subnet.nodes : subnet.cidr_block])) == 0 && aws_subnet.public["eu-central-1a"].cidr_block == "10.0.192.0/22"
    error_message = "public subnets lie in the last quarter"
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 1 && !aws_subnet.nodes["eu-central-1a"].map_public_ip_on_launch
    error_message = "nodes are private by default"
  }
}

run "without_a_second_cidr" {
  command = plan

  variables {
    pod_cidr = null
  }

  assert {
    condition     = length(aws_subnet.pods) == 0 && length(aws_vpc_ipv4_cidr_block_association.pods) == 0 && output.cidrs == tolist(["10.0.0.0/16"])
    error_message = "without pod_cidr there are no pod subnets: ${jsonencode(output.cidrs)}"
  }
}

run "without_a_nat_gateway" {
  command = plan

  variables {
    nat_gateway = false
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 0 && length(aws_eip.nat) == 0 && aws_subnet.nodes["eu-central-1a"].map_public_ip_on_launch
    error_message = "nodes have public addresses and no NAT gateway costs anything"
  }
}

run "nodes_are_launched_with_prefixes" {
  command = plan

  variables {
    node_groups = {
      small = { prefixes = 0 }
      large = { prefixes = 15, max_pods = 200, instance_types = ["m5.2xlarge"] }
    }
  }

  assert {
    condition     = aws_launch_template.node["large"].network_interfaces[0].ipv4_prefix_count == 15
    error_message = "the launch template asks for the group's prefixes"
  }

  assert {
    condition     = aws_launch_template.node["large"].metadata_options[0].http_tokens == "required" && aws_launch_template.node["large"].metadata_options[0].http_put_response_hop_limit == 1
    error_message = "IMDSv2 only, one hop"
  }

  assert {
    condition     = strcontains(base64decode(aws_launch_template.node["large"].user_data), "maxPods: 200")
    error_message = "the kubelet is told how many pods fit: ${base64decode(aws_launch_template.node["large"].user_data)}"
  }

  assert {
    condition     = aws_eks_cluster.this.bootstrap_self_managed_addons == false && !contains(keys(aws_eks_addon.early), "vpc-cni")
    error_message = "EKS puts no vpc-cni there"
  }
}

run "a_name_that_iam_would_refuse" {
  command = plan

  variables {
    name = "Demo_1"
  }

  expect_failures = [var.name]
}

run "a_vpc_too_small_for_prefixes" {
  command = plan

  variables {
    cidr     = "10.0.0.0/24"
    pod_cidr = "100.64.0.0"
  }

  expect_failures = [var.cidr, var.pod_cidr]
}

run "one_zone" {
  command = plan

  variables {
    zones = ["eu-central-1a"]
  }

  expect_failures = [var.zones]
}

run "sizes_out_of_order" {
  command = plan

  variables {
    node_groups = { default = { min_size = 3, desired_size = 2 } }
  }

  expect_failures = [var.node_groups]
}

run "values_of_no_kind" {
  command = plan

  variables {
    identity         = "keys"
    peer_cidrs       = ["10.1.0.0"]
    api_access_cidrs = []
    image            = { repository = "https://registry.example/flatwire", tag = "v 1" }
  }

  expect_failures = [var.identity, var.peer_cidrs, var.api_access_cidrs, var.image]
}
