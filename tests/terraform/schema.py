"""Terraform provider schemas out of the bindings that PyPI has: no registry, no provider binary.

usage: schema.py OUT.json BINDINGS.whl TYPE…      TYPE: aws_vpc, data.aws_partition, helm_release, …

The wheels of CDK for Terraform carry generated JavaScript that names, for every resource, each argument with its type and
nesting, and each attribute that only the provider knows. That is read here by pattern; what values are allowed is not in it.
"""

import io
import json
import re
import sys
import tarfile
import zipfile

# One entry of what a class or block takes.
ARGUMENT = re.compile(
    r'^ {8,12}"?([a-z0-9_]+)"?: \{\n\s+value: .*\n\s+isBlock: (true|false),\n\s+type: "(\w+)",\n\s+storageClassType: "(\w+)",',
    re.M,
)
GETTER = re.compile(r"get(\w+)Attribute\('([a-z0-9_]+)'\)")
MEMBER = re.compile(r'new (\w+?)(List|Map|OutputReference)\(this, "([a-z0-9_]+)"')
SCALARS = {"string": "string", "number": "number", "boolean": "bool", "any": "dynamic"}
GETTERS = {
    "String": "string", "Number": "number", "Boolean": "bool", "List": ["list", "string"],
    "NumberList": ["list", "number"], "StringMap": ["map", "string"], "BooleanMap": ["map", "bool"],
}
DEEPEST = 7


def type_of(storage, nesting):
    """`stringList` in a set is ["set", "string"]."""
    for suffix, collection in (("List", "list"), ("Map", "map")):
        if storage.endswith(suffix) and storage != suffix:
            inner = type_of(storage.removesuffix(suffix), "")
            return [collection if nesting != "set" else "set", inner]
    return SCALARS.get(storage, "dynamic")


class Module:
    """The generated code of one resource or data source."""

    def __init__(self, code, interfaces, framework):
        self.code, self.framework = code, framework
        self.converters = {
            name.lower(): body
            for name, body in re.findall(r"^function (\w+)ToHclTerraform\(struct\) \{(.*?)^\}", code, re.S | re.M)
        }
        self.classes = dict(re.findall(r"^class (\w+) extends [\w.]+ \{(.*?)^\}", code, re.S | re.M))
        self.required = {}
        for name, body in re.findall(r"^export interface (\w+)[^{]*\{(.*?)^\}", interfaces, re.S | re.M):
            members = re.findall(r"(/\*\*(?:(?!\*/).)*\*/)?\s*readonly (\w+)(\??):", body, re.S)
            names = ((re.search(r"#([a-z0-9_]+) \w+#", doc), optional) for doc, _, optional in members)
            self.required[name] = {found.group(1) for found, optional in names if found and not optional}

    def block(self, arguments, shape, depth=0):
        """`shape` names the interface of what may be given; its class says what may be read beside that."""
        attributes, blocks = {}, {}
        required = self.required.get(shape if depth else f"{shape}Config", set())
        for name, is_block, nesting, storage in ARGUMENT.findall(arguments):
            if is_block == "false":
                attributes[name] = {"type": type_of(storage, nesting), "required": name in required}
                continue
            if self.framework and name != "timeouts":
                # Newer providers take attributes where older ones take blocks.
                attributes[name] = {"type": "dynamic", "required": name in required}
                continue
            inner = re.sub(r"(List|Map)$", "", storage) if nesting in ("list", "set", "map") else storage
            body = self.converters.get(inner.lower(), "") if depth < DEEPEST else ""
            # A block that may stand once is generated with a member of its own, and without a list.
            once = f"{inner}List(" not in self.code
            blocks[name] = {
                "nesting": "SINGLE" if name == "timeouts" else "SET" if nesting == "set" else "LIST",
                "min": int(name in required and name != "timeouts"),
                "max": int(once and name != "timeouts"),
                "block": self.block(body, inner, depth + 1),
            }
        reader = self.classes.get(f"{shape}OutputReference" if depth else shape, "")
        for kind, name in GETTER.findall(reader):
            if name not in blocks:
                attributes.setdefault(name, {"type": GETTERS.get(kind, "dynamic"), "computed": True})
        for inner, kind, name in MEMBER.findall(reader):
            if name in blocks or name in attributes:
                continue
            attributes[name] = {"type": self.object(inner, kind, depth), "computed": True}
        return {"attributes": attributes, "blocks": blocks}

    def object(self, name, kind, depth):
        """The type of what only the provider knows: an object, a list or a map of them."""
        if depth >= DEEPEST:
            return "dynamic"
        reader = self.classes.get(f"{name}OutputReference", "")
        members = {attribute: GETTERS.get(getter, "string") for getter, attribute in GETTER.findall(reader)}
        members |= {attribute: self.object(inner, k, depth + 1) for inner, k, attribute in MEMBER.findall(reader)}
        one = ["object", members]
        return {"List": ["list", one], "Map": ["map", one]}.get(kind, one)


def folder(wanted):
    data = wanted.startswith("data.")
    provider, _, name = wanted.removeprefix("data.").partition("_")
    return (f"data-{provider}-" if data else "") + name.replace("_", "-")


def main(out, wheel, wanted):
    with zipfile.ZipFile(wheel) as archive:
        inner = next(name for name in archive.namelist() if name.endswith(".jsii.tgz"))
        package = io.BytesIO(archive.read(inner))
    files = {f"package/lib/{folder(name)}/index.{ending}": None for name in wanted for ending in ("js", "d.ts")}
    with tarfile.open(fileobj=package, mode="r|gz") as bindings:
        for member in bindings:
            if member.name in files:
                files[member.name] = bindings.extractfile(member).read().decode()
    schemas = {"resources": {}, "data": {}}
    for name in wanted:
        code, interfaces = (files[f"package/lib/{folder(name)}/index.{ending}"] for ending in ("js", "d.ts"))
        if code is None:
            sys.exit(f"schema.py: {wheel} knows no {name}; is it misspelt, or newer than the bindings?")
        shape, base = re.search(r"^class (\w+) extends cdktf\.(TerraformResource|TerraformDataSource)", code, re.M).groups()
        module = Module(code, interfaces, framework=not name.removeprefix("data.").startswith("aws_"))
        arguments = re.search(r"synthesizeHclAttributes\(\) \{(.*?)^    \}", module.classes[shape], re.S | re.M)
        kind = "resources" if base == "TerraformResource" else "data"
        schemas[kind][name.removeprefix("data.")] = module.block(arguments.group(1) if arguments else "", shape)
    with open(out, "w") as file:
        json.dump(schemas, file, indent=1, sort_keys=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
