"""The whole pipeline on the embedded model: what `hymba-tune run recipes/pipeline.yaml --tiny` takes and gives.

    python -m benchmarks.pipeline_tiny [--threads 1] [--keep FOLDER]

Claim: on two threads or fewer in under 12 minutes, with scores after every stage: SFT-1 over 60 % exact match; SFT-2
follows constraints at least 30 points better; DPO prefers over 85 % of the preferred replies, wins more often and keeps
SFT-1's skills within 5 points; the role-play adapter trains under 10 % of the parameters for 15 or more of Rouge-L.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.quickstart import TASKS, THREADS, exact_match, timed_run, training
from benchmarks.record import write_result
from hymba_tune.pipeline import load_pipeline
from hymba_tune.plan import Plan, make_plans

RECIPE = "recipes/pipeline.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--keep", type=Path, help="a folder that is not there yet, for the runs and their report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.keep or Path(folder) / "pipeline"
        taken = timed_run(RECIPE, runs, arguments.threads, "--tiny")
        figures: dict[str, Any] = {"recipe": RECIPE, "threads": arguments.threads, **taken}
        plans = make_plans(load_pipeline(RECIPE, [f"output.dir={runs}"], tiny=True).stages)
        figures["stages"] = {plan.recipe.stage: stage(plan, runs / plan.recipe.stage) for plan in plans}
    figures["claims"] = claims(figures)
    write_result("pipeline_tiny", figures)


def stage(plan: Plan, run: Path) -> dict[str, Any]:
    """What a stage trained, what it took, and every score before and after it."""
    assert plan.parts is not None
    return {
        "parameters": sum(plan.parts.values()),
        "trained_parameters": plan.trained,
        **training(run),
        **{moment: scores(run, moment) for moment in ("before", "after")},
    }


def scores(run: Path, moment: str) -> dict[str, Any]:
    """Every metric of every task, in percent, with standard error and items; exact match over its tasks too."""
    table: dict[str, Any] = {}
    for path in sorted((run / "eval" / moment).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, metric in result["metrics"].items():
            table[f"{path.stem} {name}"] = percent(metric)
        table[f"{path.stem} seconds"] = result["seconds"]
    if all((run / "eval" / moment / f"{task}.json").exists() for task in TASKS):
        table["exact_match of all"] = percent(exact_match(run, moment))
    return table


def percent(metric: dict[str, Any]) -> dict[str, Any]:
    stderr = metric["stderr"]
    return {"percent": 100 * metric["value"], "stderr": None if stderr is None else 100 * stderr, "n": metric["n"]}


def claims(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each claim with its figure and whether that holds."""
    sft1, sft2, dpo, role = figures["stages"].values()

    def value(stage: dict[str, Any], moment: str, name: str) -> float:
        return float(stage[moment][name]["percent"])

    def gain(stage: dict[str, Any], name: str) -> float:
        return value(stage, "after", name) - value(stage, "before", name)

    share = 100 * role["trained_parameters"] / role["parameters"]
    found = {
        "minutes, under 12": (figures["seconds"] / 60, figures["seconds"] < 720),
        "SFT-1 exact match, over 60": (x := value(sft1, "after", "exact_match of all"), x > 60),
        "SFT-2 constraints, +30": (x := gain(sft2, "tiny_constraints all_constraints"), x >= 30),
        "DPO accuracy, over 85": (x := value(dpo, "after", "tiny_preferences preference_accuracy"), x > 85),
        "DPO win share, up": (x := gain(dpo, "tiny_preferences win_share"), x > 0),
        "DPO exact match, at most 5 lost": (x := gain(dpo, "exact_match of all"), x >= -5),
        "role-play Rouge-L, +15": (x := gain(role, "tiny_roles rouge_l"), x >= 15),
        "role-play trained share, under 10": (share, share < 10),
    }
    return {name: {"value": figure, "holds": holds} for name, (figure, holds) in found.items()}


if __name__ == "__main__":
    main()
