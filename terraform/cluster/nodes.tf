# Nodes that are launched with prefixes on their primary ENI: ipamd reads them from the instance metadata and serves pods
# before it has called EC2 once.

resource "aws_launch_template" "node" {
  for_each = var.node_groups

  name_prefix            = "${var.name}-${each.key}-"
  update_default_version = true
  tags                   = local.tags

  network_interfaces {
    device_index                = 0
    ipv4_prefix_count           = each.value.prefixes > 0 ? each.value.prefixes : null
    security_groups             = [aws_eks_cluster.this.vpc_config[0].cluster_security_group_id]
    associate_public_ip_address = !var.nat_gateway
    delete_on_termination       = true
  }

  # ipamd is on the host's network, so one hop is enough; pods then have no business with the node's role.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    instance_metadata_tags      = "disabled"
  }

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_size           = 20
      volume_type           = "gp3"
      encrypted             = true
      delete_on_termination = true
    }
  }

  # EKS would guess how many pods a node takes from single addresses.
  user_data = base64encode(templatefile("${path.module}/nodeadm.tftpl", { max_pods = each.value.max_pods }))

  tag_specifications {
    resource_type = "instance"
    tags          = merge(local.tags, { Name = "${var.name}-${each.key}" })
  }

  # By this tag ipamd's policy knows the primary ENI; EKS tags the instance itself.
  tag_specifications {
    resource_type = "network-interface"
    tags          = merge(local.tags, { "cluster.k8s.amazonaws.com/name" = var.name })
  }
}

resource "aws_eks_node_group" "this" {
  for_each = var.node_groups

  cluster_name    = aws_eks_cluster.this.name
  node_group_name = each.key
  node_role_arn   = aws_iam_role.node.arn
  subnet_ids      = [for zone in var.zones : aws_subnet.nodes[zone].id]
  ami_type        = "AL2023_x86_64_STANDARD"
  instance_types  = each.value.instance_types
  capacity_type   = each.value.capacity_type
  tags            = local.tags

  launch_template {
    id      = aws_launch_template.node[each.key].id
    version = aws_launch_template.node[each.key].latest_version
  }

  scaling_config {
    min_size     = each.value.min_size
    desired_size = each.value.desired_size
    max_size     = each.value.max_size
  }

  update_config {
    max_unavailable = 1
  }

  # Nodes need a way out before they boot, their permissions, and the CNI that makes them Ready.
  depends_on = [
    aws_iam_role_policy_attachment.node,
    aws_route.nodes_internet,
    aws_route_table_association.nodes,
    aws_route_table_association.pods,
    aws_ec2_subnet_cidr_reservation.nodes,
    helm_release.flatwire,
  ]
}
