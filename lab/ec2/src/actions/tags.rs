//! CreateTags, DeleteTags, DescribeTags.

use super::{Call, done, read_tags};
use crate::error::ApiError;
use crate::filters::{Filters, Page};
use crate::params::Reader;
use crate::state::State;
use crate::view::Tags;
use crate::xml::Xml;

pub(super) fn create(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids = resources(p)?;
    let tags = read_tags(p)?;
    p.end_or_dry_run()?;
    if tags.is_empty() {
        return Err(ApiError::missing("Tag"));
    }
    state.change_tags(call.now, &ids, |old| old.extend(tags.clone()))?;
    Ok(done())
}

/// A tag with a value goes only if the value is the tag's; one without a value goes whatever it is; no tag at all
/// means every tag.
pub(super) fn delete(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let ids = resources(p)?;
    let mut doomed = Vec::new();
    for tag in p.structs("Tag")? {
        let (key, value) = (tag.required("Key")?, tag.opt("Value"));
        crate::state::tags::check(key, value.unwrap_or(""))?;
        doomed.push((key, value));
    }
    p.end_or_dry_run()?;
    state.change_tags(call.now, &ids, |tags| {
        tags.retain(|key, value| {
            !doomed.is_empty() && !doomed.iter().any(|(k, v)| k == key && v.is_none_or(|v| v == value))
        });
    })?;
    Ok(done())
}

fn resources<'a>(p: &Reader<'a>) -> Result<Vec<&'a str>, ApiError> {
    let ids = p.list("ResourceId")?;
    if ids.is_empty() { Err(ApiError::missing("ResourceId")) } else { Ok(ids) }
}

pub(super) fn describe(state: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let filters = Filters::read(p, &["key", "resource-id", "resource-type", "value"], true)?;
    let page = Page::read(p, call.action, 1_000, false)?;
    p.end_or_dry_run()?;
    let mut items: Vec<(String, &str, &str, &str)> = Vec::new();
    for (id, kind, tags) in state.all_tags() {
        for (key, value) in tags {
            let only = Tags::from([(key.clone(), value.clone())]);
            let keep = filters.keep(&only, |name| match name {
                "key" => vec![key.clone()],
                "resource-id" => vec![id.clone()],
                "resource-type" => vec![kind.to_owned()],
                "value" => vec![value.clone()],
                _ => Vec::new(),
            });
            if keep {
                items.push((id.clone(), kind, key, value));
            }
        }
    }
    let place = |(id, _, key, _): &(String, &str, &str, &str)| format!("{id} {key}");
    items.sort_by_key(place);
    let (items, token) = page.cut(call.action, items, place);
    let mut xml = Xml::new();
    xml.list("tagSet", items, |xml, (id, kind, key, value)| {
        xml.leaf("resourceId", id).leaf("resourceType", kind).leaf("key", key).leaf("value", value);
    });
    xml.opt("nextToken", token);
    Ok(xml)
}
