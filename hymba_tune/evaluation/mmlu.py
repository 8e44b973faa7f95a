"""MMLU: 57 subjects of four-choice questions, five fixed shots, the likeliest letter; accuracy over all questions."""

from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import benchmark_rows
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import read_task, run_tasks
from hymba_tune.evaluation.multiple_choice import METRIC, choice_item
from hymba_tune.evaluation.results import Scores, mean_metric

PROTOCOLS = {
    "mmlu": "MMLU test, 5-shot multi-turn chat, likelihood of ' A' to ' D', NVlabs/hymba (lm-eval 0.4.4) v1",
    "mmlu_upstream": "MMLU test, 5-shot multi-turn chat, likelihood of 'A' to 'D', lm-eval 0.4.13 v1",
}
LETTERS = ["A", "B", "C", "D"]

Rows = list[dict[str, Any]]


def mmlu_splits(data: str | Path | None) -> dict[str, Rows]:
    """The rows of dev (the shots) and test."""
    return {split: benchmark_rows("mmlu", split, data) for split in ("dev", "test")}


def run_mmlu(task: str, engine: Engine, splits: dict[str, Rows], limit: int | None) -> Scores:
    """`mmlu` or `mmlu_upstream` on all questions, or on `limit` of them taken from the subjects in turn.

    The metric `acc` counts every question once; `acc/SUBJECT` are its parts.
    """
    shots, questions = _by_subject(splits["dev"]), _by_subject(_in_turn(splits["test"], limit))
    config = read_task(task)
    tasks = {
        subject: (config | {"description": _description(subject)}, {"dev": shots[subject], "test": rows})
        for subject, rows in questions.items()
    }
    items: dict[str, Rows] = {
        subject: [
            choice_item(s, f"mmlu/{subject}/{s.doc['index']}", LETTERS, s.doc["answer"], s.question) for s in samples
        ]
        for subject, samples in run_tasks(engine, tasks).items()
    }
    verdicts = {subject: [item["verdict"][METRIC] for item in found] for subject, found in items.items()}
    metrics = {METRIC: mean_metric(list(chain.from_iterable(verdicts.values())))}
    metrics |= {f"{METRIC}/{subject}": mean_metric(scores) for subject, scores in verdicts.items()}
    return Scores(metrics, list(chain.from_iterable(items.values())))


def _description(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _by_subject(rows: Rows) -> dict[str, Rows]:
    subjects: dict[str, Rows] = defaultdict(list)
    for row in rows:
        subjects[row["subject"]].append(row)
    return dict(subjects)


def _in_turn(rows: Rows, limit: int | None) -> Rows:
    """The first question of every subject, then the second, and so on, `limit` in all; each with its index."""
    indexed = {subject: [row | {"index": i} for i, row in enumerate(own)] for subject, own in _by_subject(rows).items()}
    turns = chain.from_iterable(zip_longest(*indexed.values()))
    return [row for row in turns if row is not None][:limit]
