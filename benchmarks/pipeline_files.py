"""The whole pipeline on real files: `hymba-tune run recipes/pipeline_files.yaml`, a Hymba of 10M random parameters.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.pipeline_files [--threads 1] [--keep FOLDER] [SETTING...]

Claim: SFT-1, SFT-2, DPO and role-play DoRA run through, each from what the one before wrote, with scores of real
benchmarks before and after; in every stage the loss falls (the mean of its last steps under that of its first), and the
stage and the whole have a report. A model this small learns the form of answers, not to solve what the benchmarks ask.

SETTING: as on the command line (`dpo_files.data.limit=500`); kept with the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline_tiny import scores
from benchmarks.quickstart import THREADS, timed_run, training
from benchmarks.record import write_result
from hymba_tune.pipeline import load_pipeline
from hymba_tune.plan import Plan, make_plans
from hymba_tune.run_dir import RunDir

RECIPE = "recipes/pipeline_files.yaml"
STEPS = 5
"""So many first and last steps say whether the loss fell."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--keep", type=Path, help="a folder for the runs and their report; given again, it goes on")
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.keep or Path(folder) / "pipeline"
        taken = timed_run(RECIPE, runs, arguments.threads, *arguments.settings)
        plans = make_plans(load_pipeline(RECIPE, [*arguments.settings, f"output.dir={runs}"]).stages)
        figures = {
            "recipe": RECIPE,
            "settings": arguments.settings,
            "threads": arguments.threads,
            **taken,
            "report_bytes": RunDir(runs).page.stat().st_size,
            "stages": {plan.recipe.stage: stage(plan, RunDir(runs / plan.recipe.stage)) for plan in plans},
        }
    write_result("pipeline_files", figures)


def stage(plan: Plan, run: RunDir) -> dict[str, Any]:
    """What a stage started from, trained on and took, its scores, and whether the claim holds."""
    assert plan.parts is not None
    first, last = losses(run)
    found = {moment: scores(run.path, moment) for moment in ("before", "after")}
    return {
        "from": plan.recipe.model.source,
        "parameters": sum(plan.parts.values()),
        "trained_parameters": plan.trained,
        "conversations": sum(source["conversations"] for source in run.read_json(run.data)["sources"]),
        **training(run.path),
        f"loss_of_{STEPS}_first": first,
        f"loss_of_{STEPS}_last": last,
        **found,
        "report_bytes": run.page.stat().st_size,
        "holds": last < first and bool(found["after"]) and found["after"].keys() <= found["before"].keys(),
    }


def losses(run: RunDir) -> tuple[float, float]:
    """The mean loss of the first STEPS logged steps and of the last."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    values = [line["loss"] for line in lines if "loss" in line]
    return statistics.fmean(values[:STEPS]), statistics.fmean(values[-STEPS:])


if __name__ == "__main__":
    main()
