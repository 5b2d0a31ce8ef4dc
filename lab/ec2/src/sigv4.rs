//! AWS Signature Version 4: what a request claims, and whether its signature is right. Header and presigned form.

use std::collections::BTreeMap;

use flatwire_core::ids::Time;
use hmac::{Hmac, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sha2::{Digest, Sha256};

use crate::access::Credentials;
use crate::error::ApiError;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
/// RFC 3986: these four stay as they are, everything else that is no letter or digit is escaped.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A request as it came, for checking.
#[derive(Debug, Clone, Copy)]
pub struct SignedRequest<'a> {
    pub method: &'a str,
    pub path: &'a str,
    /// Without the question mark; empty if there is none.
    pub query: &'a str,
    pub headers: &'a [(String, String)],
    pub body: &'a [u8],
}

impl SignedRequest<'_> {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Who a request says it is from, and with which signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) access_key: String,
    pub(crate) region: String,
    pub(crate) service: String,
    pub(crate) date: Time,
    pub(crate) session_token: Option<String>,
    /// How long a presigned request is good for.
    pub(crate) valid_ms: Option<u64>,
    scope_date: String,
    date_text: String,
    signed_headers: String,
    signature: String,
    presigned: bool,
}

pub(crate) fn claim(request: &SignedRequest<'_>) -> Result<Claim, ApiError> {
    let query: BTreeMap<String, String> = decode_pairs(request.query).into_iter().collect();
    let presigned = query.contains_key("X-Amz-Signature");
    let (fields, date_text, session_token) = match request.header("authorization") {
        Some(header) => {
            let rest = header.strip_prefix(ALGORITHM).ok_or_else(|| incomplete("unsupported authorization type"))?;
            let fields: BTreeMap<String, String> = rest
                .split(',')
                .filter_map(|part| part.trim().split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            (fields, request.header("x-amz-date"), request.header("x-amz-security-token"))
        }
        None if presigned => {
            let field = |name: &str, from: &str| Some((name.to_owned(), query.get(from)?.clone()));
            let fields = [
                field("Credential", "X-Amz-Credential"),
                field("SignedHeaders", "X-Amz-SignedHeaders"),
                field("Signature", "X-Amz-Signature"),
            ];
            let text = |name: &str| query.get(name).map(String::as_str);
            (fields.into_iter().flatten().collect(), text("X-Amz-Date"), text("X-Amz-Security-Token"))
        }
        None => {
            return Err(ApiError::new("MissingAuthenticationToken", "Request is missing Authentication Token"));
        }
    };
    let field = |name: &str| {
        fields.get(name).cloned().ok_or_else(|| incomplete(&format!("Authorization header requires '{name}'")))
    };
    let credential = field("Credential")?;
    let mut scope = credential.split('/');
    let mut part = || scope.next().unwrap_or("").to_owned();
    let (access_key, scope_date, region, service, end) = (part(), part(), part(), part(), part());
    if end != "aws4_request" {
        return Err(incomplete("Credential must have 5 parts and end with aws4_request"));
    }
    let date_text = date_text.unwrap_or("").to_owned();
    let date = parse_date(&date_text).ok_or_else(|| incomplete("Date must be in ISO-8601 'basic format'"))?;
    if !date_text.starts_with(&scope_date) {
        return Err(incomplete("Date in Credential scope does not match the date of the request"));
    }
    let valid_secs: Option<u64> = query.get("X-Amz-Expires").filter(|_| presigned).and_then(|s| s.parse().ok());
    Ok(Claim {
        access_key,
        region,
        service,
        date,
        session_token: session_token.map(str::to_owned),
        valid_ms: valid_secs.map(|secs| secs.saturating_mul(1_000)),
        scope_date,
        date_text,
        signed_headers: field("SignedHeaders")?,
        signature: field("Signature")?,
        presigned: request.header("authorization").is_none(),
    })
}

impl Claim {
    pub(crate) fn matches(&self, secret: &str, request: &SignedRequest<'_>) -> bool {
        let headers: Vec<&str> = self.signed_headers.split(';').collect();
        if !headers.contains(&"host") {
            return false;
        }
        let canonical = canonical_request(request, &headers, self.presigned);
        let scope = format!("{}/{}/{}/aws4_request", self.scope_date, self.region, self.service);
        let signature = sign_text(secret, &self.date_text, &scope, &canonical);
        same(&signature, &self.signature)
    }
}

/// The headers that sign a request: `authorization`, `x-amz-date` and, with a session, `x-amz-security-token`. The
/// request's own headers must hold `host` and are signed too.
pub fn sign(
    credentials: &Credentials,
    region: &str,
    service: &str,
    now: Time,
    request: &SignedRequest<'_>,
) -> Vec<(String, String)> {
    let date = date_text(now);
    let mut added = vec![("x-amz-date".to_owned(), date.clone())];
    added.extend(credentials.session_token.clone().map(|token| ("x-amz-security-token".to_owned(), token)));
    let headers: Vec<(String, String)> = request
        .headers
        .iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
        .chain(added.clone())
        .collect();
    let mut names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let scope = format!("{}/{region}/{service}/aws4_request", date.get(..8).unwrap_or(""));
    let canonical = canonical_request(&SignedRequest { headers: &headers, ..*request }, &names, false);
    let signature = sign_text(&credentials.secret, &date, &scope, &canonical);
    added.push((
        "authorization".to_owned(),
        format!(
            "{ALGORITHM} Credential={}/{scope}, SignedHeaders={}, Signature={signature}",
            credentials.access_key,
            names.join(";")
        ),
    ));
    added
}

/// The pairs of `application/x-www-form-urlencoded` text.
pub(crate) fn decode_pairs(text: &str) -> Vec<(String, String)> {
    let decode = |part: &str| percent_decode_str(&part.replace('+', " ")).decode_utf8_lossy().into_owned();
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

fn canonical_request(request: &SignedRequest<'_>, signed: &[&str], presigned: bool) -> String {
    let path: Vec<String> = request.path.split('/').map(encode).collect();
    let mut query: Vec<(String, String)> = decode_pairs(request.query)
        .into_iter()
        .filter(|(name, _)| !presigned || name != "X-Amz-Signature")
        .map(|(name, value)| (encode(&name), encode(&value)))
        .collect();
    query.sort();
    let query: Vec<String> = query.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut headers = String::new();
    for name in signed {
        let values: Vec<String> = request
            .headers
            .iter()
            .filter(|(given, _)| given.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        headers.push_str(&format!("{name}:{}\n", values.join(",")));
    }
    format!(
        "{}\n{}\n{}\n{headers}\n{}\n{}",
        request.method,
        path.join("/"),
        query.join("&"),
        signed.join(";"),
        hex::encode(Sha256::digest(request.body))
    )
}

fn sign_text(secret: &str, date: &str, scope: &str, canonical: &str) -> String {
    let text = format!("{ALGORITHM}\n{date}\n{scope}\n{}", hex::encode(Sha256::digest(canonical)));
    let mut key = format!("AWS4{secret}").into_bytes();
    for part in scope.split('/') {
        key = mac(&key, part);
    }
    hex::encode(mac(&key, &text))
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("invariant: HMAC takes keys of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// Looks at every byte, whatever the first difference.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |difference, (x, y)| difference | (x ^ y)) == 0
}

fn parse_date(text: &str) -> Option<Time> {
    let civil = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", text).ok()?;
    let stamp = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    u64::try_from(stamp.as_millisecond()).ok().map(Time)
}

fn date_text(now: Time) -> String {
    crate::stamp(now).strftime("%Y%m%dT%H%M%SZ").to_string()
}

fn incomplete(message: &str) -> ApiError {
    ApiError::new("IncompleteSignature", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        Credentials {
            access_key: "AKIDEXAMPLE".into(),
            secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".into(),
            session_token: None,
            allow: None,
        }
    }

    fn headers(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// "get-vanilla-query-order-key-case" of the published AWS Signature Version 4 test suite.
    #[test]
    fn the_published_vector_is_signed_as_published() {
        let headers = headers(&[("host", "example.amazonaws.com")]);
        let request = SignedRequest {
            method: "GET",
            path: "/",
            query: "Param2=value2&Param1=value1",
            headers: &headers,
            body: b"",
        };
        let now = parse_date("20150830T123600Z").unwrap();
        let signed = sign(&credentials(), "us-east-1", "service", now, &request);
        let (_, authorization) = signed.iter().find(|(name, _)| name == "authorization").unwrap();
        assert_eq!(
            authorization,
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, \
             SignedHeaders=host;x-amz-date, \
             Signature=b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"
        );
    }

    #[test]
    fn a_changed_request_does_not_match() {
        let plain = headers(&[("Host", "127.0.0.1:80"), ("content-type", "application/x-www-form-urlencoded")]);
        let body = b"Action=DescribeVpcs&Filter.1.Name=a%20b".as_slice();
        let request = SignedRequest { method: "POST", path: "/", query: "", headers: &plain, body };
        let added = sign(&credentials(), "us-east-1", "ec2", Time(1_700_000_000_000), &request);
        let whole: Vec<_> = plain.iter().cloned().chain(added).collect();
        let good = SignedRequest { headers: &whole, ..request };
        let secret = credentials().secret;
        let check = |request: &SignedRequest<'_>, secret: &str| claim(request).unwrap().matches(secret, request);
        assert!(check(&good, &secret));
        assert!(!check(&good, "other"));
        assert!(!check(&SignedRequest { body: b"Action=DeleteVpc", ..good }, &secret));
        assert!(!check(&SignedRequest { query: "Action=DeleteVpc", ..good }, &secret));
        assert_eq!(claim(&good).unwrap().date, Time(1_700_000_000_000));
    }

    #[test]
    fn unsigned_and_half_signed_requests_are_told_apart() {
        let none = SignedRequest { method: "GET", path: "/", query: "", headers: &[], body: b"" };
        assert_eq!(claim(&none).unwrap_err().code, "MissingAuthenticationToken");
        for value in
            ["Basic x", "AWS4-HMAC-SHA256 Credential=a/b/c", "AWS4-HMAC-SHA256 Credential=a/1/r/ec2/aws4_request"]
        {
            let headers = headers(&[("authorization", value)]);
            let error = claim(&SignedRequest { headers: &headers, ..none }).unwrap_err();
            assert_eq!(error.code, "IncompleteSignature", "{value}");
        }
    }
}
