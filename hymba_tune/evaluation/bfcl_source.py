"""Java and JavaScript answers of BFCL as syntax trees, within limits that hostile source cannot break."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tree_sitter import Language, Tree

MAX_SOURCE_CHARS = 8_192  # error recovery on hostile source takes memory without bound (328 MB at 10,000 characters)
MAX_PARSE_MICROSECONDS = 1_000_000
MAX_VALUE_CHARS = 4_096  # a longer collection is left as text, which no type accepts


class SourceCall(NamedTuple):
    """A call whose argument values are source text; a positional argument has the name None."""

    name: str
    arguments: dict[str | None, str]


def parse_source(language: Language, source: str) -> Tree:
    """The syntax tree; raises SyntaxError if tokens had to be skipped, ValueError past the time limit."""
    if len(source) > MAX_SOURCE_CHARS:
        raise SyntaxError(f"more than {MAX_SOURCE_CHARS} characters of source")
    from tree_sitter import Parser

    parser = Parser()
    parser.set_language(language)
    parser.set_timeout_micros(MAX_PARSE_MICROSECONDS)
    tree = parser.parse(source.encode())
    nodes = [tree.root_node]
    while nodes:
        node = nodes.pop()
        if node.type == "ERROR":  # a missing token (the final semicolon) is no error, as in the official check
            raise SyntaxError(f"the source does not parse at byte {node.start_byte}")
        if node.has_error:
            nodes.extend(node.children)
    return tree


def add_argument(arguments: dict[str | None, str], name: str | None, value: str) -> None:
    """Raises SyntaxError for a second argument of the same name, and for a second positional one."""
    if name in arguments:
        raise SyntaxError(f"the argument {name} is given twice")
    arguments[name] = value
