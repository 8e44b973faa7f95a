"""YAML as people write it: 5e-5 is a number, a key given twice is refused, and every key remembers its line."""

import re
from pathlib import Path
from typing import Any

import yaml

from hymba_tune.errors import UserError

Location = tuple[str | int, ...]
"""The way to a value from the top of the file: keys of mappings and indices of lists."""

_NUMBERS_AND_DATES = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"^[-+]?(([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with decimal numbers only: no octal 010, no sexagesimal 1:30, no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS_AND_DATES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


# The first pattern that matches wins, and _FLOAT matches whole numbers too: int comes first.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """Read a YAML file whose top level is a mapping.

    Returns the mapping and, for every key and list item in it, the line (from 1) it stands on.
    Raises UserError, with file and line, for a missing file, broken YAML, a duplicate key or another top level.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); check the path") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[Location, int]]:
    """read_yaml on text already in memory; `name` stands for the file in messages."""
    lines: dict[Location, int] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{name}:1: the file must be a mapping (`key: value` lines)")
        _record(root, (), lines, name, [])
        data = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    return data, lines


def line_of(lines: dict[Location, int], location: Location) -> int:
    """The line of a location, or of the nearest enclosing one that the file has (1 if there is none)."""
    while location and location not in lines:
        location = location[:-1]
    return lines.get(location, 1)


def _record(node: yaml.Node, location: Location, lines: dict[Location, int], name: str, above: list[yaml.Node]) -> None:
    """Walk the node tree: note each line, refuse duplicate keys and anchors that contain themselves."""
    if any(node is ancestor for ancestor in above):
        raise UserError(f"{name}:{node.start_mark.line + 1}: an anchor (&name) refers to itself; write the value out")
    above = [*above, node]
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault((*location, index), item.start_mark.line + 1)
            _record(item, (*location, index), lines, name, above)
    elif isinstance(node, yaml.MappingNode):
        _record_mapping(node, location, lines, name, above)


def _record_mapping(
    node: yaml.MappingNode, location: Location, lines: dict[Location, int], name: str, above: list[yaml.Node]
) -> None:
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{name}:{line}: a key must be a plain word, not a list or mapping")
        if key.value in seen:
            raise UserError(f"{name}:{line}: key {key.value!r} is already given in line {seen[key.value]}; keep one")
        seen[key.value] = line
        if key.tag != "tag:yaml.org,2002:merge":
            lines.setdefault((*location, key.value), line)
            _record(value, (*location, key.value), lines, name, above)
    for key, value in node.value:  # `<<:` after the mapping's own keys, which win over it
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _record(merged, location, lines, name, above)
