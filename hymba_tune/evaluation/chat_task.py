"""A benchmark of ours: conversations to continue, and a scorer that judges each answer.

A chat task is its items and a function (item, answer) -> Verdict; prompts, batching, caching and the result's form are
the same for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hymba_tune.evaluation.cache import prompt_fingerprint
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.results import Metric, Scores, mean_metric


@dataclass(frozen=True)
class ChatItem:
    """One conversation to continue; `target` is what the scorer compares with, `group` what metrics may be split by."""

    id: str
    messages: list[dict[str, Any]]
    target: Any
    tools: list[dict[str, Any]] | None = None
    group: str = ""


@dataclass(frozen=True)
class Verdict:
    """scores: a number by metric name; extracted: what was judged (None: nothing was found); why: in a few words."""

    scores: dict[str, float]
    extracted: Any
    why: str


Scorer = Callable[[ChatItem, str], Verdict]
Aggregate = Callable[[Sequence[ChatItem], Sequence[Verdict]], dict[str, Metric]]


def mean_of_each(items: Sequence[ChatItem], verdicts: Sequence[Verdict]) -> dict[str, Metric]:
    """Every score averaged over the items that have it."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.scores)
    return {name: mean_metric([v.scores[name] for v in verdicts if name in v.scores]) for name in names}


def run_chat_task(
    engine: Engine,
    items: Sequence[ChatItem],
    score: Scorer,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    aggregate: Aggregate = mean_of_each,
) -> Scores:
    """Answers and verdicts of all items, and the metrics over them."""
    prompts = [engine.encode_chat(item.messages, item.tools) for item in items]
    limits = [engine.limit(max_new_tokens)] * len(items)
    answers = engine.generate(prompts, max_new_tokens=limits, stop=stop)
    verdicts = [score(item, answer.text) for item, answer in zip(items, answers, strict=True)]
    rows = [
        {
            "id": item.id,
            "prompt_sha256": prompt_fingerprint(prompt),
            "prompt": item.messages[-1]["content"],
            "answer": answer.text,
            "extracted": verdict.extracted,
            "target": item.target,
            "verdict": verdict.scores,
            "why": verdict.why,
            "finish_reason": answer.finish_reason,
            "dropped_prompt_tokens": answer.dropped_prompt_tokens,
        }
        for item, prompt, answer, verdict in zip(items, prompts, answers, verdicts, strict=True)
    ]
    return Scores(aggregate(items, verdicts), rows)
