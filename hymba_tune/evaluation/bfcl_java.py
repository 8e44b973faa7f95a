"""BFCL's Java answers: one call read by tree-sitter, its arguments source text that its declared type converts.

The rules are those of the published `java_parser` and `java_type_converter` (gorilla), quirks included, because the
official verdicts have them. Patterns that could backtrack without bound are replaced by scans with the same result.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from hymba_tune.evaluation.bfcl_source import MAX_VALUE_CHARS, SourceCall, add_argument, parse_source

if TYPE_CHECKING:
    from tree_sitter import Language, Node

TYPES: dict[str, type] = {
    "byte": int,
    "short": int,
    "integer": int,
    "float": float,
    "double": float,
    "long": int,
    "boolean": bool,
    "char": str,
    "Array": list,
    "ArrayList": list,
    "HashMap": dict,
    "String": str,
    "any": str,
}

_INTEGER = re.compile(r"^-?\d+$")
_LONG = re.compile(r"^-?\d+[lL]$")
_FLOAT = re.compile(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]$")
_DOUBLE = re.compile(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?$")
_NEW_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*?)\}")
_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_NEW_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_LIST_BODY = re.compile(r"new\s+ArrayList<\w*>\(\)\s*\{\{\s*")
_ADD = re.compile(r"add\((.+?)\)")
_NEW_MAP = re.compile(r"new\s+HashMap<.*?>\s*\(\)")
_MAP_BODY = re.compile(r"new\s+HashMap<.*?>\s*\(\)\s*\{", re.DOTALL)
_BLANKS = re.compile(r"\s*")


@cache
def _language() -> Language:
    import tree_sitter_java
    from tree_sitter import Language

    return Language(tree_sitter_java.language(), "java")


def parse_call(source: str) -> SourceCall | None:
    """The first call in the source, or None; raises SyntaxError for source that is not Java."""
    nodes = [parse_source(_language(), source).root_node]
    while nodes:
        node = nodes.pop()
        if node.type != "method_invocation":
            nodes.extend(reversed(node.children))
        else:
            receiver, name = node.child_by_field_name("object"), _text(_field(node, "name"), source)
            arguments = _arguments(_field(node, "arguments"), source)
            return SourceCall(f"{_text(receiver, source)}.{name}" if receiver else name, arguments)
    return None


def _field(node: Node, name: str) -> Node:
    child = node.child_by_field_name(name)
    if child is None:
        raise SyntaxError(f"{node.type} without {name}")
    return child


def _text(node: Node, source: str) -> str:
    """Byte offsets into characters, as the official parser takes them: text after a non-ASCII character is shifted."""
    return source[node.start_byte : node.end_byte]


def _arguments(node: Node, source: str) -> dict[str | None, str]:
    arguments: dict[str | None, str] = {}
    for child in node.children:
        if child.type == "assignment_expression":
            name, _, value = child.children[:3]
            add_argument(arguments, _text(name, source), _value(value, source))
        elif child.type in ("identifier", "class_literal"):
            add_argument(arguments, None, _text(child, source))
    return arguments


def _value(node: Node, source: str) -> str:
    """The source text of an argument: a literal without its quotes, else all tokens without the blanks between."""
    if node.type in ("string_literal", "character_literal"):
        return _text(node, source)[1:-1]
    return _tokens(node, source)


def _tokens(node: Node, source: str) -> str:
    if node.type in ("string_literal", "character_literal", "identifier", "class_literal", "type_identifier"):
        return _text(node, source)
    if node.type == "method_invocation" or not node.children:
        return _text(node, source)
    if node.type == "array_creation_expression":
        return f"new {_tokens(_field(node, 'type'), source)}[]{_tokens(_field(node, 'value'), source)}"
    if node.type == "object_creation_expression":
        arguments = _field(node, "arguments").children
        parts = [_tokens(child, source) for child in arguments if child.type not in (",", "(", ")")]
        return f"new {_tokens(_field(node, 'type'), source)}({', '.join(parts)})"
    return "".join(_tokens(child, source) for child in node.children)


def convert(value: str, kind: str, element: str | None = None) -> Any:
    """`value` as the declared type `kind`, elements as `element`; the string itself if it has another form."""
    if kind in ("byte", "short", "integer"):
        return _number(int, value) if _INTEGER.match(value) else value
    if kind == "long":
        return _number(int, value.strip()[:-1]) if _LONG.match(value) else value
    if kind == "float":
        return float(value.strip()[:-1]) if _FLOAT.match(value) else value
    if kind == "double":
        return float(value) if _DOUBLE.match(value) else value
    if kind == "boolean":
        return value == "true" if value in ("true", "false") else value
    if len(value) > MAX_VALUE_CHARS:
        return value
    if kind == "Array":
        return _array(value, element)
    if kind == "ArrayList":
        return _array_list(value, element)
    return _hash_map(value) if kind == "HashMap" else value


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:  # CPython reads at most 4,300 digits
        return text


def _array(text: str, element: str | None) -> list[Any] | str:
    match = _NEW_ARRAY.search(text)
    if not match:
        return text
    items = [item.strip() for item in match[1].split(",")]
    return [convert(item, element) if element else _untyped(item) for item in items if item]


def _array_list(text: str, element: str | None) -> list[Any] | str:
    if match := _AS_LIST.search(text):
        return [_element(item.strip(), element) for item in match[1].split(",")]
    for match in _LIST_BODY.finditer(text):
        end = text.find("}}", match.end() + 1)
        if end >= 0:
            return [_element(item.strip(), element) for item in _ADD.findall(text[match.end() : end])]
    return [] if _NEW_LIST.search(text) else text


def _element(text: str, kind: str | None) -> Any:
    if kind in ("char", "String"):
        return text[1:-1]
    return convert(text, kind) if kind else _untyped(text)


def _hash_map(text: str) -> dict[str, Any] | str:
    match = _MAP_BODY.search(text)
    end = text.find("}", match.end()) if match else -1
    if match and end >= 0:
        return _entries(text[match.end() : end])
    return {} if _NEW_MAP.search(text) else text


def _entries(body: str) -> dict[str, Any]:
    """The `put("key", value)` statements of a map's body; key and value each within one line."""
    entries: dict[str, Any] = {}
    start = body.find('put("')
    while start >= 0:
        key = start + len('put("')
        comma = body.find('",', key, _line_end(body, key))
        while comma >= 0:
            value = _BLANKS.match(body, comma + 2).end()  # type: ignore[union-attr]  # `\s*` always matches
            close = body.find(")", value, _line_end(body, value))
            if close >= 0:
                entries[body[key:comma]] = _untyped(body[value:close].strip())
                break
            comma = body.find('",', comma + 1, _line_end(body, key))
        start = body.find('put("', max(close + 1, key) if comma >= 0 else key)
    return entries


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _untyped(text: str) -> Any:
    """A value without a declared type, by its form."""
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"') and text.endswith('"'):
        return text[1:-1]
    if _LONG.match(text):
        return _number(int, text[:-1])
    if _FLOAT.match(text):
        return float(text[:-1])
    for kind in (int, float):
        value = _number(kind, text)
        if value is not text:
            return value
    return text
