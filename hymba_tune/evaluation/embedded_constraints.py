"""Whether an answer has the form and the content that tiny_constraints asks for (data/synthetic/constraints.py).

An answer is taken apart from outside in: quotes, first and last line, layout, items. A part that is not as it should be
fails its own constraint, and the content too where it can't be read without it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

Form = dict[str, list[Any]]
"""Values by constraint."""


def constraints_met(answer: str, constraints: Sequence[Sequence[Any]]) -> dict[str, bool]:
    """Constraint -> whether the answer meets it."""
    form: Form = {name: values for name, *values in constraints}
    text = answer.strip()
    met = {
        "upper": text == text.upper() != text.lower(),
        "lower": text == text.lower() != text.upper(),
        "quoted": len(text) > 1 and text[0] == text[-1] == '"',
        "without": not any(word.casefold() in text.casefold() for word in form.get("without", [])),
    }
    if "quoted" in form:
        text = text.removeprefix('"').removesuffix('"')
    lines = text.split("\n")
    for name, at in (("begin", 0), ("end", -1)):
        if name in form and lines:
            met[name] = lines.pop(at).casefold() == form[name][0].casefold()
    met |= _layout_and_content(lines, form)
    return {name: met.get(name, False) for name in form}


def _layout_and_content(lines: Sequence[str], form: Form) -> dict[str, bool]:
    """Every layout, and the content of the body between first and last line.

    Content is compared letter by letter, or whatever its case where the form says something about case.
    """
    same: Callable[[str], str] = str.casefold if form.keys() & {"upper", "lower"} else str
    if "sentence" in form:
        sentence, count = form["sentence"]
        return {"sentence": [same(line) for line in lines] == [same(sentence)] * count}
    layout = next((name for name in form if name in LAYOUTS), None)
    items = LAYOUTS[layout](lines) if layout else " ".join(lines).split()
    found = [same(item) for item in items or []]
    met = {layout: items is not None} if layout else {}
    if "words" in form:
        return met | {"words": found == [same(word) for word in form["words"][0]]}
    known, count = form["kind"]
    return met | {"kind": len(found) == len(set(found)) == count and set(found) <= {same(word) for word in known}}


def _dashes(lines: Sequence[str]) -> list[str] | None:
    return [line[2:] for line in lines] if lines and all(line.startswith("- ") for line in lines) else None


def _numbers(lines: Sequence[str]) -> list[str] | None:
    marks = [f"{number}. " for number in range(1, len(lines) + 1)]
    if not lines or not all(line.startswith(mark) for line, mark in zip(lines, marks, strict=True)):
        return None
    return [line.removeprefix(mark) for line, mark in zip(lines, marks, strict=True)]


def _commas(lines: Sequence[str]) -> list[str] | None:
    items = lines[0].split(", ") if len(lines) == 1 else []
    return items if len(items) > 1 else None


def _json(lines: Sequence[str]) -> list[str] | None:
    try:
        items = json.loads("\n".join(lines))
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None


LAYOUTS: dict[str, Callable[[Sequence[str]], list[str] | None]] = {
    "dashes": _dashes,
    "numbers": _numbers,
    "commas": _commas,
    "JSON": _json,
}
"""Lines -> the items in them; None for lines of another layout."""
