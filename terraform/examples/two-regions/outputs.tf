output "kubeconfig_commands" {
  description = "Commands that make kubectl talk to the two clusters."
  value       = { west = module.west.kubeconfig_command, east = module.east.kubeconfig_command }
}

output "cidrs" {
  description = "CIDRs of nodes and pods on both sides."
  value       = { west = module.west.cidrs, east = module.east.cidrs }
}

output "peering_id" {
  description = "The peering between the two VPCs."
  value       = aws_vpc_peering_connection.this.id
}
