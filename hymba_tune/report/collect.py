"""A run directory's files -> one results dictionary, of a run that is finished, cut off or still going.

stage, method, finished (steps), settings (the resolved recipe), environment, data (counts)
warnings  [{stage_step, message}] of the run, doubts (everything that speaks against its figures, in sentences)
parent    {stage, changes: [{key, old, new}]}: the run this one starts from, where it lies beside it
paper     [{key, paper, here, note}]: what the paper states otherwise; null where it states nothing
training  {steps, epochs, tokens, supervised_tokens, seconds, tokens_per_second, first_loss, last_loss,
              loss_lost_at (first step whose loss is not finite), curve}
evaluation_seconds  {before, after}; scores that were taken over from the stage before count as they did there
headline  the headline metrics before and after, as headline.py has them
scores    [{task, metric, headline, protocol, before, after, change, notes}], a row a metric
samples   {task: samples}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hymba_tune.errors import UserError
from hymba_tune.report.doubts import doubts
from hymba_tune.report.headline import headline
from hymba_tune.report.samples import choose_samples
from hymba_tune.report.scores import ran, score_rows, task_results
from hymba_tune.report.settings import against_paper, changed_settings
from hymba_tune.run_dir import RunDir

SCHEMA = 1
STAGE_PREFIX = "stage:"
CURVE_POINTS = 200
CURVE_FIELDS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
STEPS = ("data", "before", "training", "after")


def collect(path: str | Path) -> dict[str, Any]:
    """The results of the run in `path`; a part that the run has not reached is null or empty.

    Raises UserError for a file that was broken from outside.
    """
    run = RunDir(path)
    state = run.read_json(run.state) or {}
    recipe = read_recipe(run)
    before, after = task_results(run, "before"), task_results(run, "after")
    tasks = list(dict.fromkeys([*recipe.get("eval", {}).get("suites", []), *before, *after]))
    results = {
        "schema": SCHEMA,
        "stage": recipe.get("stage"),
        "method": recipe.get("method"),
        "finished": state.get("finished", []),
        "settings": recipe,
        "environment": run.read_json(run.environment),
        "warnings": run.read_json(run.warnings) or [],
        "parent": _parent(run, recipe),
        "paper": against_paper(recipe),
        "data": run.read_json(run.data),
        "training": _training(metric_lines(run.metrics)),
        "evaluation_seconds": {"before": _seconds(before), "after": _seconds(after)},
        "headline": headline({"before": before, "after": after}),
        "scores": [row for task in tasks for row in score_rows(task, before.get(task), after.get(task))],
        "samples": {task: choose_samples(ran(before.get(task)), ran(after.get(task))) for task in tasks},
    }
    return results | {"doubts": doubts(results)}


def read_recipe(run: RunDir) -> dict[str, Any]:
    """The resolved recipe; empty where there is none. Raises UserError if it was broken from outside."""
    if not run.recipe.exists():
        return {}
    try:
        recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{run.recipe}: not valid YAML ({str(error).splitlines()[0]}); run the stage again") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{run.recipe}: holds no recipe; run the stage again")
    return recipe


def parent_name(recipe: dict[str, Any]) -> str | None:
    """The stage that a recipe starts from."""
    source = str((recipe.get("model") or {}).get("from"))
    return source.removeprefix(STAGE_PREFIX) if source.startswith(STAGE_PREFIX) else None


def _seconds(results: Mapping[str, Any]) -> float:
    return round(sum(result["seconds"] for result in results.values()), 1)


def _parent(run: RunDir, recipe: dict[str, Any]) -> dict[str, Any] | None:
    name = parent_name(recipe)
    parent = read_recipe(RunDir(run.path.absolute().parent / name)) if name else {}
    return {"stage": name, "changes": changed_settings(parent, recipe)} if parent else None


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, NaN and infinity as null; a line cut short is left out.

    Of training alone: lines of evaluations on held-out rows (`eval_loss`, `sources`) are left out too.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text, parse_constant=lambda name: None))
        except ValueError:
            continue
    return [line for line in lines if "eval_loss" not in line]


def _training(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not lines:
        return None
    last = lines[-1]
    return {
        "steps": last["step"],
        "epochs": last["epoch"],
        "tokens": last.get("tokens"),
        "supervised_tokens": last.get("supervised_tokens"),
        "seconds": last.get("seconds"),
        "tokens_per_second": _rate(last),
        "first_loss": lines[0]["loss"],
        "last_loss": last["loss"],
        "loss_lost_at": next((line["step"] for line in lines if line["loss"] is None), None),
        "curve": [{key: line.get(key) for key in CURVE_FIELDS} for line in thinned(lines, CURVE_POINTS)],
    }


def _rate(line: dict[str, Any]) -> float | None:
    tokens, seconds = line.get("tokens"), line.get("seconds")
    return round(tokens / seconds, 1) if tokens and seconds else None


def thinned(lines: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` lines evenly from the first to the last."""
    if len(lines) <= count:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (count - 1))] for i in range(count)]
