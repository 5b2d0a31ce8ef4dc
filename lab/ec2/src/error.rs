//! Refusals in EC2's own words: the code, the message and the HTTP status that belongs to the code.
//!
//! Codes and texts come from EC2's error-code page and from replies quoted in public issue threads; where only the
//! code is known for sure the text is ours, and clients must not lean on it.

use std::fmt::Display;

/// A request that EC2 refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    pub status: u16,
    pub code: String,
    pub message: String,
}

impl ApiError {
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        let code = code.into();
        Self { status: status_of(&code), code, message: message.into() }
    }

    pub(crate) fn missing(parameter: &str) -> Self {
        Self::new("MissingParameter", format!("The request must contain the parameter {parameter}"))
    }

    pub(crate) fn value(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterValue", message)
    }

    pub(crate) fn combination(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterCombination", message)
    }

    pub(crate) fn bad_value(parameter: &str, value: impl Display) -> Self {
        Self::value(format!("Value ({value}) for parameter {parameter} is invalid."))
    }

    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self::new("IncorrectState", message)
    }

    pub(crate) fn dependency(what: &str, id: impl Display) -> Self {
        Self::new("DependencyViolation", format!("The {what} '{id}' has dependencies and cannot be deleted."))
    }

    pub(crate) fn dry_run() -> Self {
        Self::new("DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
    }

    pub(crate) fn throttled() -> Self {
        Self::new("RequestLimitExceeded", "Request limit exceeded.")
    }

    pub(crate) fn internal() -> Self {
        Self::new("InternalError", "An internal error has occurred")
    }

    pub(crate) fn subnet_empty() -> Self {
        Self::new(
            "InsufficientFreeAddressesInSubnet",
            "The specified subnet does not have enough free addresses to satisfy the request.",
        )
    }

    pub(crate) fn fragmented() -> Self {
        Self::new(
            "InsufficientCidrBlocks",
            "The specified subnet does not have enough free cidr blocks to satisfy the request.",
        )
    }
}

/// The kinds of object that requests name by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Vpc,
    Subnet,
    Interface,
    Attachment,
    Instance,
    Group,
    GroupRule,
    Gateway,
    Peering,
    Allocation,
    Association,
    Reservation,
}

struct Words {
    prefix: &'static str,
    malformed: &'static str,
    not_found: &'static str,
    /// The object as EC2's "does not exist" sentence names it.
    noun: &'static str,
}

impl Kind {
    fn words(self) -> Words {
        let words = |prefix, malformed, not_found, noun| Words { prefix, malformed, not_found, noun };
        match self {
            Self::Vpc => words("vpc-", "InvalidVpcID.Malformed", "InvalidVpcID.NotFound", "vpc ID"),
            Self::Subnet => words("subnet-", "InvalidSubnetID.Malformed", "InvalidSubnetID.NotFound", "subnet ID"),
            Self::Interface => words(
                "eni-",
                "InvalidNetworkInterfaceId.Malformed",
                "InvalidNetworkInterfaceID.NotFound",
                "networkInterface ID",
            ),
            Self::Attachment => words(
                "eni-attach-",
                "InvalidNetworkInterfaceAttachmentId.Malformed",
                "InvalidAttachmentID.NotFound",
                "networkInterface attachment ID",
            ),
            Self::Instance => words("i-", "InvalidInstanceID.Malformed", "InvalidInstanceID.NotFound", "instance ID"),
            Self::Group => words("sg-", "InvalidGroupId.Malformed", "InvalidGroup.NotFound", "security group"),
            Self::GroupRule => words(
                "sgr-",
                "InvalidSecurityGroupRuleId.Malformed",
                "InvalidSecurityGroupRuleId.NotFound",
                "security group rule ID",
            ),
            Self::Gateway => words(
                "igw-",
                "InvalidInternetGatewayId.Malformed",
                "InvalidInternetGatewayID.NotFound",
                "internetGateway ID",
            ),
            Self::Peering => words(
                "pcx-",
                "InvalidVpcPeeringConnectionId.Malformed",
                "InvalidVpcPeeringConnectionID.NotFound",
                "vpcPeeringConnection ID",
            ),
            Self::Allocation => {
                words("eipalloc-", "InvalidAllocationID.Malformed", "InvalidAllocationID.NotFound", "allocation ID")
            }
            Self::Association => {
                words("eipassoc-", "InvalidAssociationID.Malformed", "InvalidAssociationID.NotFound", "association ID")
            }
            Self::Reservation => words(
                "scr-",
                "InvalidSubnetCidrReservationID.Malformed",
                "InvalidSubnetCidrReservationID.NotFound",
                "subnet CIDR reservation ID",
            ),
        }
    }

    pub(crate) fn prefix(self) -> &'static str {
        self.words().prefix
    }

    pub(crate) fn not_found(self, id: impl Display) -> ApiError {
        let words = self.words();
        ApiError::new(words.not_found, format!("The {} '{id}' does not exist", words.noun))
    }

    /// Refuses what is not the kind's prefix with 8 or 17 lower-case hexadecimal digits.
    pub(crate) fn check(self, id: &str) -> Result<(), ApiError> {
        let words = self.words();
        let digits = id.strip_prefix(words.prefix).unwrap_or("");
        let hex = digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if hex && matches!(digits.len(), 8 | 17) {
            return Ok(());
        }
        Err(ApiError::new(words.malformed, format!("Invalid id: \"{id}\" (expecting \"{}...\")", words.prefix)))
    }
}

/// The HTTP status of a code; 400 for everything that is the client's own fault.
fn status_of(code: &str) -> u16 {
    match code {
        "AuthFailure" => 401,
        "UnauthorizedOperation"
        | "MissingAuthenticationToken"
        | "InvalidClientTokenId"
        | "SignatureDoesNotMatch"
        | "AccessDenied" => 403,
        "DryRunOperation" => 412,
        "InternalError" | "InternalFailure" => 500,
        "RequestLimitExceeded" | "Unavailable" | "ServiceUnavailable" => 503,
        _ => 400,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_every_kind_are_told_from_malformed_ones() {
        assert!(Kind::Interface.check("eni-0123456789abcdef0").is_ok());
        assert!(Kind::Interface.check("eni-01234567").is_ok());
        for bad in ["eni-", "eni-xyz", "eni-0123456789ABCDEF0", "i-01234567", "eni-0123456789abcdef01", "banana", ""] {
            let error = Kind::Interface.check(bad).unwrap_err();
            assert_eq!((error.status, error.code.as_str()), (400, "InvalidNetworkInterfaceId.Malformed"), "{bad}");
        }
        assert_eq!(Kind::Interface.not_found("eni-1").message, "The networkInterface ID 'eni-1' does not exist");
    }

    #[test]
    fn codes_have_their_http_status() {
        let table = [
            ("DryRunOperation", 412),
            ("RequestLimitExceeded", 503),
            ("UnauthorizedOperation", 403),
            ("AuthFailure", 401),
            ("InternalError", 500),
            ("InvalidParameterValue", 400),
        ];
        for (code, status) in table {
            assert_eq!(ApiError::new(code, "").status, status, "{code}");
        }
    }
}
