#!/usr/bin/env python3
"""The image of deploy/Dockerfile without docker: an OCI image as one tar file, out of binaries that are there already.

usage: deploy/image.py OUT.tar [--programs target/flatwire] [--plugins FOLDER] [--name flatwire:0.1.0]

Needs Python alone, no root, no registry. The same input gives the same bytes. `ctr -n k8s.io images import OUT.tar`,
`podman load -i OUT.tar` and `skopeo copy oci-archive:OUT.tar docker://…` take it. Plugins (portmap, bandwidth, loopback) are
put beside the daemon for nodes that lack them; they must be static.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import sys
import tarfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def refuse(text):
    sys.exit(f"image.py: {text}")


def add(archive, name, content, mode):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def folder(archive, name):
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    archive.addfile(entry)


def read(path, way_out):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror}); {way_out}")


def program(path, way_out):
    content = read(path, way_out)
    # The name of a loader in an ELF file: there is none in the image.
    if b"/lib64/ld-linux" in content or b"/lib/ld-linux" in content:
        refuse(f"{path} is linked dynamically, and the image holds no libraries; {way_out}")
    return content


def layer(programs, plugins):
    """The file system, as a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("etc", "etc/ssl", "etc/ssl/certs", "flatwire", "flatwire/plugins"):
            folder(archive, name)
        add(archive, CERTIFICATES[1:], read(CERTIFICATES, "apt-get install ca-certificates"), 0o644)
        for name in ("ipamd", "aws-cni"):
            add(archive, f"flatwire/{name}", program(os.path.join(programs, name), "run: make build"), 0o755)
        for name in sorted(os.listdir(plugins)) if plugins else []:
            add(archive, f"flatwire/plugins/{name}", program(os.path.join(plugins, name), "use static plugins"), 0o755)
        for name in ("LICENSE", "NOTICE"):
            add(archive, f"flatwire/{name}", read(os.path.join(ROOT, name), "the repository has it"), 0o644)
    return out.getvalue()


def write(out, name, files, entrypoint, cmd):
    """One layer, its configuration, and what describes them, as one tar file."""
    architecture = ARCHITECTURES.get(platform.machine()) or refuse(f"no name for {platform.machine()} in an image")
    repository, _, tag = name.rpartition(":")
    if not repository:
        refuse(f"--name {name!r} is no repository with a tag, such as flatwire:0.1.0")
    blobs = {}

    def blob(content, kind):
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    packed = blob(gzip.compress(files, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"User": "0:0", "Env": ["PATH=/flatwire"], "Entrypoint": entrypoint, "Cmd": cmd},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(files).hexdigest()}"]},
    }
    as_json = lambda value: json.dumps(value, sort_keys=True).encode()  # noqa: E731
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(as_json(config), "application/vnd.oci.image.config.v1+json"),
        "layers": [packed],
    }
    # containerd takes the first of the two for the image's name, podman and skopeo the second for its tag.
    full = name if "/" in repository else f"docker.io/library/{name}"
    names = {"io.containerd.image.name": full, "org.opencontainers.image.ref.name": tag}
    described = blob(as_json(manifest), manifest["mediaType"])
    described |= {"annotations": names, "platform": {"architecture": architecture, "os": "linux"}}
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [described]}

    beside = f"{out}.new"
    with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, "oci-layout", as_json({"imageLayoutVersion": "1.0.0"}), 0o644)
        add(archive, "index.json", as_json(index), 0o644)
        folder(archive, "blobs")
        folder(archive, "blobs/sha256")
        for digest, content in sorted(blobs.items()):
            add(archive, f"blobs/sha256/{digest}", content, 0o644)
    os.replace(beside, out)
    print(f"image: {out} {full} {described['digest']} {os.path.getsize(out) // 1024} KiB")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out")
    arguments.add_argument("--programs", default=os.path.join(ROOT, "target/flatwire"))
    arguments.add_argument("--plugins")
    arguments.add_argument("--name", default="flatwire:0.1.0", help="repository and tag")
    args = arguments.parse_args()
    write(args.out, args.name, layer(args.programs, args.plugins), ["/flatwire/ipamd"], ["--help"])


if __name__ == "__main__":
    main()
