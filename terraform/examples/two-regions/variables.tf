variable "name" {
  description = "Prefix of both clusters' names."
  type        = string
  default     = "flatwire"
}

variable "west" {
  description = "The first region: its zones, and CIDRs that the second one does not use."
  type = object({
    region   = optional(string, "us-west-2")
    zones    = optional(list(string), ["us-west-2a", "us-west-2b"])
    cidr     = optional(string, "10.10.0.0/16")
    pod_cidr = optional(string, "100.64.0.0/17")
  })
  default = {}
}

variable "east" {
  description = "The second region: its zones, and CIDRs that the first one does not use."
  type = object({
    region   = optional(string, "us-east-1")
    zones    = optional(list(string), ["us-east-1a", "us-east-1b"])
    cidr     = optional(string, "10.20.0.0/16")
    pod_cidr = optional(string, "100.64.128.0/17")
  })
  default = {}

  # Peering refuses CIDRs that overlap. Two overlap exactly if they begin alike in the shorter prefix of the two.
  validation {
    condition = alltrue([
      for pair in setproduct([var.west.cidr, var.west.pod_cidr], [var.east.cidr, var.east.pod_cidr]) :
      cidrsubnet("${split("/", pair[0])[0]}/${min([for cidr in pair : tonumber(split("/", cidr)[1])]...)}", 0, 0) !=
      cidrsubnet("${split("/", pair[1])[0]}/${min([for cidr in pair : tonumber(split("/", cidr)[1])]...)}", 0, 0)
    ])
    error_message = "The CIDRs of east and west overlap; peering needs them apart. Give east others, such as 10.20.0.0/16 and 100.64.128.0/17."
  }

  validation {
    condition     = var.east.region != var.west.region
    error_message = "east and west are the same region."
  }
}

variable "api_access_cidrs" {
  description = "CIDRs that may reach both clusters' APIs from the internet, that of whoever runs terraform among them."
  type        = list(string)
}

variable "identity" {
  description = "How ipamd gets its IAM role: pod-identity or irsa."
  type        = string
  default     = "pod-identity"
}

variable "image" {
  description = "Image of Flatwire, pullable in both regions."
  type = object({
    repository = string
    tag        = string
  })
}

variable "nat_gateway" {
  description = "Whether nodes are private behind a NAT gateway in each region."
  type        = bool
  default     = true
}
