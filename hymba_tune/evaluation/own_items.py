"""A user's own items: a JSONL file and the name of a scorer, as `FILE.jsonl:SCORER`.

One object a line:

    prompt     the question; or messages, a conversation that ends with the user's (or a tool's) turn
    target     what the scorer compares with (scorers.py)
    id         a name for results; else the line's number
    system     a system message before the prompt
    tools      function descriptions for the chat template
    group      a name: its items get a metric of their own, METRIC/GROUP

Other keys are the user's own. The file is checked as a whole before anything is asked.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import read_jsonl
from hymba_tune.errors import UserError
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, mean_of_each, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Metric, Scores
from hymba_tune.evaluation.scorers import SCORERS, target_fault

MAX_NEW_TOKENS = 1024
HEADLINES = {name: "rouge_l_f1" if name == "rouge" else "exact_match" for name in SCORERS}
_ROLES = ("system", "user", "assistant", "tool")

Row = dict[str, Any]


def own_rows(path: Path, scorer: str) -> list[Row]:
    """The items of a file: id, messages, target, tools, group.

    Raises UserError with file and line for one that cannot be asked or scored, and for a file without items.
    """
    rows = [_row(path, number, row, scorer) for number, row in enumerate(read_jsonl(path), 1)]
    if not rows:
        raise UserError(f"{path}: no items; write prompt and target, one object a line")
    repeated = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: two items have the id {repeated[0]!r}; rename one")
    return rows


def _row(path: Path, number: int, row: Row, scorer: str) -> Row:
    messages = row.get("messages")
    if messages is None:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = [*system, {"role": "user", "content": row.get("prompt")}]
    fault = _messages_fault(messages) or target_fault(scorer, row.get("target"))
    if fault is None and not isinstance(row.get("tools") or [], list):
        fault = "tools needs a list of function descriptions"
    if fault:
        raise UserError(f"{path}: item {number}: {fault}; repair it")
    return {
        "id": str(row.get("id", number)),
        "messages": messages,
        "target": row["target"],
        "tools": row.get("tools") or None,
        "group": str(row.get("group") or ""),
    }


def _messages_fault(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "messages is not a list"
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return f"a message needs a role of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return "needs prompt, a text (or messages, each with a text)"
    return None if messages[-1]["role"] in ("user", "tool") else "the last message is not the user's"


def run_own_items(scorer: str, engine: Engine, rows: Sequence[Row], limit: int | None) -> Scores:
    """The first `limit` items (None: all)."""
    items = [ChatItem(row["id"], row["messages"], row["target"], row["tools"], row["group"]) for row in rows[:limit]]
    return run_chat_task(
        engine,
        items,
        lambda item, answer: SCORERS[scorer](answer, item.target),
        max_new_tokens=MAX_NEW_TOKENS,
        aggregate=_aggregate,
    )


def _aggregate(items: Sequence[ChatItem], verdicts: Sequence[Verdict]) -> dict[str, Metric]:
    """Each score's mean, and its mean in each group."""
    metrics = mean_of_each(items, verdicts)
    for group in dict.fromkeys(item.group for item in items if item.group):
        own = [verdict for item, verdict in zip(items, verdicts, strict=True) if item.group == group]
        metrics |= {f"{name}/{group}": metric for name, metric in mean_of_each([], own).items()}
    return metrics
