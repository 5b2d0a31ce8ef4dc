#!/usr/bin/env python3
"""Makes ipamd/core/data/instance-types.tsv from the instance types that moto ships.

usage: pip download --no-deps moto==VERSION && python3 instance_types.py moto-VERSION-*.whl > instance-types.tsv
The date in the heading is the wheel's own, so that the same wheel always gives the same file.
"""

import gzip
import json
import sys
import zipfile

COLUMNS = (
    "type hypervisor bare_metal current_generation vcpus memory_mib max_enis ipv4_per_eni ipv6_per_eni ipv6 cards "
    "architectures"
).split()


def yes(value):
    return "yes" if value else "no"


def row(name, entry):
    network = entry["NetworkInfo"]
    cards = sorted(network["NetworkCards"], key=lambda card: card["NetworkCardIndex"])
    counts = [card["MaximumNetworkInterfaces"] for card in cards]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(len(cards))), name
    return [
        name,
        entry.get("Hypervisor") or "none",
        yes(entry["BareMetal"]),
        yes(entry["CurrentGeneration"]),
        entry["VCpuInfo"]["DefaultVCpus"],
        entry["MemoryInfo"]["SizeInMiB"],
        counts[network["DefaultNetworkCardIndex"]],
        network["Ipv4AddressesPerInterface"],
        network.get("Ipv6AddressesPerInterface", 0),
        yes(network["Ipv6Supported"]),
        ",".join(map(str, counts)),
        ",".join(sorted(entry["ProcessorInfo"]["SupportedArchitectures"])),
    ]


def main(wheel):
    version = wheel.rsplit("/", 1)[-1].split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        entry = archive.getinfo("moto/ec2/resources/instance_types.json.gz")
        date = "{:04}-{:02}-{:02}".format(*entry.date_time)
        types = json.loads(gzip.decompress(archive.read(entry)))
    print(f"# EC2 instance types: limits of network interfaces and addresses. Source: moto {version} of {date},")
    print("# moto/ec2/resources/instance_types.json.gz, Apache License 2.0; reduced by lab/ec2/data/instance_types.py.")
    print("# max_enis counts the default network card; cards lists every card's own maximum, by card index.")
    print("# " + "\t".join(COLUMNS))
    for name in sorted(types, key=str.encode):
        print(*row(name, types[name]), sep="\t")


main(*sys.argv[1:])
