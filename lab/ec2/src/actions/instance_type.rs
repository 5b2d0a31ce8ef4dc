//! DescribeInstanceTypes: the table of `flatwire_core::limits` as EC2 shows it.

use flatwire_core::limits::{self, Hypervisor, InstanceType};

use super::Call;
use crate::error::ApiError;
use crate::filters::{Filters, Page};
use crate::params::Reader;
use crate::state::State;
use crate::view::Tags;
use crate::xml::Xml;

const PAGE_MAX: u32 = 100;

const FILTERS: &[&str] = &[
    "bare-metal",
    "current-generation",
    "hypervisor",
    "instance-type",
    "memory-info.size-in-mib",
    "network-info.ipv4-addresses-per-interface",
    "network-info.ipv6-addresses-per-interface",
    "network-info.ipv6-supported",
    "network-info.maximum-network-cards",
    "network-info.maximum-network-interfaces",
    "processor-info.supported-architecture",
    "vcpu-info.default-vcpus",
];

pub(super) fn describe(_: &mut State, call: &Call<'_>, p: &Reader<'_>) -> Result<Xml, ApiError> {
    let names = p.list("InstanceType")?;
    let filters = Filters::read(p, FILTERS, false)?;
    let page = Page::read(p, call.action, PAGE_MAX, !names.is_empty())?;
    p.ignore(&["IncludeUnsupportedInRegion"]);
    p.end_or_dry_run()?;
    let unknown: Vec<&str> = names.iter().copied().filter(|name| limits::lookup(name).is_none()).collect();
    if !unknown.is_empty() {
        return Err(ApiError::new(
            "InvalidInstanceType",
            format!("The following supplied instance types do not exist: [{}]", unknown.join(", ")),
        ));
    }
    let types: Vec<&InstanceType> = limits::all()
        .filter(|kind| names.is_empty() || names.contains(&kind.name))
        .filter(|kind| filters.keep(&Tags::new(), |name| field(kind, name)))
        .collect();
    // Without a page size this action answers in pages of a hundred all the same.
    let (types, token) = page.or_size(PAGE_MAX).cut(call.action, types, |kind| kind.name.to_owned());
    let mut xml = Xml::new();
    xml.list("instanceTypeSet", types, write_type);
    xml.opt("nextToken", token);
    Ok(xml)
}

fn field(kind: &InstanceType, name: &str) -> Vec<String> {
    match name {
        "bare-metal" => vec![kind.bare_metal.to_string()],
        "current-generation" => vec![kind.current_generation.to_string()],
        "hypervisor" => hypervisor(kind).map(str::to_owned).into_iter().collect(),
        "instance-type" => vec![kind.name.to_owned()],
        "memory-info.size-in-mib" => vec![kind.memory_mib.to_string()],
        "network-info.ipv4-addresses-per-interface" => vec![kind.ipv4_per_eni.to_string()],
        "network-info.ipv6-addresses-per-interface" => vec![kind.ipv6_per_eni.to_string()],
        "network-info.ipv6-supported" => vec![kind.ipv6.to_string()],
        "network-info.maximum-network-cards" => vec![kind.cards.len().to_string()],
        "network-info.maximum-network-interfaces" => vec![enis(kind).to_string()],
        "processor-info.supported-architecture" => kind.architectures.iter().map(ToString::to_string).collect(),
        "vcpu-info.default-vcpus" => vec![kind.vcpus.to_string()],
        _ => Vec::new(),
    }
}

fn hypervisor(kind: &InstanceType) -> Option<&'static str> {
    match kind.hypervisor {
        Hypervisor::Nitro => Some("nitro"),
        Hypervisor::Xen => Some("xen"),
        Hypervisor::None => None,
    }
}

fn enis(kind: &InstanceType) -> u32 {
    kind.cards.iter().sum()
}

fn write_type(xml: &mut Xml, kind: &InstanceType) {
    xml.leaf("instanceType", kind.name)
        .leaf("currentGeneration", kind.current_generation)
        .leaf("bareMetal", kind.bare_metal)
        .opt("hypervisor", hypervisor(kind));
    xml.element("processorInfo", |xml| {
        xml.texts("supportedArchitectures", &kind.architectures);
    });
    xml.element("vCpuInfo", |xml| {
        xml.leaf("defaultVCpus", kind.vcpus);
    });
    xml.element("memoryInfo", |xml| {
        xml.leaf("sizeInMiB", kind.memory_mib);
    });
    xml.element("networkInfo", |xml| {
        xml.leaf("maximumNetworkInterfaces", enis(kind))
            .leaf("maximumNetworkCards", kind.cards.len())
            .leaf("defaultNetworkCardIndex", 0);
        xml.list("networkCards", kind.cards.iter().enumerate(), |xml, (card, count)| {
            xml.leaf("networkCardIndex", card).leaf("maximumNetworkInterfaces", count);
        });
        xml.leaf("ipv4AddressesPerInterface", kind.ipv4_per_eni)
            .leaf("ipv6AddressesPerInterface", kind.ipv6_per_eni)
            .leaf("ipv6Supported", kind.ipv6);
    });
}
