"""Scorers by name, for items that are judged by what an answer says; answers are data: parsed and compared, never run.

    exact      the answer is the target, blanks around both aside
    contains   the target stands in the answer, case aside
    number     the last number of the answer equals the target: 1,234.50 is 1234.5
    rouge      Rouge-L F1 and recall against the target, words as blanks separate them (PyPI rouge 1.0.1)
    code       the first fenced block (else the whole answer) is the target: the same text, or the same Python tree
    calls      all <toolcall> blocks, in order, are the target's calls as JSON values

`target` is a text, or a list of texts of which the best counts; for `calls` it is the list of calls.
Only the last (number) or first (others) LONGEST characters of an answer are read.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from hymba_tune.evaluation.chat_task import Verdict
from hymba_tune.evaluation.rouge import union_rouge_l

LONGEST = 20_000
METRIC = "exact_match"
_NUMBER = re.compile(r"[+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TOOL_CALL = re.compile(r"<toolcall>(.*?)(?:</toolcall>|\Z)", re.DOTALL)

Scorer = Callable[[str, Any], Verdict]


def score_exact(answer: str, target: str | list[str]) -> Verdict:
    """`exact` of the file's first lines."""
    found = answer[:LONGEST].strip()
    return verdict(found or None, found in [text.strip() for text in texts(target)], target, "an empty answer")


def score_contains(answer: str, target: str | list[str]) -> Verdict:
    """`contains`."""
    found = answer[:LONGEST].casefold()
    right = any(text.casefold() in found for text in texts(target))
    return verdict("whole answer" if found.strip() else None, right, target, "an empty answer")


def score_number(answer: str, target: str | list[str]) -> Verdict:
    """`number`."""
    found = _NUMBER.findall(answer[-LONGEST:])
    wanted = [_value(text) for text in texts(target)]
    return verdict(found[-1] if found else None, bool(found) and _value(found[-1]) in wanted, target, "no number")


def score_rouge(answer: str, target: str | list[str]) -> Verdict:
    """`rouge`: the best of each figure over the targets."""
    text = answer[:LONGEST]
    found = [union_rouge_l(text, wanted) for wanted in texts(target)]
    scores = {"rouge_l_f1": max(one.f1 for one in found), "rouge_l_recall": max(one.recall for one in found)}
    return Verdict(scores, "whole answer" if text.strip() else None, f"best of {len(found)} targets")


def score_code(answer: str, target: str | list[str]) -> Verdict:
    """`code`."""
    fenced = _FENCE.search(answer[:LONGEST])
    code = (fenced[1] if fenced else answer[:LONGEST]).strip()
    tree = _syntax_tree(code)
    right = any(code == one.strip() or (tree is not None and tree == _syntax_tree(one)) for one in texts(target))
    return verdict(code or None, bool(code) and right, target, "an empty answer")


def score_calls(answer: str, target: list[dict[str, Any]]) -> Verdict:
    """`calls`."""
    blocks = _TOOL_CALL.findall(answer[:LONGEST])
    if not blocks:
        return verdict(None, False, target, "no <toolcall> in the answer")
    try:
        calls = [json.loads(block, parse_float=_json_number) for block in blocks]
        right = _canonical(calls) == _canonical(json.loads(json.dumps(target), parse_float=_json_number))
    except (ValueError, RecursionError):
        return verdict(None, False, target, "a tool call is not JSON")
    return verdict(calls, right, target, "")


SCORERS: dict[str, Scorer] = {
    "exact": score_exact,
    "contains": score_contains,
    "number": score_number,
    "rouge": score_rouge,
    "code": score_code,
    "calls": score_calls,
}


def target_fault(scorer: str, target: Any) -> str | None:
    """What keeps a target from being compared by a scorer, or None."""
    if scorer == "calls":
        calls = target if isinstance(target, list) and target else [None]
        if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            return "target needs a list of calls, each with name and arguments"
        return None
    if not texts(target) or not all(isinstance(text, str) and text.strip() for text in texts(target)):
        return "target needs a text, or a list of texts"
    if scorer == "number" and not all(_NUMBER.fullmatch(text.strip()) for text in texts(target)):
        return f"target {target!r} is no number"
    return None


def texts(target: Any) -> Sequence[Any]:
    """One target or several, as several."""
    return target if isinstance(target, list) else [target]


def verdict(found: Any, right: bool, target: Any, nothing: str) -> Verdict:
    """A right-or-wrong verdict; `nothing` says why where nothing was found."""
    if found is None:
        return Verdict({METRIC: 0.0}, None, nothing)
    wanted = target if isinstance(target, str) else json.dumps(target)
    return Verdict({METRIC: float(right)}, found, "right" if right else f"not {wanted[:80]}")


def _value(text: str) -> Decimal:
    return Decimal(text.strip().replace(",", ""))


def _syntax_tree(code: str) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # a doubtful escape in an answer is nobody's concern
            return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _json_number(text: str) -> float | int:
    """JSON does not tell 2.0 from 2."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
