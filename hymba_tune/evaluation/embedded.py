"""The embedded tasks: held-out arithmetic, code and function calls of data/synthetic, judged by exact match.

Answers are data: code is parsed and compared, never run.
"""

from collections.abc import Sequence
from typing import Any

from hymba_tune.data.synthetic import held_out
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Scores
from hymba_tune.evaluation.scorers import LONGEST, Scorer, score_calls, score_code, verdict

TASKS = ("tiny_math", "tiny_code", "tiny_calls")
ITEMS = 300
"""Held-out items a task: a standard error of at most 2.9 points."""
MAX_NEW_TOKENS = 96
"""Nearly twice the longest reference answer in the embedded tokenizer."""


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
    return verdict(found, found == target, target, "no '####' in the answer")


SCORERS: dict[str, Scorer] = {
    "number": score_number,
    "code": score_code,
    "calls": score_calls,
}
