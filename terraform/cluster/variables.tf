variable "name" {
  description = "Name of the cluster, and prefix of everything made for it."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,38}[a-z0-9]$", var.name))
    error_message = "name takes 3 to 40 lower-case letters, digits and hyphens, beginning with a letter and not ending with a hyphen; IAM names are made from it."
  }
}

variable "kubernetes_version" {
  description = "Kubernetes version of the control plane and the nodes."
  type        = string
  default     = "1.34"

  validation {
    condition     = can(regex("^1\\.(2[89]|[3-9][0-9])$", var.kubernetes_version))
    error_message = "kubernetes_version is a minor version such as 1.34, from 1.28 on (Pod Identity needs it)."
  }
}

variable "cidr" {
  description = "Primary CIDR of the VPC. Nodes live in it, and pods on the nodes' primary ENIs."
  type        = string
  default     = "10.0.0.0/16"

  validation {
    condition     = can(cidrnetmask(var.cidr)) && try(tonumber(split("/", var.cidr)[1]) >= 16 && tonumber(split("/", var.cidr)[1]) <= 20, false)
    error_message = "cidr is an IPv4 CIDR from /16 to /20: EC2 takes no larger VPC, and a smaller one leaves a zone too little room for prefixes."
  }
}

variable "pod_cidr" {
  description = "Secondary CIDR of the VPC, for pods on secondary ENIs. Null: all pods live in the primary CIDR."
  type        = string
  default     = "100.64.0.0/16"

  validation {
    condition     = var.pod_cidr == null || try(can(cidrnetmask(var.pod_cidr)) && tonumber(split("/", var.pod_cidr)[1]) >= 16 && tonumber(split("/", var.pod_cidr)[1]) <= 20, false)
    error_message = "pod_cidr is null or an IPv4 CIDR from /16 to /20."
  }
}

variable "zones" {
  description = "Availability zones to use, two or three: EKS wants two at least."
  type        = list(string)

  validation {
    condition     = length(var.zones) >= 2 && length(var.zones) <= 3 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones names two or three different availability zones, such as [\"eu-central-1a\", \"eu-central-1b\"]."
  }
}

variable "nat_gateway" {
  description = "Whether nodes are private, with one NAT gateway for all zones. Without it they have public addresses, which costs less."
  type        = bool
  default     = true
}

variable "peer_cidrs" {
  description = "CIDRs of networks beyond this VPC, such as a peered one, that see pods by their own addresses and may call them."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.peer_cidrs : can(cidrnetmask(cidr))])
    error_message = "peer_cidrs holds IPv4 CIDRs, such as 10.1.0.0/16."
  }
}

variable "api_access_cidrs" {
  description = "CIDRs that may reach the cluster's API from the internet. Whoever runs terraform must be in one of them: it installs the chart."
  type        = list(string)

  validation {
    condition     = length(var.api_access_cidrs) > 0 && alltrue([for cidr in var.api_access_cidrs : can(cidrnetmask(cidr))])
    error_message = "api_access_cidrs holds at least one IPv4 CIDR, such as [\"198.51.100.7/32\"]."
  }
}

variable "node_groups" {
  description = "Node groups by name: instance types, sizes, how many /28 prefixes a node is launched with, and how many pods its kubelet takes."
  type = map(object({
    instance_types = optional(list(string), ["m5.large"])
    min_size       = optional(number, 1)
    desired_size   = optional(number, 2)
    max_size       = optional(number, 4)
    prefixes       = optional(number, 7)
    max_pods       = optional(number, 110)
    capacity_type  = optional(string, "ON_DEMAND")
  }))
  default = { default = {} }

  validation {
    condition     = length(var.node_groups) > 0 && alltrue([for name, _ in var.node_groups : can(regex("^[a-z][a-z0-9-]{0,20}$", name))])
    error_message = "node_groups holds at least one group, named in up to 21 lower-case letters, digits and hyphens."
  }

  validation {
    condition     = alltrue([for group in values(var.node_groups) : group.min_size >= 0 && group.min_size <= group.desired_size && group.desired_size <= group.max_size && group.max_size >= 1])
    error_message = "node_groups: min_size <= desired_size <= max_size, and room for one node."
  }

  validation {
    condition     = alltrue([for group in values(var.node_groups) : group.prefixes >= 0 && group.prefixes <= 49 && floor(group.prefixes) == group.prefixes])
    error_message = "node_groups: prefixes is a whole number from 0 to 49; each takes one of the slots of the primary ENI (nine on an m5.large)."
  }

  validation {
    condition     = alltrue([for group in values(var.node_groups) : group.max_pods >= 8 && group.max_pods <= 250])
    error_message = "node_groups: max_pods is from 8 to 250."
  }

  validation {
    condition     = alltrue([for group in values(var.node_groups) : contains(["ON_DEMAND", "SPOT"], group.capacity_type)])
    error_message = "node_groups: capacity_type is ON_DEMAND or SPOT."
  }
}

variable "identity" {
  description = "How ipamd gets its IAM role: pod-identity (the agent is installed), or irsa (an OIDC provider is made)."
  type        = string
  default     = "pod-identity"

  validation {
    condition     = contains(["pod-identity", "irsa"], var.identity)
    error_message = "identity is pod-identity or irsa."
  }
}

variable "image" {
  description = "Image of Flatwire: the repository that deploy/Dockerfile was pushed to, and its tag."
  type = object({
    repository = string
    tag        = string
  })

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9._:/-]*$", var.image.repository)) && can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$", var.image.tag))
    error_message = "image is { repository = \"…/flatwire\", tag = \"…\" }: the repository without a tag, and the tag alone."
  }
}

variable "settings" {
  description = "Further variables of the daemon (docs/settings.md), over those that this module sets."
  type        = map(string)
  default     = {}
}

variable "tags" {
  description = "Tags of everything made here, beside the module's own."
  type        = map(string)
  default     = {}
}
