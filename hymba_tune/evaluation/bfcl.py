"""BFCL v2 (Berkeley function-calling leaderboard): answers to scores.

Two protocols on the same questions and rules: `bfcl_v2` asks with the leaderboard's system prompt and reads the text
form `[f(a=1)]`; `bfcl_v2_tools` shows the functions through the chat template's `tools` and reads its `<toolcall>`
blocks, the form that Hymba was trained on. The executed categories (NOT_RUN) have no score here.

Metrics: each category's accuracy (`simple` is Python's), and

- hymba: the mean of live simple, multiple, parallel, parallel_multiple and relevance, the five categories that Hymba's
  published 46.40 names; 46.40 % is no n/1376, so not of the five pooled;
- live: all live items pooled, the official live score;
- non_live_ast: the mean of simple (itself the mean of Python, Java and JavaScript), multiple, parallel,
  parallel_multiple and irrelevance: the official non-live score without its four executed categories;
- overall_ast: the official mean of ten without its four executed ones: mean(live, non-live) of simple, multiple,
  parallel, parallel_multiple and irrelevance, and live relevance.
"""

from collections.abc import Sequence
from typing import Any

from hymba_tune.evaluation.averages import mean_of_metrics
from hymba_tune.evaluation.bfcl_ast import Fault, check, show
from hymba_tune.evaluation.bfcl_decode import Call, Undecodable, decode, decode_tool_calls
from hymba_tune.evaluation.bfcl_questions import (
    CATEGORIES,
    LANGUAGES,
    LIVE,
    NON_LIVE,
    Row,
    language,
    prompt_messages,
    tool_schemas,
)
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Metric, Scores, mean_metric

PROTOCOLS = {
    "bfcl_v2": "BFCL v2 (gorilla 3f5ace7d), leaderboard system prompt, text calls, AST rules v1",
    "bfcl_v2_tools": "BFCL v2 (gorilla 3f5ace7d), functions as chat-template tools, <toolcall> JSON, AST rules v1",
}
HEADLINE = "hymba"
MAX_NEW_TOKENS = 1000  # the leaderboard's max_tokens; its temperature 0.001 is greedy here
ACCURACY = "accuracy"
"""The score of one item: 1.0 or 0.0."""

SHOWN_CALLS, SHOWN_CHARS = 20, 1_000
"""How many decoded calls a result keeps, and how much of each; the answer itself is kept whole."""
NOT_RUN = dict.fromkeys(
    ("exec_simple", "exec_multiple", "exec_parallel", "exec_parallel_multiple", "rest"),
    "runs the answer's calls against live services with API keys; answers are never run here",
)
"""The leaderboard's categories without a score, and why."""


def judge(row: Row, calls: Sequence[Call] | Undecodable) -> Fault | None:
    """The official verdict on the calls of an answer: None where it is right, else the error type and a sentence."""
    category = row["category"]
    if "relevance" in category:
        called = not isinstance(calls, Undecodable) and len(calls) > 0
        if "irrelevance" in category:
            return Fault("irrelevance_error:decoder_success", "calls a function") if called else None
        return None if called else Fault("relevance_error:decoder_failed", "calls no function")
    if isinstance(calls, Undecodable):
        return Fault(calls.error_type, str(calls))
    return check(calls, row["function"], row["ground_truth"], category, language(category))


def decode_or_error(task: str, row: Row, answer: Any) -> list[Call] | Undecodable:
    """The calls of an answer in the task's form, or why there are none."""
    try:
        return decode_tool_calls(answer) if task == "bfcl_v2_tools" else decode(answer, language(row["category"]))
    except Undecodable as error:
        return error


def score(task: str, row: Row, answer: Any) -> Verdict:
    """The verdict on one answer, as the results keep it."""
    calls = decode_or_error(task, row, answer)
    fault = judge(row, calls)
    found = None if isinstance(calls, Undecodable) else [_shown(call) for call in calls[:SHOWN_CALLS]]
    return Verdict({ACCURACY: float(fault is None)}, found, f"{fault.error_type}: {fault.why}" if fault else "right")


def _shown(call: Call) -> str:
    text = f"{call.name}({', '.join(f'{name}={show(value)}' for name, value in call.arguments.items())})"
    return text[:SHOWN_CHARS]


def run_bfcl(task: str, engine: Engine, rows: Sequence[Row], limit: int | None) -> Scores:
    """`bfcl_v2` or `bfcl_v2_tools` on the first `limit` questions of each category (None: all)."""
    taken = [row for name in CATEGORIES for row in [row for row in rows if row["category"] == name][:limit]]
    by_id = {row["id"]: row for row in taken}
    items = [_chat_item(task, row) for row in taken]
    return run_chat_task(
        engine,
        items,
        lambda item, answer: score(task, by_id[item.id], answer),
        max_new_tokens=MAX_NEW_TOKENS,
        aggregate=aggregate,
    )


def _chat_item(task: str, row: Row) -> ChatItem:
    if task == "bfcl_v2_tools":
        return ChatItem(row["id"], row["question"], row["ground_truth"], tool_schemas(row), row["category"])
    return ChatItem(row["id"], prompt_messages(row), row["ground_truth"], None, row["category"])


def aggregate(items: Sequence[ChatItem], verdicts: Sequence[Verdict]) -> dict[str, Metric]:
    """Each category's accuracy, and the overall metrics that have all their categories."""
    by_category: dict[str, list[float]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        by_category.setdefault(item.group, []).append(verdict.scores[ACCURACY])
    return overall(by_category)


def overall(by_category: dict[str, list[float]]) -> dict[str, Metric]:
    """The metrics of the file's first lines, from each category's scores."""
    one = {name: mean_metric(scores) for name, scores in by_category.items()}
    metrics = dict(one)
    if {"simple", "java", "javascript"} <= one.keys():
        one["simple"] = mean_of_metrics([one["simple"], one["java"], one["javascript"]])
    live = [name for name in LIVE if name != "live_irrelevance"]
    if one.keys() >= set(live):
        metrics["hymba"] = mean_of_metrics([one[name] for name in live])
    if one.keys() >= set(LIVE):
        metrics["live"] = mean_metric([score for name in LIVE for score in by_category[name]])
    kinds = [name for name in NON_LIVE if name not in LANGUAGES]
    if one.keys() >= set(NON_LIVE):
        metrics["non_live_ast"] = mean_of_metrics([one[name] for name in kinds])
    if one.keys() >= set(CATEGORIES):
        both = [mean_of_metrics([one[name], one[f"live_{name}"]]) for name in kinds]
        metrics["overall_ast"] = mean_of_metrics([*both, one["live_relevance"]])
    return metrics
