"""The embedded tasks: held-out arithmetic, code and function calls of data/synthetic.py, judged by exact match.

Answers are data: code is parsed and compared, never run.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Scores

ITEMS = 400
"""Held-out items a task: a standard error of at most 2.5 points."""
MAX_NEW_TOKENS = 256
LONGEST = 20_000
"""Characters of an answer that are parsed; no reference comes near it."""

METRIC = "exact_match"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOOL_CALL = re.compile(r"<toolcall>(.*?)(?:</toolcall>|\Z)", re.DOTALL)


def held_out_items(kind: str) -> list[dict[str, Any]]:
    """ITEMS held-out items of one kind (`math`, `code`, `calls`)."""
    from hymba_tune.data.synthetic import held_out

    return held_out(kind, ITEMS)


def run_embedded(engine: Engine, rows: Sequence[dict[str, Any]], limit: int | None) -> Scores:
    """Exact match on the first `limit` items (None: all)."""
    items = [ChatItem(row["id"], row["messages"], row["target"], row.get("tools")) for row in rows[:limit]]
    scorer = {row["id"]: SCORERS[row["scorer"]] for row in rows}
    return run_chat_task(
        engine, items, lambda item, answer: scorer[item.id](answer, item.target), max_new_tokens=MAX_NEW_TOKENS
    )


def score_math(answer: str, target: Any) -> Verdict:
    """The text after the last "####" against the target, spaces and thousands commas aside."""
    _, mark, number = answer[-LONGEST:].rpartition("####")
    found = number.strip().replace(",", "") if mark else None
    return _verdict(found, found == str(target).strip().replace(",", ""), target, "no '####' in the answer")


def score_code(answer: str, target: Any) -> Verdict:
    """The first fenced block (else the whole answer) against the target: the same text, or the same syntax tree."""
    text = answer[:LONGEST]
    fenced = _FENCE.search(text)
    code = _tidy(fenced[1] if fenced else text)
    wanted = _tidy(str(target))
    tree = _syntax_tree(code)
    right = bool(code) and (code == wanted or (tree is not None and tree == _syntax_tree(wanted)))
    return _verdict(code or None, right, target, "an empty answer")


def score_calls(answer: str, target: Any) -> Verdict:
    """All tool calls of the answer, in order, against the target as JSON values."""
    blocks = _TOOL_CALL.findall(answer[:LONGEST])
    if not blocks:
        return _verdict(None, False, target, "no <toolcall> in the answer")
    try:
        calls = [json.loads(block, parse_float=_number) for block in blocks]
        wanted = target if isinstance(target, list) else [target]
        right = _canonical(calls) == _canonical(json.loads(json.dumps(wanted), parse_float=_number))
    except (ValueError, RecursionError):
        return Verdict({METRIC: 0.0}, None, "a tool call is not JSON")
    return _verdict(calls, right, target, "")


SCORERS: dict[str, Callable[[str, Any], Verdict]] = {"math": score_math, "code": score_code, "calls": score_calls}


def _verdict(found: Any, right: bool, target: Any, nothing: str) -> Verdict:
    if found is None:
        return Verdict({METRIC: 0.0}, None, nothing)
    return Verdict({METRIC: float(right)}, found, "right" if right else f"not {str(target)[:60]}")


def _tidy(code: str) -> str:
    """Without trailing blanks, and blank lines around."""
    return "\n".join(line.rstrip() for line in code.strip("\n").split("\n")).rstrip()


def _syntax_tree(code: str) -> str | None:
    try:
        return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _number(text: str) -> float | int:
    """JSON does not tell 2.0 from 2."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
