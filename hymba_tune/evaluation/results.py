"""A task's result: scores with standard errors, every item with its verdict, and whether the score can be trusted.

A result is a plain dictionary, one JSON file a task:
    task               name
    protocol           the rules, with their version
    headline           the metric to quote
    metrics            {name: {value, n, stderr}}
    settings           what decides the answers: model, tokenizer, data, limits
    items              [{id, prompt_sha256 (of its token ids), prompt (the question, where it may be shown), answer,
                       extracted, target, verdict {metric: score}, why, ...}]
    packages           versions
    seconds, tokens_per_second
    cut_prompts        how many did not fit the model and lost their beginning
    cut_answers        how many reached the token limit instead of ending
    suspect            why the score may mean "broken" instead of "bad", else null
    not_run            why there is no score, else null
    parts_not_run      {part: why} of a benchmark that ran in part
"""

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hymba_tune.provenance import PACKAGES, version
from hymba_tune.run_dir import RunDir

T = TypeVar("T")

EMPTY_SHARE_SUSPECT = 0.20
"""More empty answers than this say that something broke: a model that merely answers badly still answers."""
EXTRACTED_SHARE_SUSPECT = 0.01
"""Something to judge in fewer answers than this says the same: a score then counts answers that have the wrong form."""
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """value in [0, 1]; n items; stderr None where one item cannot tell."""

    value: float
    n: int
    stderr: float | None

    def to_json(self) -> dict[str, float | int | None]:
        return {"value": self.value, "n": self.n, "stderr": self.stderr}


def mean_metric(values: Sequence[float]) -> Metric:
    """Mean and its standard error s / sqrt(n); for right-or-wrong items that is exactly sqrt(p (1 - p) / (n - 1))."""
    n = len(values)
    if n == 0:
        raise ValueError("a metric needs at least one item")
    return Metric(statistics.fmean(values), n, statistics.stdev(values) / math.sqrt(n) if n > 1 else None)


def bootstrap_metric(statistic: Callable[[Sequence[T]], float], units: Sequence[T], seed: int = 0) -> Metric:
    """`statistic` of `units`; the standard error resamples whole units (the independent ones: prompts, not parts)."""
    if len(units) < 2:
        return Metric(statistic(units), len(units), None)
    rng = random.Random(seed)
    draws = [statistic(rng.choices(units, k=len(units))) for _ in range(BOOTSTRAP_SAMPLES)]
    return Metric(statistic(units), len(units), statistics.stdev(draws))


@dataclass(frozen=True)
class Scores:
    """What a task found: its metrics, and the items they were computed from."""

    metrics: dict[str, Metric]
    items: list[dict[str, Any]]


def finished_result(
    task: str, protocol: str, headline: str, settings: dict[str, Any], scores: Scores, seconds: float, new_tokens: int
) -> dict[str, Any]:
    """The result of a task that ran."""
    return {
        "task": task,
        "protocol": protocol,
        "headline": headline,
        "metrics": {name: metric.to_json() for name, metric in scores.metrics.items()},
        "settings": settings,
        "items": scores.items,
        "packages": package_versions(),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(new_tokens / seconds, 1) if new_tokens and seconds > 0 else None,
        "cut_prompts": sum(item.get("dropped_prompt_tokens", 0) > 0 for item in scores.items),
        "cut_answers": sum(item.get("finish_reason") == "length" for item in scores.items),
        "suspect": suspicion(scores.items),
        "not_run": None,
        "parts_not_run": {},
    }


def not_run_result(task: str, protocol: str, settings: dict[str, Any], reason: str) -> dict[str, Any]:
    """The result of a task that could not run: no score at all, which is not a score of 0."""
    return {
        "task": task,
        "protocol": protocol,
        "headline": None,
        "metrics": {},
        "settings": settings,
        "items": [],
        "packages": package_versions(),
        "seconds": 0.0,
        "tokens_per_second": None,
        "suspect": None,
        "not_run": reason,
        "parts_not_run": {},
    }


def suspicion(items: Sequence[dict[str, Any]]) -> str | None:
    """Why these answers look broken instead of wrong, or None."""
    if not items:
        return None
    empty = sum(not str(item["answer"]).strip() for item in items)
    if empty / len(items) > EMPTY_SHARE_SUSPECT:
        return f"{empty} of {len(items)} answers are empty: check the chat template, end of turn and the checkpoint"
    for name, found in _extracted(items).items():
        if found / len(items) < EXTRACTED_SHARE_SUSPECT:
            of = f"{name}: " if name else ""
            return (
                f"{of}an answer could be extracted from {found} of {len(items)} answers: check their form in the items"
            )
    return None


def _extracted(items: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many answers something was extracted from, by the extractor's name; '' where a task has one only."""
    found: Counter[str] = Counter()
    for item in items:
        extracted = item["extracted"]
        for name, value in extracted.items() if isinstance(extracted, dict) else [("", extracted)]:
            found[name] += value is not None
    return found


def package_versions() -> dict[str, str]:
    """The installed packages that can change a number."""
    return {name: found for name in PACKAGES if (found := version(name))}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    # A lone surrogate, which UTF-8 cannot hold, becomes the JSON escape it came from.
    RunDir(path.parent).write_text(path.name, text.encode("utf-8", "backslashreplace").decode() + "\n")


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file, or None if there is none or it is not one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "metrics" in result else None
