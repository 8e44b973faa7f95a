"""The embedded tasks: held-out arithmetic, code and function calls of data/synthetic, judged by exact match.

Answers are data: code is parsed and compared, never run.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hymba_tune.data.synthetic import held_out
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Scores

TASKS = ("tiny_math", "tiny_code", "tiny_calls")
ITEMS = 300
"""Held-out items a task: a standard error of at most 2.9 points."""
MAX_NEW_TOKENS = 96
"""Nearly twice the longest reference answer in the embedded tokenizer."""
LONGEST = 20_000
"""Characters of an answer that are parsed; no reference comes near it."""

METRIC = "exact_match"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOOL_CALL = re.compile(r"<toolcall>(.*?)(?:</toolcall>|\Z)", re.DOTALL)


def held_out_items(task: str) -> list[dict[str, Any]]:
    """The ITEMS held-out items of a task."""
    return held_out(task, ITEMS)


def run_embedded(engine: Engine, rows: Sequence[dict[str, Any]], limit: int | None) -> Scores:
    """Exact match on the first `limit` items (None: all)."""
    items = [ChatItem(row["id"], row["messages"], row["target"], row.get("tools")) for row in rows[:limit]]
    scorer = {row["id"]: SCORERS[row["scorer"]] for row in rows}
    return run_chat_task(
        engine, items, lambda item, answer: scorer[item.id](answer, item.target), max_new_tokens=MAX_NEW_TOKENS
    )


def score_number(answer: str, target: str) -> Verdict:
    """The text after the last "####" against the target, spaces and thousands commas aside."""
    _, mark, number = answer[-LONGEST:].rpartition("####")
    found = number.strip().replace(",", "") if mark else None
    return _verdict(found, found == target, target, "no '####' in the answer")


def score_code(answer: str, target: str) -> Verdict:
    """The first fenced block (else the whole answer) against the target: the same text, or the same syntax tree."""
    fenced = _FENCE.search(answer[:LONGEST])
    code = (fenced[1] if fenced else answer[:LONGEST]).strip()
    tree = _syntax_tree(code)
    right = bool(code) and (code == target.strip() or (tree is not None and tree == _syntax_tree(target)))
    return _verdict(code or None, right, target, "an empty answer")


def score_calls(answer: str, target: list[dict[str, Any]]) -> Verdict:
    """All tool calls of the answer, in order, against the target's as JSON values."""
    blocks = _TOOL_CALL.findall(answer[:LONGEST])
    if not blocks:
        return _verdict(None, False, target, "no <toolcall> in the answer")
    try:
        calls = [json.loads(block, parse_float=_number) for block in blocks]
        right = _canonical(calls) == _canonical(json.loads(json.dumps(target), parse_float=_number))
    except (ValueError, RecursionError):
        return _verdict(None, False, target, "a tool call is not JSON")
    return _verdict(calls, right, target, "")


SCORERS: dict[str, Callable[[str, Any], Verdict]] = {
    "number": score_number,
    "code": score_code,
    "calls": score_calls,
}


def _verdict(found: Any, right: bool, target: Any, nothing: str) -> Verdict:
    if found is None:
        return Verdict({METRIC: 0.0}, None, nothing)
    wanted = target if isinstance(target, str) else json.dumps(target)
    return Verdict({METRIC: float(right)}, found, "right" if right else f"not {wanted[:80]}")


def _syntax_tree(code: str) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # a doubtful escape in an answer is nobody's concern
            return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _number(text: str) -> float | int:
    """JSON does not tell 2.0 from 2."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
