# Two clusters in two regions, their VPCs peered, and pods that reach each other by their own addresses: VPC routing carries
# them, and no translation stands in between, because each cluster excludes the other's CIDRs from it.

terraform {
  required_version = ">= 1.7"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.0, < 7.0"
    }
    helm = {
      source  = "hashicorp/helm"
      version = ">= 3.0, < 4.0"
    }
  }
}

locals {
  west_cidrs = [var.west.cidr, var.west.pod_cidr]
  east_cidrs = [var.east.cidr, var.east.pod_cidr]
  tags       = { "flatwire/example" = "two-regions" }
}

provider "aws" {
  alias  = "west"
  region = var.west.region
}

provider "aws" {
  alias  = "east"
  region = var.east.region
}

# A token from the AWS CLI for each call: one that stands in the state would have expired by the next run.
provider "helm" {
  alias = "west"

  kubernetes = {
    host                   = module.west.cluster_endpoint
    cluster_ca_certificate = module.west.cluster_ca
    exec = {
      api_version = "client.authentication.k8s.io/v1beta1"
      command     = "aws"
      args        = ["eks", "get-token", "--cluster-name", module.west.cluster_name, "--region", var.west.region]
    }
  }
}

provider "helm" {
  alias = "east"

  kubernetes = {
    host                   = module.east.cluster_endpoint
    cluster_ca_certificate = module.east.cluster_ca
    exec = {
      api_version = "client.authentication.k8s.io/v1beta1"
      command     = "aws"
      args        = ["eks", "get-token", "--cluster-name", module.east.cluster_name, "--region", var.east.region]
    }
  }
}

module "west" {
  source = "../../cluster"

  providers = {
    aws  = aws.west
    helm = helm.west
  }

  name             = "${var.name}-west"
  cidr             = var.west.cidr
  pod_cidr         = var.west.pod_cidr
  zones            = var.west.zones
  peer_cidrs       = local.east_cidrs
  api_access_cidrs = var.api_access_cidrs
  identity         = var.identity
  image            = var.image
  nat_gateway      = var.nat_gateway
  tags             = local.tags
}

module "east" {
  source = "../../cluster"

  providers = {
    aws  = aws.east
    helm = helm.east
  }

  name             = "${var.name}-east"
  cidr             = var.east.cidr
  pod_cidr         = var.east.pod_cidr
  zones            = var.east.zones
  peer_cidrs       = local.west_cidrs
  api_access_cidrs = var.api_access_cidrs
  identity         = var.identity
  image            = var.image
  nat_gateway      = var.nat_gateway
  tags             = local.tags
}

resource "aws_vpc_peering_connection" "this" {
  provider = aws.west

  vpc_id      = module.west.vpc_id
  peer_vpc_id = module.east.vpc_id
  peer_region = var.east.region
  tags        = merge(local.tags, { Name = var.name })
}

resource "aws_vpc_peering_connection_accepter" "this" {
  provider = aws.east

  vpc_peering_connection_id = aws_vpc_peering_connection.this.id
  auto_accept               = true
  tags                      = merge(local.tags, { Name = var.name })
}

# Both CIDRs of the other side, from the table that nodes and pods share: a peering carries what a route sends into it.
resource "aws_route" "west_to_east" {
  provider = aws.west
  for_each = toset(local.east_cidrs)

  route_table_id            = module.west.route_table_id
  destination_cidr_block    = each.value
  vpc_peering_connection_id = aws_vpc_peering_connection_accepter.this.id
}

resource "aws_route" "east_to_west" {
  provider = aws.east
  for_each = toset(local.west_cidrs)

  route_table_id            = module.east.route_table_id
  destination_cidr_block    = each.value
  vpc_peering_connection_id = aws_vpc_peering_connection_accepter.this.id
}
