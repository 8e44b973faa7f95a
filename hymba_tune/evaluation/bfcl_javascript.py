"""BFCL's JavaScript answers: one call read by tree-sitter, its arguments source text that its declared type converts.

The rules are those of the published `js_parser` and `js_type_converter` (gorilla), quirks included, because the
official verdicts have them; the pattern for arrays of arrays, which can take exponential time, is replaced by a scan
with its result.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from hymba_tune.evaluation.bfcl_source import MAX_VALUE_CHARS, SourceCall, add_argument, parse_source

if TYPE_CHECKING:
    from tree_sitter import Language, Node

TYPES: dict[str, type] = {
    "String": str,
    "integer": int,
    "float": float,
    "Bigint": int,
    "Boolean": bool,
    "dict": dict,
    "array": list,
    "any": str,
}

_INTEGER = re.compile(r"^-?\d+$")
_FLOAT = re.compile(r"^-?\d+(\.\d+)?$")
_BIGINT = re.compile(r"^-?\d+n$")
_ROWS = re.compile(r"(\[|\bnew\s+Array\()\s*(?=\[)")
_ROW = re.compile(r"\[(.*?)\]")
_ARRAY = re.compile(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)")
_OBJECT = re.compile(r"\{(.*?)\}")
_PAIR = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")
_NEXT_ROW = re.compile(r"\s*,\s*(?=\[)")
_BLANKS = re.compile(r"\s*")


@cache
def _language() -> Language:
    import tree_sitter_javascript
    from tree_sitter import Language

    return Language(tree_sitter_javascript.language(), "javascript")


def parse_call(source: str) -> SourceCall | None:
    """The first statement that is a call, or None; raises SyntaxError for source that is not JavaScript."""
    for statement in parse_source(_language(), source).root_node.children:
        if statement.type == "expression_statement":
            for node in statement.children:
                if node.type == "call_expression":
                    return SourceCall(_text(node.children[0]), _arguments(node.children[1]))
    return None


def _text(node: Node) -> str:
    return node.text.decode()


def _arguments(node: Node) -> dict[str | None, str]:
    arguments: dict[str | None, str] = {}
    for child in node.children:
        if child.type == "assignment_expression":
            add_argument(arguments, _text(child.children[0]), _unquoted(_text(child.children[2])))
        elif child.type in ("identifier", "true"):
            add_argument(arguments, None, _text(child))
    return arguments


def _quoted(text: str) -> bool:
    return any(text.startswith(quote) and text.endswith(quote) for quote in "\"'")


def _unquoted(text: str) -> str:
    return text[1:-1] if _quoted(text) else text


def convert(value: str, kind: str, element: str | None = None) -> Any:
    """`value` as the declared type `kind`, elements as `element`; the string itself if it has another form."""
    if kind == "String":
        return _unquoted(value)
    if kind == "integer":
        return _number(int, value) if _INTEGER.match(value) else value
    if kind == "float":
        return float(value) if _FLOAT.match(value) else value
    if kind == "Bigint":
        return _number(int, value.strip()[:-1]) if _BIGINT.match(value) else value
    if kind == "Boolean":
        return value == "true" if value in ("true", "false") else value
    if len(value) > MAX_VALUE_CHARS:
        return value
    if kind == "array":
        return _array(value.strip(), element)
    return _object(value.strip()) if kind == "dict" else value


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:  # not a number, or more than the 4,300 digits CPython reads
        return text


def _array(text: str, element: str | None) -> list[Any] | str:
    rows = _rows(text)
    if rows is not None:
        found = [row.strip() for row in _ROW.findall(rows)]
        found[0] = found[0].removeprefix("[")
        return [[_untyped(item) for item in row.split(",")] for row in found]
    match = _ARRAY.match(text)
    if not match:
        return text
    content = (match[1] if match[1] is not None else match[2]).strip()
    items = [item.strip() for item in content.split(",")] if content else []
    return [convert(item, element) if element else _untyped(item) for item in items]


def _rows(text: str) -> str | None:
    """The array of arrays that the text begins with, or None.

    It is `[` or `new Array(`, rows `[...]` with commas between, `]` or `)`. A row may hold brackets (it ends at the
    first `]` from which the rest fits), so the ends that fit are found from the right, each once.
    """
    start = _ROWS.match(text)
    if not start:
        return None
    close = "]" if start[1] == "[" else ")"
    ends: dict[int, int] = {}  # row start -> end of the whole array, if the rest fits from there
    nearest = None  # the same for the closest `]` to the right, on the line
    for i in range(len(text) - 1, start.end() - 1, -1):
        if text[i] == "\n":
            nearest = None
        elif text[i] == "[" and nearest is not None:
            ends[i] = nearest
        elif text[i] == "]":
            after = _BLANKS.match(text, i + 1).end()  # type: ignore[union-attr]  # `\s*` always matches
            comma = _NEXT_ROW.match(text, i + 1)
            end = ends.get(comma.end()) if comma else None
            if end is None and text.startswith(close, after):
                end = after + 1
            nearest = nearest if end is None else end
    return text[: ends[start.end()]] if start.end() in ends else None


def _object(text: str) -> dict[str, Any] | str:
    if text == "{}":
        return {}
    match = _OBJECT.match(text)
    if not match:
        return text
    return {key.strip().strip("'\""): _member(value.strip()) for key, value in _PAIR.findall(match[1])}


def _member(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return _array(text, None)
    if text.startswith("{") and text.endswith("}"):
        return _object(text)
    return _untyped(text.strip("'\""))


def _untyped(text: str) -> Any:
    """A value without a declared type, by its form."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if _quoted(text):
        return text[1:-1]
    for kind in (int, float):
        value = _number(kind, text)
        if value is not text:
            return value
    return text
