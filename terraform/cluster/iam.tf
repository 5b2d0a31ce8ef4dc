# Three roles: the control plane's, the nodes', and ipamd's. The nodes' role may not touch ENIs: that is ipamd's alone, and
# ipamd gets its role by its service account.

locals {
  namespace       = "kube-system"
  service_account = "aws-node"
  irsa            = var.identity == "irsa"
  issuer          = local.irsa ? trimprefix(aws_eks_cluster.this.identity[0].oidc[0].issuer, "https://") : ""

  trust_of_service = { for name, service in { cluster = "eks.amazonaws.com", node = "ec2.amazonaws.com" } : name => jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = service }
    }]
  }) }

  # Only ENIs that carry the cluster's name, and only this cluster's nodes.
  ipamd_policy = replace(
    replace(file("${path.module}/../../deploy/iam/policy-ipv4-scoped.json"), "CLUSTER", var.name),
    "arn:aws:", "arn:${data.aws_partition.current.partition}:",
  )

  # One of the two is rendered: the other would name an OIDC provider that is not there.
  ipamd_trust = local.irsa ? jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRoleWithWebIdentity"
      Principal = { Federated = one(aws_iam_openid_connect_provider.this[*].arn) }
      Condition = { StringEquals = {
        "${local.issuer}:aud" = "sts.amazonaws.com"
        "${local.issuer}:sub" = "system:serviceaccount:${local.namespace}:${local.service_account}"
      } }
    }]
    }) : jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Principal = { Service = "pods.eks.amazonaws.com" }
    }]
  })
}

data "aws_partition" "current" {}

resource "aws_iam_role" "cluster" {
  name               = "${var.name}-cluster"
  assume_role_policy = local.trust_of_service.cluster
  tags               = local.tags
}

resource "aws_iam_role_policy_attachment" "cluster" {
  role       = aws_iam_role.cluster.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonEKSClusterPolicy"
}

resource "aws_iam_role" "node" {
  name               = "${var.name}-node"
  assume_role_policy = local.trust_of_service.node
  tags               = local.tags
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each = toset(["AmazonEKSWorkerNodePolicy", "AmazonEC2ContainerRegistryPullOnly"])

  role       = aws_iam_role.node.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/${each.value}"
}

resource "aws_iam_role" "ipamd" {
  name               = "${var.name}-ipamd"
  assume_role_policy = local.ipamd_trust
  tags               = local.tags
}

resource "aws_iam_role_policy" "ipamd" {
  name   = "ipamd"
  role   = aws_iam_role.ipamd.id
  policy = local.ipamd_policy
}

resource "aws_eks_pod_identity_association" "ipamd" {
  count = local.irsa ? 0 : 1

  cluster_name    = aws_eks_cluster.this.name
  namespace       = local.namespace
  service_account = local.service_account
  role_arn        = aws_iam_role.ipamd.arn
  tags            = local.tags
}

resource "aws_iam_openid_connect_provider" "this" {
  count = local.irsa ? 1 : 0

  url            = aws_eks_cluster.this.identity[0].oidc[0].issuer
  client_id_list = ["sts.amazonaws.com"]
  tags           = local.tags
}
