"""Real conversations and the real tokenizer, end to end: `hymba-tune run recipes/sft1_files.yaml`, full and with DoRA.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.sft1_files [--threads 1]

Claim: one epoch of 2,000 conversations (GSM8K, code, tool calls) trains a Hymba of about 10M parameters with the
vocabulary of 32,001; the loss falls, 50 test items of GSM8K are scored before and after, and a report is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline_tiny import percent
from benchmarks.quickstart import THREADS, timed_run, training
from benchmarks.record import write_result
from hymba_tune.plan import make_plans
from hymba_tune.recipe import load_recipe
from hymba_tune.run_dir import RunDir

RECIPE = "recipes/sft1_files.yaml"
RUNS = {"full": (), "dora": ("stage=sft1_files_dora", "adapter={type: dora, r: 16, alpha: 32}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=THREADS)
    threads = parser.parse_args().threads
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(Path(folder) / name, threads, *settings) for name, settings in RUNS.items()}
    write_result("sft1_files", {"recipe": RECIPE, "threads": threads, "runs": runs})


def run(folder: Path, threads: int, *settings: str) -> dict[str, Any]:
    """One run: what it took, what it trained, its scores, and whether the claim holds."""
    taken = timed_run(RECIPE, folder, threads, *settings)
    (plan,) = make_plans([load_recipe(RECIPE, [*settings, f"output.dir={folder}"])])
    assert plan.parts is not None
    directory, learned = RunDir(folder), training(folder)
    falls = learned["loss_last"] < learned["loss_first"]
    scores = {moment: gsm8k(directory.evaluation(moment)) for moment in ("before", "after")}
    return {
        "settings": list(settings),
        "parameters": sum(plan.parts.values()),
        "trained_parameters": plan.trained,
        "conversations": sum(source["conversations"] for source in directory.read_json(directory.data)["sources"]),
        **taken,
        **learned,
        "gsm8k": scores,
        "report_bytes": directory.page.stat().st_size,
        "holds": falls and all(metric["n"] == 50 for score in scores.values() for metric in score.values()),
    }


def gsm8k(folder: Path) -> dict[str, Any]:
    """Every metric of the stored scores, in percent, with standard error and items."""
    result = json.loads((folder / "gsm8k.json").read_text(encoding="utf-8"))
    return {name: percent(metric) for name, metric in result["metrics"].items()}


if __name__ == "__main__":
    main()
