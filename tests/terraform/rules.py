"""What holds in every Terraform module here, read from the files alone.

usage: rules.py FOLDER SCHEMA.json…

Each line it prints names a file, what is wrong and what would be right; then it ends with 1.
"""

import json
import os
import re
import sys

import hcl2

META = {"count", "for_each", "provider", "depends_on", "lifecycle", "dynamic", "provisioner", "connection"}
MODULE_META = {"source", "version", "providers", "count", "for_each", "depends_on"}
BUILT_IN = {"var", "local", "module", "data", "path", "each", "self", "count", "terraform", "run", "output"}

folder, schemas = sys.argv[1], {"resources": {}, "data": {}}
for name in sys.argv[2:]:
    with open(name) as file:
        for kind, types in json.load(file).items():
            schemas[kind] |= types
complaints = []


def complain(path, text):
    complaints.append(f"{os.path.relpath(path, os.path.dirname(folder))}: {text}")


def bare(name):
    return name.strip('"')


def body(block):
    """What stands in a block, without what the parser adds."""
    return {bare(key): value for key, value in block.items() if not key.startswith("__")}


def text(value):
    """Every expression below a value, without comments."""
    if isinstance(value, dict):
        return "\n".join(f"{key} = {text(inner)}" for key, inner in value.items() if not key.startswith("__"))
    if isinstance(value, list):
        return "\n".join(text(inner) for inner in value)
    return str(value)


def is_blocks(value):
    return isinstance(value, list) and any(isinstance(item, dict) and item.get("__is_block__") for item in value)


def check_block(path, where, given, schema):
    """Arguments and blocks that the provider does not have, and those that it needs."""
    given = body(given)
    for name, value in given.items():
        if name in META:
            continue
        if name in schema["blocks"] and is_blocks(value):
            for item in value:
                check_block(path, f"{where}.{name}", item, schema["blocks"][name]["block"])
        elif name not in schema["attributes"] or schema["attributes"][name].get("computed"):
            complain(path, f"{where} has no argument {name!r}; see the provider's page of it")
    dynamic = {bare(key) for block in given.get("dynamic", []) for key in block}
    needed = [name for name, attribute in schema["attributes"].items() if attribute.get("required")]
    needed += [name for name, block in schema["blocks"].items() if block["min"]]
    for name in needed:
        if name not in given and name not in dynamic:
            complain(path, f"{where} lacks {name!r}, which is required")


class Module:
    def __init__(self, path):
        self.path, self.files = path, {}
        self.variables, self.outputs, self.locals, self.modules = {}, {}, {}, {}
        self.resources = {}
        for name in sorted(os.listdir(path)):
            if name.endswith(".tf"):
                self.read(os.path.join(path, name))

    def read(self, path):
        try:
            with open(path) as file:
                parsed = hcl2.load(file)
        except Exception as error:  # The parser's errors have no common class.
            complain(path, f"cannot be read: {str(error).splitlines()[0]}")
            return
        self.files[path] = parsed
        for kind, table in (("variable", self.variables), ("output", self.outputs), ("module", self.modules)):
            for block in parsed.get(kind, []):
                for name, inner in body(block).items():
                    if name in table:
                        complain(path, f"{kind} {name} is declared twice")
                    table[name] = (path, inner)
        for block in parsed.get("locals", []):
            self.locals |= {name: path for name in body(block)}
        for kind, prefix in (("resource", ""), ("data", "data.")):
            for block in parsed.get(kind, []):
                for of_type, named in body(block).items():
                    for name, inner in body(named).items():
                        self.resources[f"{prefix}{of_type}.{name}"] = (path, prefix, of_type, inner)

    def check(self, modules):
        for name, (path, inner) in self.variables.items():
            for needed in ("description", "type"):
                if needed not in inner:
                    complain(path, f"variable {name} has no {needed}")
            if not re.search(rf"\bvar\.{name}\b", self.text(without=("variable", name))):
                complain(path, f"variable {name} is used nowhere; remove it")
        for name, (path, inner) in self.outputs.items():
            if "description" not in inner:
                complain(path, f"output {name} has no description")
        for name, path in self.locals.items():
            if not re.search(rf"\blocal\.{name}\b", self.text()):
                complain(path, f"local {name} is used nowhere; remove it")
        for where, (path, prefix, of_type, inner) in self.resources.items():
            known = schemas["data" if prefix else "resources"].get(of_type)
            if known is None:
                complain(path, f"{where}: no provider here has a {of_type}")
            else:
                check_block(path, where, inner, known)
        for name, (path, inner) in self.modules.items():
            self.check_call(name, path, body(inner), modules)
        for path, parsed in self.files.items():
            self.check_references(path, text(parsed), modules)
            self.check_layout(path)

    def text(self, without=None):
        """All of the module's expressions, but for one block's."""
        kept = []
        for parsed in self.files.values():
            for kind, blocks in parsed.items():
                if kind.startswith("__"):
                    continue
                kept += [text(b) for b in blocks if not (without and kind == without[0] and without[1] in body(b))]
        return "\n".join(kept)

    def called(self, path, call, modules):
        return modules.get(os.path.normpath(os.path.join(os.path.dirname(path), bare(call.get("source", "")))))

    def check_call(self, name, path, call, modules):
        target = self.called(path, call, modules)
        if target is None:
            complain(path, f"module {name}: there is no module at {call.get('source')}")
            return
        for argument in call:
            if argument not in MODULE_META and argument not in target.variables:
                complain(path, f"module {name} has no variable {argument!r}")
        for variable, (_, inner) in target.variables.items():
            if "default" not in inner and variable not in call:
                complain(path, f"module {name} lacks {variable!r}, which has no default")

    def check_references(self, path, expressions, modules):
        for name in set(re.findall(r"\bvar\.(\w+)", expressions)) - set(self.variables):
            complain(path, f"var.{name} is not declared")
        for name in set(re.findall(r"\blocal\.(\w+)", expressions)) - set(self.locals):
            complain(path, f"local.{name} is not declared")
        for name, output in set(re.findall(r"\bmodule\.(\w+)\.(\w+)", expressions)):
            if name not in self.modules:
                complain(path, f"module.{name} is not declared")
                continue
            target = self.called(*self.modules[name], modules)
            if target is not None and output not in target.outputs:
                complain(path, f"module.{name} has no output {output!r}")
        for data, of_type, name in set(re.findall(r"(?<![\w.\"-])(data\.)?((?:aws|helm)_\w+)\.(\w+)", expressions)):
            if f"{data}{of_type}.{name}" not in self.resources:
                complain(path, f"{data}{of_type}.{name} is not declared")

    def check_layout(self, path):
        with open(path) as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\n")
                if line != line.rstrip() or "\t" in line:
                    complain(f"{path}:{number}", "trailing blanks or a tab; run terraform fmt")


modules = {}
for path, _, names in sorted(os.walk(folder)):
    if ".terraform" not in path and any(name.endswith(".tf") for name in names):
        modules[os.path.normpath(path)] = Module(os.path.normpath(path))
    for name in names:
        if name.endswith(".tftest.hcl"):
            try:
                with open(os.path.join(path, name)) as file:
                    hcl2.load(file)
            except Exception as error:
                complain(os.path.join(path, name), f"cannot be read: {str(error).splitlines()[0]}")
if not modules:
    sys.exit(f"rules.py: no Terraform module below {folder}")
for module in modules.values():
    module.check(modules)
for complaint in sorted(set(complaints)):
    print(f"terraform: {complaint}", file=sys.stderr)
if complaints:
    sys.exit(1)
print(f"terraform: rules hold in {len(modules)} modules")
