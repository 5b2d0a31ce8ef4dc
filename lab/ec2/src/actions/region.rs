//! Where and who: zones, regions, and STS's GetCallerIdentity, which this endpoint answers too.

use super::Call;
use crate::error::ApiError;
use crate::filters::Filters;
use crate::params::Reader;
use crate::state::State;
use crate::state::vpc::zones;
use crate::view::Tags;
use crate::xml::Xml;

pub(super) fn describe_zones(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let names = p.list("ZoneName")?;
    let ids = p.list("ZoneId")?;
    let filters = Filters::read(p, &["region-name", "state", "zone-id", "zone-name", "zone-type"], false)?;
    p.ignore(&["AllAvailabilityZones"]);
    p.end_or_dry_run()?;
    let region = state.options.region.clone();
    let zones = zones(&region);
    let unknown = names.iter().find(|name| zones.iter().all(|zone| zone.name != **name));
    if let Some(unknown) = unknown {
        return Err(ApiError::value(format!("Invalid availability zone: [{unknown}]")));
    }
    let zones = zones.into_iter().filter(|zone| {
        (names.is_empty() || names.contains(&zone.name.as_str()))
            && (ids.is_empty() || ids.contains(&zone.id.as_str()))
            && filters.keep(&Tags::new(), |name| {
                vec![match name {
                    "region-name" => region.clone(),
                    "state" => "available".to_owned(),
                    "zone-id" => zone.id.clone(),
                    "zone-name" => zone.name.clone(),
                    _ => "availability-zone".to_owned(),
                }]
            })
    });
    let mut xml = Xml::new();
    xml.list("availabilityZoneInfo", zones, |xml, zone| {
        xml.leaf("zoneName", zone.name)
            .leaf("zoneId", zone.id)
            .leaf("zoneState", "available")
            .leaf("regionName", &region)
            .leaf("optInStatus", "opt-in-not-required")
            .leaf("groupName", &region)
            .leaf("networkBorderGroup", &region)
            .leaf("zoneType", "availability-zone");
    });
    Ok(xml)
}

pub(super) fn describe_regions(state: &mut State, _: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let names = p.list("RegionName")?;
    let filters = Filters::read(p, &["endpoint", "opt-in-status", "region-name"], false)?;
    p.ignore(&["AllRegions"]);
    p.end_or_dry_run()?;
    let region = state.options.region.clone();
    if let Some(unknown) = names.iter().find(|name| **name != region) {
        return Err(ApiError::value(format!("Invalid region names: [{unknown}]")));
    }
    let endpoint = format!("ec2.{region}.amazonaws.com");
    let keep = filters.keep(&Tags::new(), |name| {
        vec![match name {
            "endpoint" => endpoint.clone(),
            "region-name" => region.clone(),
            _ => "opt-in-not-required".to_owned(),
        }]
    });
    let mut xml = Xml::new();
    xml.list("regionInfo", keep.then_some(&region), |xml, region| {
        xml.leaf("regionName", region).leaf("regionEndpoint", &endpoint).leaf("optInStatus", "opt-in-not-required");
    });
    Ok(xml)
}

pub(super) fn caller_identity(_: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    p.end()?;
    let mut xml = Xml::new();
    xml.leaf("Arn", &call.caller.arn).leaf("UserId", &call.caller.user_id).leaf("Account", &call.caller.account_id);
    Ok(xml)
}
