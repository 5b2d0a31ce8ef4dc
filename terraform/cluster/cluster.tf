# The control plane, without the add-ons that EKS would put there by itself: two programs must not own a node's ENIs.

resource "aws_eks_cluster" "this" {
  name                          = var.name
  version                       = var.kubernetes_version
  role_arn                      = aws_iam_role.cluster.arn
  bootstrap_self_managed_addons = false
  tags                          = local.tags

  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }

  vpc_config {
    subnet_ids              = [for zone in var.zones : aws_subnet.nodes[zone].id]
    endpoint_private_access = true
    endpoint_public_access  = true
    public_access_cidrs     = var.api_access_cidrs
  }

  depends_on = [aws_iam_role_policy_attachment.cluster]
}

# The group that EKS makes and every ENI of a node carries, those that ipamd makes included: it copies the primary's.
resource "aws_vpc_security_group_ingress_rule" "peers" {
  for_each = toset(var.peer_cidrs)

  security_group_id = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
  cidr_ipv4         = each.value
  ip_protocol       = "-1"
  description       = "pods and nodes of ${each.value}"
  tags              = local.tags
}

# Neither of the two needs a pod's network, so both are there before the first node.
resource "aws_eks_addon" "early" {
  for_each = toset(concat(["kube-proxy"], local.irsa ? [] : ["eks-pod-identity-agent"]))

  cluster_name = aws_eks_cluster.this.name
  addon_name   = each.value
  tags         = local.tags
}

# Its pods need nodes, and addresses.
resource "aws_eks_addon" "coredns" {
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "coredns"
  tags         = local.tags

  depends_on = [aws_eks_node_group.this]
}
