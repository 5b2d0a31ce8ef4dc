//! Filters and pages of the `Describe*` actions.

use std::fmt::Display;

use crate::error::ApiError;
use crate::params::Reader;
use crate::view::Tags;

const VALUES_MAX: usize = 200;

/// `Filter.N`: every filter must match, each by any of its values.
#[derive(Debug, Clone)]
pub(crate) struct Filters(Vec<(String, Vec<String>)>);

impl Filters {
    /// Refuses names that are not among `known`; `tag:KEY` and `tag-key` are known where `tagged`.
    pub(crate) fn read(reader: &Reader<'_>, known: &[&str], tagged: bool) -> Result<Self, ApiError> {
        let mut filters = Vec::new();
        for entry in reader.structs("Filter")? {
            let name = entry.required("Name")?;
            let is_tag = tagged && (name.starts_with("tag:") || name == "tag-key");
            if !is_tag && !known.contains(&name) {
                return Err(ApiError::value(format!("The filter '{name}' is invalid")));
            }
            let values: Vec<String> = entry.list("Value")?.into_iter().map(str::to_owned).collect();
            if values.len() > VALUES_MAX {
                return Err(ApiError::new(
                    "FilterLimitExceeded",
                    format!("The maximum number of filter values specified on a single call is {VALUES_MAX}"),
                ));
            }
            if values.is_empty() {
                return Err(ApiError::value("The filter 'null' is invalid"));
            }
            filters.push((name.to_owned(), values));
        }
        Ok(Self(filters))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object is wanted. `field` gives every value the object has under a filter's name.
    pub(crate) fn keep(&self, tags: &Tags, field: impl Fn(&str) -> Vec<String>) -> bool {
        self.0.iter().all(|(name, patterns)| {
            let has: Vec<String> = match name.strip_prefix("tag:") {
                Some(key) => tags.get(key).cloned().into_iter().collect(),
                None if name == "tag-key" => tags.keys().cloned().collect(),
                None => field(name),
            };
            has.iter().any(|value| patterns.iter().any(|pattern| wildcard(pattern, value)))
        })
    }
}

/// EC2's patterns: `*` for any run of characters, `?` for one, a backslash before either for the character itself.
pub(crate) fn wildcard(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    // One row of the usual table: `reach[i]` says that the pattern so far matches the first i characters.
    let mut reach = vec![false; text.len() + 1];
    reach[0] = true;
    let mut at = 0;
    while let Some(&c) = pattern.get(at) {
        let escaped = (c == '\\').then(|| pattern.get(at + 1)).flatten().copied();
        at += if escaped.is_some() { 2 } else { 1 };
        if c == '*' {
            let first = reach.iter().position(|r| *r).unwrap_or(reach.len());
            reach.iter_mut().skip(first).for_each(|r| *r = true);
            continue;
        }
        let fits = |given: char| match escaped {
            Some(literal) => literal == given,
            None => c == '?' || c == given,
        };
        for i in (1..reach.len()).rev() {
            reach[i] = reach[i - 1] && fits(text[i - 1]);
        }
        reach[0] = false;
    }
    reach[text.len()]
}

/// `MaxResults` and `NextToken`.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    size: Option<usize>,
    /// Everything up to and including this key has been shown.
    after: Option<String>,
}

impl Page {
    /// `by_id` says that the request names its objects, which excludes pages.
    pub(crate) fn read(reader: &Reader<'_>, action: &str, max: u32, by_id: bool) -> Result<Self, ApiError> {
        let size = reader.number("MaxResults")?;
        let token = reader.opt("NextToken").filter(|token| !token.is_empty());
        if by_id && size.is_some() {
            return Err(ApiError::combination(
                "The parameter maxResults cannot be used with the parameter that names the objects by id",
            ));
        }
        if let Some(size) = size.filter(|size| !(5..=max).contains(size)) {
            let bound = if size < 5 { "greater than 5" } else { "less than the maximum" };
            return Err(ApiError::value(format!(
                "Value ( {size} ) for parameter maxResults is invalid. Expecting a value {bound}."
            )));
        }
        let after = token.map(|token| open_token(action, token)).transpose()?;
        Ok(Self { size: size.and_then(|size| usize::try_from(size).ok()), after })
    }

