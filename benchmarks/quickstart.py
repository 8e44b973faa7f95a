"""The quick start: what `hymba-tune run recipes/sft1.yaml --tiny` takes and gives, on two threads or fewer.

    python -m benchmarks.quickstart [--recipe recipes/sft1_dora.yaml] [--threads 1]

Claim: in under 5 minutes, scores before and after included, the embedded model goes from under 5 % to over 60 % exact
match on at least 300 held-out items.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

TASKS = ("tiny_math", "tiny_code", "tiny_calls")
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/sft1.yaml")
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        taken = timed_run(arguments.recipe, run, arguments.threads, "--tiny")
        figures = {"recipe": arguments.recipe, "threads": arguments.threads, **taken, **training(run), **scores(run)}
    stem = Path(arguments.recipe).stem
    write_result("quickstart" if stem == "sft1" else f"quickstart_{stem}", figures)


def timed_run(recipe: str, folder: Path, threads: int, *settings: str) -> dict[str, float]:
    """Run a recipe or pipeline into a folder: seconds, and processor seconds of all its processes.

    settings: what else stands on the command line, --tiny or overrides.
    """
    program = str(Path(sys.executable).with_name("hymba-tune"))
    command = [program, "run", recipe, *settings, f"output.dir={folder}"]
    before, began = _processor_seconds(), time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return {"seconds": time.perf_counter() - began, "cpu_seconds": _processor_seconds() - before}


def _processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def training(run: Path) -> dict[str, Any]:
    """What was trained on, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-1]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "supervised_tokens": last["supervised_tokens"],
        "training_seconds": last["seconds"],
        "loss_first": lines[0]["loss"],
        "loss_last": last["loss"],
    }


def scores(run: Path) -> dict[str, Any]:
    """Exact match in percent with its items, a task and in all, before and after."""
    table: dict[str, Any] = {}
    for moment in ("before", "after"):
        for task in TASKS:
            result = _result(run, moment, task)
            table[f"{task}_{moment}"] = 100 * result["metrics"]["exact_match"]["value"]
            table[f"{task}_{moment}_seconds"] = result["seconds"]
        found = exact_match(run, moment)
        table[f"all_{moment}"], table["items"] = 100 * found["value"], found["n"]
    return table


def exact_match(run: Path, moment: str) -> dict[str, Any]:
    """Over the items of all TASKS together, in [0, 1]: value, n, stderr."""
    metrics = [_result(run, moment, task)["metrics"]["exact_match"] for task in TASKS]
    n = sum(metric["n"] for metric in metrics)
    value = sum(metric["value"] * metric["n"] for metric in metrics) / n
    return {"value": value, "n": n, "stderr": math.sqrt(value * (1 - value) / (n - 1))}


def _result(run: Path, moment: str, task: str) -> dict[str, Any]:
    return dict(json.loads((run / "eval" / moment / f"{task}.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
