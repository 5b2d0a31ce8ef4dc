output "cluster_name" {
  description = "Name of the cluster."
  value       = aws_eks_cluster.this.name
}

output "cluster_endpoint" {
  description = "URL of the cluster's API, for the helm and kubernetes providers."
  value       = aws_eks_cluster.this.endpoint
}

output "cluster_ca" {
  description = "The API's certificate authority, in PEM."
  value       = base64decode(aws_eks_cluster.this.certificate_authority[0].data)
}

output "kubeconfig_command" {
  description = "Command that makes kubectl talk to the cluster."
  value       = "aws eks update-kubeconfig --name ${aws_eks_cluster.this.name} --region ${aws_eks_cluster.this.region}"
}

output "vpc_id" {
  description = "The VPC."
  value       = aws_vpc.this.id
}

output "cidrs" {
  description = "CIDRs of the VPC that pods and nodes have addresses from: what a peer excludes from translation and routes here."
  value       = compact([var.cidr, var.pod_cidr])
}

output "route_table_id" {
  description = "Route table of nodes and pods, for routes to peers."
  value       = aws_route_table.nodes.id
}

output "node_subnet_ids" {
  description = "Node subnets by zone."
  value       = { for zone, subnet in aws_subnet.nodes : zone => subnet.id }
}

output "pod_subnet_ids" {
  description = "Pod subnets by zone, where ipamd makes secondary ENIs; empty without a secondary CIDR."
  value       = { for zone, subnet in aws_subnet.pods : zone => subnet.id }
}

output "cluster_security_group_id" {
  description = "Security group of every ENI of the nodes."
  value       = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
}

output "ipamd_role_arn" {
  description = "IAM role of ipamd."
  value       = aws_iam_role.ipamd.arn
}

output "chart_values" {
  description = "Values that the chart was installed with, in YAML."
  value       = yamlencode(local.chart_values)
}
