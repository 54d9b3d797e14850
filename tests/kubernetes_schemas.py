"""Schemas of the Kubernetes resources in examples/launch, as their operators publish them, and what breaks them.

kubernetes_schemas.json holds, for each resource and version of its operator, the part of the CustomResourceDefinition
that an example reaches: every field at each place of it, with its type, and of fields that it leaves out no more.

Source: kubeflow/training-operator, manifests/base/crds/kubeflow.org_pytorchjobs.yaml at v1.7.0 and v1.9.0, and
kubeflow/trainer, manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml at v2.0.0; both Apache-2.0. Made by

    python tests/kubernetes_schemas.py NAME CRD.yaml EXAMPLE.yaml
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_suffix(".json")
_KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "x-kubernetes-int-or-string")
_TYPES = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}


def schemas(kind: str) -> dict[str, dict]:
    """Returns the schemas of a kind of resource, by the version of its operator."""
    found = json.loads(FILE.read_text())
    return {name.partition(" ")[2]: schema for name, schema in found.items() if name.startswith(kind)}


def problems(found: Any, schema: dict, place: str = "") -> list[str]:
    """Returns what a server would refuse or drop of `found`, each with its place."""
    if "enum" in schema and found not in schema["enum"]:
        return [f"{place}: {found!r} is none of {schema['enum']}"]
    if schema.get("x-kubernetes-int-or-string"):
        is_right = type(found) in (int, str) and re.search(schema.get("pattern", ""), str(found))
        return [] if is_right else [f"{place}: {found!r} is no quantity"]
    kind = schema.get("type")
    if kind == "object":
        return _problems_of_fields(found, schema, place)
    if kind == "array":
        if not isinstance(found, list):
            return [f"{place}: {found!r} is no list"]
        items = enumerate(found) if "items" in schema else []
        return [problem for number, item in items for problem in problems(item, schema["items"], f"{place}[{number}]")]
    is_right = kind is None or (isinstance(found, _TYPES[kind]) and isinstance(found, bool) == (kind == "boolean"))
    if not is_right:
        return [f"{place}: {found!r} is no {kind}"]
    is_within = schema.get("minimum", found) <= found <= schema.get("maximum", found) if kind == "integer" else True
    return [] if is_within else [f"{place}: {found} is out of bounds"]


def _problems_of_fields(found: Any, schema: dict, place: str) -> list[str]:
    if not isinstance(found, dict):
        return [f"{place}: {found!r} is no mapping"]
    missing = [f"{place}.{name}: missing" for name in schema.get("required", ()) if name not in found]
    fields, of_any_name = schema.get("properties"), schema.get("additionalProperties")
    if fields is None and of_any_name is None:
        return missing
    of_each = {name: (fields or {}).get(name, of_any_name) for name in found}
    return missing + [
        problem
        for name, field in of_each.items()
        for problem in (
            [f"{place}.{name}: unknown"] if field is None else problems(found[name], field, f"{place}.{name}")
        )
    ]


def _reduced(schema: dict, examples: list[Any]) -> dict:
    """Returns the part of `schema` that `examples` reach; a field in none of them has its type alone."""
    kept = {key: schema[key] for key in _KEPT if key in schema}
    if not examples:
        return {key: kept[key] for key in ("type", "x-kubernetes-int-or-string") if key in kept}
    if "properties" in schema:
        kept["properties"] = {
            name: _reduced(field, [one[name] for one in examples if name in one])
            for name, field in schema["properties"].items()
        }
    if "additionalProperties" in schema:
        values = [value for one in examples for value in one.values()]
        kept["additionalProperties"] = _reduced(schema["additionalProperties"], values)
    if "items" in schema:
        kept["items"] = _reduced(schema["items"], [item for one in examples for item in one])
    return kept


def _add(name: str, definition: str, example: str) -> None:
    spec = yaml.safe_load(Path(definition).read_text())["spec"]
    (version, *_) = spec["versions"]
    schema = _reduced(version["schema"]["openAPIV3Schema"], [yaml.safe_load(Path(example).read_text())])
    # What a definition leaves to the server.
    schema["properties"] |= {
        "apiVersion": {"type": "string", "enum": [f"{spec['group']}/{version['name']}"]},
        "kind": {"type": "string", "enum": [spec["names"]["kind"]]},
        "metadata": {"type": "object", "properties": {key: {"type": "string"} for key in ("name", "namespace")}},
    }
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    lines = [f"{json.dumps(key)}: {json.dumps(one)}" for key, one in sorted((known | {name: schema}).items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _add(*sys.argv[1:])
