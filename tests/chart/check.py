"""Renders the chart with Helm's own engine and holds what comes out against Kubernetes' schemas and our own rules.

usage: check.py CHART [--write]

CHART/../flatwire.yaml is the chart rendered with its own values, for those who use no Helm; --write makes it anew. Ends with
one line: chart: rendered=yes manifests=N valid=N
"""

import os
import pathlib
import sys

import helm_python as helm
import jsonschema
import kubernetes_validate
import yaml

CHART = pathlib.Path(sys.argv[1])
PLAIN = CHART.parent / "flatwire.yaml"
PLAIN_AWAY = CHART.parent / "flatwire-uninstall.yaml"
# The oldest that the chart says it runs on and the newest there is.
VERSIONS = ("1.25", "1.37")
HEAD = """# Flatwire without Helm: the chart of deploy/chart, rendered with its own values. Written by `make chart`.
# Set the image before you apply it: sed 's|image: flatwire:|image: REGISTRY/flatwire:|'
"""
HEAD_AWAY = """# Takes Flatwire off every node without Helm: the chart with uninstall and purge, written by `make chart`. See docs/install.md.
# Set the image before you apply it: sed 's|image: flatwire:|image: REGISTRY/flatwire:|'
"""
# What else users will ask for, each to be rendered and valid.
CASES = {
    "as it is": {},
    "everything on": {
        "image": {"repository": "registry.example/flatwire", "tag": "v9"},
        "imagePullSecrets": [{"name": "pull"}],
        "env": {
            "ENABLE_PREFIX_DELEGATION": "true",
            "WARM_IP_TARGET": "4",
            "FLATWIRE_METRICS_BIND_ADDRESS": "127.0.0.1:9",
            "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG": "true",
            "ANNOTATE_POD_IP": "true",
        },
        "extraEnv": [{"name": "HTTPS_PROXY", "valueFrom": {"configMapKeyRef": {"name": "proxy", "key": "url"}}}],
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/ipamd"}},
        "metricsPort": 9,
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"example.com/c": "d"},
        "nodeSelector": {"kubernetes.io/hostname": "one"},
        "eniConfig": {
            "create": True,
            "region": "eu-central-1",
            "subnets": {"a": {"id": "subnet-1", "securityGroups": ["sg-1"]}, "b": {"id": "subnet-2"}},
        },
        "podMonitor": {"create": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"create": True, "labels": {"release": "prometheus"}},
    },
    "nothing beside the daemon": {"serviceAccount": {"create": False, "name": "other"}, "rbac": {"create": False}},
    "taken away": {"uninstall": True, "purge": True},
    "taken away beside the add-on": {
        "uninstall": True,
        "serviceAccount": {"create": False},
        "rbac": {"create": False},
    },
}
# What must be refused, and what the refusal must name.
REFUSED = {
    "env": {"env": {"WARM_IP_TARGET": 4}},
    "tolerance": {"tolerance": []},
    "DISABLE_METRICS": {"env": {"DISABLE_METRICS": "true"}},
    "FLATWIRE_METRICS_BIND_ADDRESS": {"env": {"FLATWIRE_METRICS_BIND_ADDRESS": "127.0.0.1:9"}},
    "MY_NODE_NAME": {"env": {"MY_NODE_NAME": "one"}},
    "HOST_CNI_BIN_PATH": {"env": {"HOST_CNI_BIN_PATH": "/host/opt/cni/bin"}},
    "path": {"livenessProbe": {"path": "/"}},
    "id": {"eniConfig": {"create": True, "subnets": {"a": {"subnet": "subnet-1"}}}},
}
complaints = []


def complain(where, text):
    complaints.append(f"chart: {where}: {text}")


def render(chart, values):
    # What an install does too: rendering alone would let a misspelt value pass.
    chart.validate_schema(values)
    return chart.render(values=values, name="flatwire", namespace="kube-system")


def documents(rendered):
    texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml") and text.strip()]
    return [d for text in texts for d in yaml.safe_load_all(text) if d]


def validate(case, document, definitions):
    """Whether it is what its schema says."""
    before = len(complaints)
    where = f"{case}: {document['kind']} {document['metadata']['name']}"
    if document["apiVersion"].split("/")[0] in definitions:
        schema = definitions[document["apiVersion"].split("/")[0]]
        try:
            jsonschema.validate(document, schema)
        except jsonschema.ValidationError as error:
            complain(where, error.message)
        return len(complaints) == before
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            complain(where, f"Kubernetes {version}: {'.'.join(str(p) for p in error.path)}: {error.message}")
    return len(complaints) == before


