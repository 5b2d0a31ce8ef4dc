# Each side routes to the other, admits it, and does not translate what goes there.

mock_provider "aws" {
  alias = "west"

  mock_resource "aws_eks_cluster" {
    defaults = { certificate_authority = [{ data = "UEVN" }] }
  }

  mock_resource "aws_vpc_peering_connection" {
    defaults = { id = "pcx-1" }
  }
}

mock_provider "aws" {
  alias = "east"

  mock_resource "aws_eks_cluster" {
    defaults = { certificate_authority = [{ data = "UEVN" }] }
  }
}

mock_provider "helm" {
  alias = "west"
}

mock_provider "helm" {
  alias = "east"
}

variables {
  api_access_cidrs = ["198.51.100.7/32"]
  image            = { repository = "registry.example/flatwire", tag = "v1" }
}

run "pods_reach_each_other_without_translation" {
  command = apply

  assert {
    condition     = toset([for route in aws_route.west_to_east : route.destination_cidr_block]) == toset(output.cidrs.east) && toset([for route in aws_route.east_to_west : route.destination_cidr_block]) == toset(output.cidrs.west)
    error_message = "each side has routes to every CIDR of the other"
  }

  assert {
    condition     = yamldecode(module.west.chart_values).env.AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS == join(",", output.cidrs.east) && yamldecode(module.east.chart_values).env.AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS == join(",", output.cidrs.west)
    error_message = "each side excludes the other's CIDRs from translation"
  }

  assert {
    condition     = output.peering_id == "pcx-1" && alltrue([for route in aws_route.west_to_east : route.vpc_peering_connection_id != null])
    error_message = "the routes lead into the peering"
  }
}

run "overlapping_cidrs" {
  command = plan

  variables {
    east = { pod_cidr = "100.64.0.0/16" }
  }

  expect_failures = [var.east]
}

run "one_region_twice" {
  command = plan

  variables {
    east = { region = "us-west-2" }
  }

  expect_failures = [var.east]
}
