//! Who may do what: credentials, instance roles, and the policies that name actions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flatwire_core::ids::{InstanceId, Time};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::error::ApiError;
use crate::filters::wildcard;
use crate::policy::Policy;
use crate::sigv4::{self, Claim, SignedRequest};

/// The role of nodes that the lab starts itself; there from the start, with every right.
pub const NODE_ROLE: &str = "lab-node";
/// Role credentials live this long, and are renewed when less than `ROLE_RENEW_MS` is left.
const ROLE_LIFE_MS: u64 = 6 * 3_600_000;
const ROLE_RENEW_MS: u64 = 3_600_000;
/// How far a request's date may be from the service's clock.
const SKEW_MS: u64 = 15 * 60_000;

/// A key pair that somebody may sign with.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub access_key: String,
    pub secret: String,
    pub session_token: Option<String>,
    /// Actions the key may call, with or without `ec2:`, `*` for any run of characters; `None` for all.
    pub allow: Option<BTreeSet<String>>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("access_key", &self.access_key).finish_non_exhaustive()
    }
}

/// Somebody whose signature was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub access_key: String,
    pub arn: String,
    pub user_id: String,
    pub account_id: String,
    pub allow: Option<BTreeSet<String>>,
    /// Beside `allow`, for what hangs on resources and tags.
    pub policy: Option<Arc<Policy>>,
}

impl Caller {
    /// The lab itself, with every right.
    pub fn lab(account_id: &str) -> Self {
        Self {
            access_key: String::new(),
            arn: format!("arn:aws:iam::{account_id}:root"),
            user_id: account_id.to_owned(),
            account_id: account_id.to_owned(),
            allow: None,
            policy: None,
        }
    }

    pub fn permits(&self, action: &str) -> bool {
        self.allow
            .as_ref()
            .is_none_or(|allow| allow.iter().any(|rule| wildcard(rule.strip_prefix("ec2:").unwrap_or(rule), action)))
    }
}

/// Credentials as IMDS hands them out.
#[derive(Debug, Clone)]
pub(crate) struct RoleCredentials {
    pub(crate) access_key: String,
    pub(crate) secret: String,
    pub(crate) token: String,
    pub(crate) issued: Time,
    pub(crate) expires: Time,
}

pub(crate) struct Access {
    key: Vec<u8>,
    account_id: String,
    users: BTreeMap<String, Credentials>,
    roles: BTreeMap<String, Option<BTreeSet<String>>>,
    policies: BTreeMap<String, Arc<Policy>>,
    /// Handed out to instances; the expired ones are kept as long as someone might still come with them.
    issued: BTreeMap<String, (InstanceId, String, RoleCredentials)>,
}

impl Access {
    pub(crate) fn new(seed: u64, account_id: &str) -> Self {
        let mut access = Self {
            key: format!("flatwire lab {seed}").into_bytes(),
            account_id: account_id.to_owned(),
            users: BTreeMap::new(),
            roles: BTreeMap::from([(NODE_ROLE.to_owned(), None)]),
            policies: BTreeMap::new(),
            issued: BTreeMap::new(),
        };
        let admin = access.admin();
        access.add(admin);
        access
    }

    pub(crate) fn admin(&self) -> Credentials {
        Credentials {
            access_key: format!("AKIALAB{}", self.digest("admin key", 7).to_uppercase().get(..13).unwrap_or("")),
            secret: self.digest("admin secret", 20),
            session_token: None,
            allow: None,
        }
    }

    pub(crate) fn add(&mut self, credentials: Credentials) {
        self.users.insert(credentials.access_key.clone(), credentials);
    }

    pub(crate) fn set_role(&mut self, role: &str, allow: Option<BTreeSet<String>>) {
        self.roles.insert(role.to_owned(), allow);
        self.policies.remove(role);
    }

    pub(crate) fn set_policy(&mut self, role: &str, policy: Policy) {
        self.roles.insert(role.to_owned(), None);
        self.policies.insert(role.to_owned(), Arc::new(policy));
    }

