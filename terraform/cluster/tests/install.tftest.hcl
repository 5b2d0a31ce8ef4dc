# Identity and chart: what ipamd may do, how it gets that, and what it is told. By apply, so that values are known.

mock_provider "aws" {
  mock_data "aws_partition" {
    defaults = { partition = "aws-cn" }
  }

  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws-cn:iam::123456789012:role/demo-ipamd" }
  }

  mock_resource "aws_iam_openid_connect_provider" {
    defaults = { arn = "arn:aws-cn:iam::123456789012:oidc-provider/oidc.example/id/1" }
  }

  mock_resource "aws_eks_cluster" {
    defaults = {
      region                = "cn-north-1"
      certificate_authority = [{ data = "UEVN" }]
      identity              = [{ oidc = [{ issuer = "https://oidc.example/id/1" }] }]
    }
  }
}

mock_provider "helm" {}

variables {
  name             = "demo"
  zones            = ["cn-north-1a", "cn-north-1b"]
  api_access_cidrs = ["198.51.100.7/32"]
  peer_cidrs       = ["10.20.0.0/16", "100.64.128.0/17"]
  image            = { repository = "registry.example/flatwire", tag = "v1" }
}

run "pod_identity" {
  command = apply

  assert {
    condition     = jsondecode(aws_iam_role.ipamd.assume_role_policy).Statement[0].Principal.Service == "pods.eks.amazonaws.com" && aws_eks_pod_identity_association.ipamd[0].service_account == "aws-node"
    error_message = "the service account aws-node gets the role from the agent: ${aws_iam_role.ipamd.assume_role_policy}"
  }

  assert {
    condition     = contains(keys(aws_eks_addon.early), "eks-pod-identity-agent") && length(aws_iam_openid_connect_provider.this) == 0
    error_message = "the agent is installed, and no OIDC provider is made"
  }

  assert {
    condition     = contains(flatten([for statement in jsondecode(aws_iam_role_policy.ipamd.policy).Statement : statement.Action]), "ec2:CreateNetworkInterface")
    error_message = "ipamd's role has the policy of deploy/iam"
  }

  assert {
    condition     = !strcontains(aws_iam_role_policy.ipamd.policy, "CLUSTER") && !strcontains(aws_iam_role_policy.ipamd.policy, "arn:aws:") && strcontains(aws_iam_role_policy.ipamd.policy, "kubernetes.io/cluster/demo")
    error_message = "the policy is of this cluster and this partition: ${aws_iam_role_policy.ipamd.policy}"
  }

  assert {
    condition     = anytrue([for spec in aws_launch_template.node["default"].tag_specifications : spec.resource_type == "network-interface" && lookup(spec.tags, "cluster.k8s.amazonaws.com/name", "") == "demo"])
    error_message = "the primary ENI carries the tag that the policy asks for"
  }

  assert {
    condition     = !anytrue([for attachment in aws_iam_role_policy_attachment.node : strcontains(attachment.policy_arn, "CNI")]) && alltrue([for attachment in aws_iam_role_policy_attachment.node : startswith(attachment.policy_arn, "arn:aws-cn:")])
    error_message = "the nodes' own role may not touch ENIs, and is of this partition"
  }

  assert {
    condition     = yamldecode(output.chart_values).env.AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS == "10.20.0.0/16,100.64.128.0/17" && yamldecode(output.chart_values).env.ENABLE_PREFIX_DELEGATION == "true" && yamldecode(output.chart_values).image.tag == "v1"
    error_message = "values: ${output.chart_values}"
  }

  assert {
    condition     = helm_release.flatwire.wait == false && helm_release.flatwire.namespace == "kube-system"
    error_message = "the chart does not wait for nodes that wait for it"
  }

  assert {
    condition     = toset([for rule in aws_vpc_security_group_ingress_rule.peers : rule.cidr_ipv4]) == toset(var.peer_cidrs)
    error_message = "peers may call pods"
  }

  assert {
    condition     = output.kubeconfig_command == "aws eks update-kubeconfig --name demo --region cn-north-1" && output.cluster_ca == "PEM"
    error_message = output.kubeconfig_command
  }
}

run "irsa" {
  command = apply

  variables {
    identity = "irsa"
  }

  assert {
    condition     = jsondecode(aws_iam_role.ipamd.assume_role_policy).Statement[0].Condition.StringEquals["oidc.example/id/1:sub"] == "system:serviceaccount:kube-system:aws-node"
    error_message = "only the service account aws-node may take the role: ${aws_iam_role.ipamd.assume_role_policy}"
  }

  assert {
    condition     = length(aws_eks_pod_identity_association.ipamd) == 0 && join(",", keys(aws_eks_addon.early)) == "kube-proxy"
    error_message = "no agent, no association"
  }

  assert {
    condition     = yamldecode(output.chart_values).serviceAccount.annotations["eks.amazonaws.com/role-arn"] == aws_iam_role.ipamd.arn
    error_message = "the service account names the role: ${output.chart_values}"
  }
}

run "settings_of_ones_own_win" {
  command = apply

  variables {
    settings = { ENABLE_PREFIX_DELEGATION = "false", WARM_IP_TARGET = "5" }
  }

  assert {
    condition     = yamldecode(output.chart_values).env.ENABLE_PREFIX_DELEGATION == "false" && yamldecode(output.chart_values).env.WARM_IP_TARGET == "5"
    error_message = "values: ${output.chart_values}"
  }
}