def rules(case, daemonset, settings):
    """What the schemas do not know."""
    where, pod = f"{case}: DaemonSet", daemonset["spec"]["template"]["spec"]
    if not pod["hostNetwork"] or pod["priorityClassName"] != "system-node-critical":
        complain(where, "the daemon belongs on the host's network, and before what needs it")
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["initContainers"] + pod["containers"]:
        name, rights = container["name"], container["securityContext"]
        if rights.get("privileged") or rights["allowPrivilegeEscalation"] or not rights["readOnlyRootFilesystem"]:
            complain(where, f"{name} has more rights than it needs")
        added = rights["capabilities"].get("add", [])
        if rights["capabilities"]["drop"] != ["ALL"] or not set(added) <= {"NET_ADMIN"} or (name == "install" and added):
            complain(where, f"{name} has the capabilities {added}")
        for mount in container["volumeMounts"]:
            if mount["name"] not in volumes:
                complain(where, f"{name} mounts {mount['name']}, which is no volume")
        names = [variable["name"] for variable in container.get("env", [])]
        for variable in names:
            if f"| `{variable}` |" not in settings and variable != "HTTPS_PROXY":
                complain(where, f"{name} sets {variable}, which docs/settings.md does not have")
            if names.count(variable) > 1:
                complain(where, f"{name} sets {variable} twice")
        if "requests" not in container["resources"] or "memory" not in container["resources"]["limits"]:
            complain(where, f"{name} says nothing of what it needs")


def plain(head, crds, rendered):
    texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml") and text.strip()]
    pieces = [piece.strip() + "\n" for text in crds + texts for piece in f"\n{text}".split("\n---\n") if piece.strip()]
    return head + "".join(f"---\n{piece}" for piece in pieces)


def main():
    settings = (CHART.parent.parent / "docs/settings.md").read_text()
    alerts = (CHART / "monitoring/alerts.yaml").read_text()
    for message in helm.lint(str(CHART))["messages"]:
        if message["error"] != "icon is recommended":
            complain("lint", message["error"])
    crds = [path.read_text() for path in sorted((CHART / "crds").glob("*.yaml"))]
    written = {"as it is": (PLAIN, HEAD, crds), "taken away": (PLAIN_AWAY, HEAD_AWAY, [])}
    manifests = valid = 0
    definitions = {}
    for path in sorted((CHART / "crds").glob("*.yaml")):
        for crd in yaml.safe_load_all(path.read_text()):
            manifests += 1
            valid += validate(path.name, crd, {})
            definitions[crd["spec"]["group"]] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    with helm.Chart.load(str(CHART)) as chart:
        for case, values in CASES.items():
            try:
                rendered = render(chart, values)
            except helm.HelmError as error:
                complain(case, f"cannot be rendered: {error}")
                continue
            for document in documents(rendered):
                if document["apiVersion"].startswith("monitoring.coreos.com/"):
                    print(f"chart: no schema here for {document['kind']}, which is therefore only rendered")
                    if document["kind"] == "PrometheusRule" and document["spec"] != yaml.safe_load(alerts):
                        complain(case, "the PrometheusRule is not monitoring/alerts.yaml")
                    continue
                manifests += 1
                valid += validate(case, document, definitions)
                if document["kind"] == "DaemonSet":
                    rules(case, document, settings)
            if case in written:
                file, text = written[case][0], plain(*written[case][1:], rendered)
                if "--write" in sys.argv:
                    file.write_text(text)
                elif not file.exists() or file.read_text() != text:
                    complain(file.name, "is not what the chart renders; run: make chart")
        for named, values in REFUSED.items():
            try:
                render(chart, values)
                complain("values", f"{values} are not refused")
            except helm.HelmError as error:
                if named not in str(error):
                    complain("values", f"the refusal of {values} does not name {named}: {error}")
    for line in sorted(set(complaints)):
        print(line, file=sys.stderr)
    if complaints:
        sys.exit(1)
    print(f"chart: rendered=yes manifests={manifests} valid={valid}")


if __name__ == "__main__":
    main()