    /// The first so many bytes of a keyed digest, in hexadecimal.
    pub(crate) fn digest(&self, what: &str, bytes: usize) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("invariant: HMAC takes keys of any length");
        mac.update(what.as_bytes());
        let digest = mac.finalize().into_bytes();
        hex::encode(digest.get(..bytes).unwrap_or(&digest))
    }

    /// The credentials of an instance's role, renewed in time.
    pub(crate) fn role_credentials(&mut self, now: Time, instance: &InstanceId, role: &str) -> RoleCredentials {
        self.issued.retain(|_, (_, _, c)| now.since_ms(c.expires) < ROLE_LIFE_MS);
        let current = self.issued.values().find(|(who, what, credentials)| {
            who == instance && what == role && credentials.expires.0 > now.plus_ms(ROLE_RENEW_MS).0
        });
        if let Some((_, _, credentials)) = current {
            return credentials.clone();
        }
        let subject = format!("{instance} {role} {}", now.0);
        let credentials = RoleCredentials {
            access_key: format!("ASIALAB{}", self.digest(&subject, 7).to_uppercase().get(..13).unwrap_or("")),
            secret: self.digest(&format!("secret of {subject}"), 20),
            token: self.digest(&format!("token of {subject}"), 32),
            issued: now,
            expires: now.plus_ms(ROLE_LIFE_MS),
        };
        let entry = (instance.clone(), role.to_owned(), credentials.clone());
        self.issued.insert(credentials.access_key.clone(), entry);
        credentials
    }

    pub(crate) fn authenticate(
        &mut self,
        now: Time,
        region: &str,
        request: &SignedRequest<'_>,
    ) -> Result<Caller, ApiError> {
        let claim = sigv4::claim(request)?;
        let sts = claim.service == "sts";
        let (secret, token, caller, expires) = self.known(&claim).ok_or_else(|| unknown_key(sts))?;
        if !matches!(claim.service.as_str(), "ec2" | "sts") || claim.region != region {
            return Err(ApiError::new(
                "AuthFailure",
                format!("Credential should be scoped to a valid region, not '{}'.", claim.region),
            ));
        }
        if !claim.matches(&secret, request) {
            return Err(wrong_signature(sts));
        }
        if token != claim.session_token {
            return Err(unknown_key(sts));
        }
        let skew_ms = claim.date.since_ms(now).max(now.since_ms(claim.date));
        let allowed_ms = claim.valid_ms.map_or(SKEW_MS, |valid| valid.max(SKEW_MS));
        if skew_ms > allowed_ms || expires.is_some_and(|expires| expires <= now) {
            return Err(match sts {
                true => ApiError::new("ExpiredToken", "The security token included in the request is expired"),
                false => ApiError::new("RequestExpired", "Request has expired."),
            });
        }
        Ok(caller)
    }

    fn known(&self, claim: &Claim) -> Option<(String, Option<String>, Caller, Option<Time>)> {
        if let Some((instance, role, credentials)) = self.issued.get(&claim.access_key) {
            let caller = Caller {
                access_key: claim.access_key.clone(),
                arn: format!("arn:aws:sts::{}:assumed-role/{role}/{instance}", self.account_id),
                user_id: format!("AROALAB{}:{instance}", self.digest(role, 7).to_uppercase()),
                account_id: self.account_id.clone(),
                allow: self.roles.get(role).cloned().unwrap_or(Some(BTreeSet::new())),
                policy: self.policies.get(role).cloned(),
            };
            let token = Some(credentials.token.clone());
            return Some((credentials.secret.clone(), token, caller, Some(credentials.expires)));
        }
        let user = self.users.get(&claim.access_key)?;
        let caller = Caller {
            access_key: user.access_key.clone(),
            arn: format!("arn:aws:iam::{}:user/{}", self.account_id, user.access_key),
            user_id: format!("AIDA{}", user.access_key.get(4..).unwrap_or("")),
            account_id: self.account_id.clone(),
            allow: user.allow.clone(),
            policy: None,
        };
        Some((user.secret.clone(), user.session_token.clone(), caller, None))
    }
}

/// The refusal of an action that the caller's policy does not name.
pub(crate) fn unauthorized(caller: &Caller, action: &str) -> ApiError {
    let arn = &caller.arn;
    let sealed = hex::encode(format!("{{\"allowed\":false,\"action\":\"ec2:{action}\",\"principal\":\"{arn}\"}}"));
    ApiError::new(
        "UnauthorizedOperation",
        format!(
            "You are not authorized to perform this operation. User: {arn} is not authorized to perform: ec2:{action} \
             because no identity-based policy allows the ec2:{action} action. Encoded authorization failure message: \
             {sealed}"
        ),
    )
}

fn unknown_key(sts: bool) -> ApiError {
    match sts {
        true => ApiError::new("InvalidClientTokenId", "The security token included in the request is invalid."),
        false => auth_failure(),
    }
}

fn wrong_signature(sts: bool) -> ApiError {
    match sts {
        true => ApiError::new(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided.",
        ),
        false => auth_failure(),
    }
}

/// EC2 says the same to an unknown key and to a wrong signature.
fn auth_failure() -> ApiError {
    ApiError::new("AuthFailure", "AWS was not able to validate the provided access credentials")
}
