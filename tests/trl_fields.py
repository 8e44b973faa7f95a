"""TRL's config fields as hymba_tune/trainer_keys.json lists them. `python tests/trl_fields.py` writes that file."""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

import transformers
import trl

import hymba_tune

FILE = Path(hymba_tune.__file__).with_name("trainer_keys.json")
_NAMES = {bool: "bool", dict: "dict", float: "float", int: "int", list: "list", str: "str", type(None): "null"}


def _members(annotation: Any) -> tuple[set[str], list[str]]:
    """Names of the plain types in an annotation, and the words that its enumerations allow."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_members(part) for part in typing.get_args(annotation)]
        return set().union(*(names for names, _ in parts)), [word for _, words in parts for word in words]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return set(), [member.value for member in annotation]
    name = _NAMES.get(origin or annotation)
    return ({name} if name else set()), []


def _describe(annotation: Any) -> dict[str, list[str]]:
    names, choices = _members(annotation)
    if choices:  # `SchedulerType | str` means one of the words
        names.discard("str")
    return {"types": sorted(names)} | ({"choices": choices} if choices else {})


def listing() -> dict[str, Any]:
    """What trainer_keys.json must hold for the installed TRL and transformers."""
    configs = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}
    return {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
        "fields": {
            method: {
                field.name: _describe(field.type) for field in sorted(dataclasses.fields(config), key=lambda f: f.name)
            }
            for method, config in configs.items()
        },
    }


def _text(listed: dict[str, Any]) -> str:
    """JSON with one line a field, so that a new TRL release shows as a small diff."""
    methods = [
        f' "{method}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(kind)}' for name, kind in fields.items()) + "\n }"
        for method, fields in listed["fields"].items()
    ]
    return f'{{"versions": {json.dumps(listed["versions"])},\n"fields": {{\n' + ",\n".join(methods) + "\n}}\n"


if __name__ == "__main__":
    FILE.write_text(_text(listing()), encoding="utf-8")
