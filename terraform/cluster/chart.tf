# Flatwire goes in between the control plane and the nodes: EKS counts a node group as made when its nodes are Ready, and a
# node without a CNI configuration never is. Hence wait = false: there is nothing yet that the DaemonSet could run on.

locals {
  settings = merge(
    {
      CLUSTER_NAME                       = var.name
      ENABLE_PREFIX_DELEGATION           = "true"
      AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS = join(",", var.peer_cidrs)
    },
    var.settings,
  )

  chart_values = {
    image = {
      repository = var.image.repository
      tag        = var.image.tag
    }
    env = local.settings
    serviceAccount = {
      annotations = local.irsa ? { "eks.amazonaws.com/role-arn" = aws_iam_role.ipamd.arn } : {}
    }
  }
}

resource "helm_release" "flatwire" {
  name      = "flatwire"
  namespace = local.namespace
  chart     = "${path.module}/../../deploy/chart"
  wait      = false
  values    = [yamlencode(local.chart_values)]

  depends_on = [aws_eks_addon.early, aws_eks_pod_identity_association.ipamd, aws_iam_role_policy.ipamd]
}
