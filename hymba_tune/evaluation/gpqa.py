"""GPQA main: four-choice questions by experts, no shots, the likeliest letter.

The authors ask that no question appear in plain text where a crawler finds it: results hold ids, letters and
likelihoods only.
"""

import random
import re
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import benchmark_rows
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import GLOBAL_SEED, read_task, run_tasks
from hymba_tune.evaluation.multiple_choice import METRIC, choice_item
from hymba_tune.evaluation.results import Scores, mean_metric

PROTOCOL = "GPQA main, 0-shot chat, likelihood of ' (A)' to ' (D)', choices shuffled with seed 0, lm-eval 0.4.4 v1"
LETTERS = ["(A)", "(B)", "(C)", "(D)"]
COLUMNS = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")
_BRACKETS = re.compile(r"\[.*?\]")


def gpqa_questions(data: str | Path | None) -> list[dict[str, Any]]:
    """Question, choice1 to choice4 in their shuffled order, answer (0 to 3)."""
    rng = random.Random(GLOBAL_SEED)
    return [shuffled(row, rng) for row in benchmark_rows("gpqa", "test", data)]


def shuffled(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """lm-eval's preparation of a row: texts tidied, choices shuffled with one generator over all rows."""
    choices = [_tidy(row[column]) for column in COLUMNS]
    right = choices[-1]
    rng.shuffle(choices)
    named = {f"choice{number}": choice for number, choice in enumerate(choices, 1)}
    return {"Question": row["Question"], **named, "answer": choices.index(right)}


def run_gpqa(engine: Engine, questions: list[dict[str, Any]], limit: int | None) -> Scores:
    """Accuracy on the first `limit` questions (None: all)."""
    samples = run_tasks(engine, {"gpqa": (read_task("gpqa"), {"test": questions[:limit]})})["gpqa"]
    items = [choice_item(s, f"gpqa_main/{s.doc_id}", LETTERS, s.doc["answer"], prompt=None) for s in samples]
    return Scores({METRIC: mean_metric([item["verdict"][METRIC] for item in items])}, items)


def _tidy(text: str | None) -> str:
    if text is None:
        return " "
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
