# The VPC. Every zone has a node subnet in the primary CIDR, half of it reserved for prefixes, and, if there is a secondary
# CIDR, a pod subnet of the zone's whole share of it, tagged so that ipamd makes secondary ENIs there.

locals {
  zones    = { for index, zone in var.zones : zone => index }
  pod_cidr = var.pod_cidr == null ? toset([]) : toset([var.pod_cidr])
  tags     = merge(var.tags, { "flatwire/cluster" = var.name })

  # A quarter of the primary CIDR for each zone's nodes, and a small subnet in the last quarter for what faces the internet.
  node_subnets   = { for zone, index in local.zones : zone => cidrsubnet(var.cidr, 2, index) }
  public_subnets = { for zone, index in local.zones : zone => cidrsubnet(cidrsubnet(var.cidr, 2, 3), 4, index) }
  pod_subnets    = var.pod_cidr == null ? {} : { for zone, index in local.zones : zone => cidrsubnet(var.pod_cidr, 2, index) }
}

resource "aws_vpc" "this" {
  cidr_block           = var.cidr
  enable_dns_support   = true
  enable_dns_hostnames = true
  tags                 = merge(local.tags, { Name = var.name })
}

resource "aws_vpc_ipv4_cidr_block_association" "pods" {
  for_each = local.pod_cidr

  vpc_id     = aws_vpc.this.id
  cidr_block = each.value
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = var.name })
}

resource "aws_subnet" "public" {
  for_each = local.public_subnets

  vpc_id            = aws_vpc.this.id
  availability_zone = each.key
  cidr_block        = each.value
  tags = merge(local.tags, {
    Name                     = "${var.name}-public-${each.key}"
    "kubernetes.io/role/elb" = "1"
  })
}

resource "aws_subnet" "nodes" {
  for_each = local.node_subnets

  vpc_id                  = aws_vpc.this.id
  availability_zone       = each.key
  cidr_block              = each.value
  map_public_ip_on_launch = !var.nat_gateway
  tags = merge(local.tags, {
    Name                              = "${var.name}-nodes-${each.key}"
    "kubernetes.io/role/internal-elb" = "1"
  })
}

# EC2 takes prefixes from a reservation first and keeps single addresses out of it: without one, single addresses scattered
# over the subnet leave no aligned /28 although most of it is free.
resource "aws_ec2_subnet_cidr_reservation" "nodes" {
  for_each = local.node_subnets

  subnet_id        = aws_subnet.nodes[each.key].id
  cidr_block       = cidrsubnet(each.value, 1, 1)
  reservation_type = "prefix"
  description      = "prefixes of ${var.name}"
}

resource "aws_subnet" "pods" {
  for_each = local.pod_subnets

  vpc_id            = aws_vpc_ipv4_cidr_block_association.pods[var.pod_cidr].vpc_id
  availability_zone = each.key
  cidr_block        = each.value
  tags = merge(local.tags, {
    Name                     = "${var.name}-pods-${each.key}"
    "kubernetes.io/role/cni" = "1"
  })
}

# The lower half stays for single addresses: those of the ENIs themselves, and of nodes that cannot have prefixes.
resource "aws_ec2_subnet_cidr_reservation" "pods" {
  for_each = local.pod_subnets

  subnet_id        = aws_subnet.pods[each.key].id
  cidr_block       = cidrsubnet(each.value, 1, 1)
  reservation_type = "prefix"
  description      = "prefixes of ${var.name}"
}

resource "aws_eip" "nat" {
  count = var.nat_gateway ? 1 : 0

  domain = "vpc"
  tags   = merge(local.tags, { Name = "${var.name}-nat" })
}

resource "aws_nat_gateway" "this" {
  count = var.nat_gateway ? 1 : 0

  allocation_id = aws_eip.nat[0].id
  subnet_id     = aws_subnet.public[var.zones[0]].id
  tags          = merge(local.tags, { Name = var.name })

  depends_on = [aws_internet_gateway.this]
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = "${var.name}-public" })
}

resource "aws_route" "public_internet" {
  route_table_id         = aws_route_table.public.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.this.id
}

resource "aws_route_table_association" "public" {
  for_each = aws_subnet.public

  subnet_id      = each.value.id
  route_table_id = aws_route_table.public.id
}

# One table for nodes and pods: what a pod sends from a secondary ENI leaves by the pod subnet's table.
resource "aws_route_table" "nodes" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = "${var.name}-nodes" })
}

resource "aws_route" "nodes_internet" {
  route_table_id         = aws_route_table.nodes.id
  destination_cidr_block = "0.0.0.0/0"
  nat_gateway_id         = var.nat_gateway ? aws_nat_gateway.this[0].id : null
  gateway_id             = var.nat_gateway ? null : aws_internet_gateway.this.id
}

resource "aws_route_table_association" "nodes" {
  for_each = aws_subnet.nodes

  subnet_id      = each.value.id
  route_table_id = aws_route_table.nodes.id
}

resource "aws_route_table_association" "pods" {
  for_each = aws_subnet.pods

  subnet_id      = each.value.id
  route_table_id = aws_route_table.nodes.id
}