    /// A page of so many after the one whose token this is.
    pub(crate) fn of(action: &str, size: Option<u32>, token: Option<&str>) -> Result<Self, ApiError> {
        let after = token.map(|token| open_token(action, token)).transpose()?;
        Ok(Self { size: size.and_then(|size| usize::try_from(size).ok()), after })
    }

    /// For actions that page by themselves.
    pub(crate) fn or_size(self, size: u32) -> Self {
        Self { size: self.size.or(usize::try_from(size).ok()), after: self.after }
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.size.is_none() && self.after.is_none()
    }

    /// The page that was asked for, and the token of the next one. Items are in the order of their keys: what appears
    /// or goes between two pages may be missed or seen, as in EC2, but nothing comes twice.
    pub(crate) fn cut<T>(&self, action: &str, items: Vec<T>, key: impl Fn(&T) -> String) -> (Vec<T>, Option<String>) {
        let mut rest: Vec<T> =
            items.into_iter().filter(|item| self.after.as_ref().is_none_or(|after| key(item) > *after)).collect();
        match self.size {
            Some(size) if rest.len() > size => {
                rest.truncate(size);
                let token = rest.last().map(|last| seal_token(action, key(last)));
                (rest, token)
            }
            _ => (rest, None),
        }
    }
}

fn seal_token(action: &str, key: impl Display) -> String {
    hex::encode(format!("{action}\n{key}"))
}

fn open_token(action: &str, token: &str) -> Result<String, ApiError> {
    let plain = hex::decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let key = plain.as_deref().and_then(|plain| plain.strip_prefix(action)).and_then(|rest| rest.strip_prefix('\n'));
    key.map(str::to_owned)
        .ok_or_else(|| ApiError::new("InvalidPaginationToken", "The specified pagination token is not valid."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Params;

    #[test]
    fn patterns_match_as_ec2s_do() {
        let table = [
            ("abc", "abc", true),
            ("abc", "ABC", false),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*c*", "abcc", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            (r"a\*c", "a*c", true),
            (r"a\*c", "abc", false),
            (r"a\?", "a?", true),
        ];
        for (pattern, text, matches) in table {
            assert_eq!(wildcard(pattern, text), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn pages_cover_everything_once() {
        let items: Vec<u32> = (100..123).collect();
        let mut seen = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let mut pairs = vec![("MaxResults".to_owned(), "5".to_owned())];
            pairs.extend(token.clone().map(|token| ("NextToken".to_owned(), token)));
            let params = Params::new(pairs);
            let page = Page::read(&Reader::new(&params), "DescribeX", 1_000, false).unwrap();
            let (some, next) = page.cut("DescribeX", items.clone(), u32::to_string);
            seen.extend(some);
            token = next;
            if token.is_none() {
                break;
            }
        }
        assert_eq!(seen, items);
    }

    #[test]
    fn bad_pages_are_refused() {
        let table = [
            (vec![("MaxResults", "4")], false, "InvalidParameterValue"),
            (vec![("MaxResults", "1001")], false, "InvalidParameterValue"),
            (vec![("MaxResults", "5")], true, "InvalidParameterCombination"),
            (vec![("NextToken", "zz")], false, "InvalidPaginationToken"),
            (vec![("NextToken", "6161")], false, "InvalidPaginationToken"),
        ];
        for (pairs, by_id, code) in table {
            let params = Params::new(pairs);
            assert_eq!(Page::read(&Reader::new(&params), "X", 1_000, by_id).unwrap_err().code, code);
        }
    }

    #[test]
    fn unknown_filters_and_too_many_values_are_refused() {
        let read = |pairs: Vec<(String, String)>| {
            let params = Params::new(pairs);
            Filters::read(&Reader::new(&params), &["vpc-id"], true).map(drop)
        };
        let named = |name: &str| {
            vec![("Filter.1.Name".to_owned(), name.to_owned()), ("Filter.1.Value.1".to_owned(), "x".to_owned())]
        };
        assert_eq!(read(named("colour")).unwrap_err().message, "The filter 'colour' is invalid");
        assert!(read(named("tag:a")).is_ok() && read(named("tag-key")).is_ok() && read(named("vpc-id")).is_ok());
        let mut many = named("vpc-id");
        many.extend((1..=201).map(|n| (format!("Filter.1.Value.{n}"), "x".to_owned())));
        assert_eq!(read(many).unwrap_err().code, "FilterLimitExceeded");
    }
}
