"""A run directory's files -> one results dictionary, of a run that is finished, cut off or still going.

stage, method, finished (steps), settings (the resolved recipe), environment, data (counts)
training  {steps, epochs, tokens, supervised_tokens, seconds, tokens_per_second, first_loss, last_loss,
              loss_lost_at (first step whose loss is not finite), curve}
scores    [{task, metric, headline, protocol, before, after, change, notes}], a row a metric
samples   {task: samples}
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hymba_tune.report.samples import choose_samples
from hymba_tune.run_dir import Moment, RunDir

SCHEMA = 1
CURVE_POINTS = 200
CURVE_FIELDS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
STEPS = ("data", "before", "training", "after")

Result = dict[str, Any]


def collect(path: str | Path) -> dict[str, Any]:
    """The results of the run in `path`; a part that the run has not reached is null or empty.

    Raises UserError for a file that was broken from outside.
    """
    run = RunDir(path)
    state = run.read_json(run.state) or {}
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) if run.recipe.exists() else {}
    before, after = _task_results(run, "before"), _task_results(run, "after")
    tasks = list(dict.fromkeys([*recipe.get("eval", {}).get("suites", []), *before, *after]))
    return {
        "schema": SCHEMA,
        "stage": recipe.get("stage"),
        "method": recipe.get("method"),
        "finished": state.get("finished", []),
        "settings": recipe,
        "environment": run.read_json(run.environment),
        "data": run.read_json(run.data),
        "training": _training(_metric_lines(run.metrics)),
        "scores": [row for task in tasks for row in _score_rows(task, before.get(task), after.get(task))],
        "samples": {task: choose_samples(_ran(before.get(task)), _ran(after.get(task))) for task in tasks},
    }


def _task_results(run: RunDir, moment: Moment) -> dict[str, Result]:
    folder = run.evaluation(moment)
    found = {path.stem: run.read_json(path) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if isinstance(result, dict) and "metrics" in result}


def _ran(result: Result | None) -> Result | None:
    return result if result is not None and result["not_run"] is None else None


def _metric_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, NaN and infinity as null; a line that was cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text, parse_constant=lambda name: None))
        except ValueError:
            continue
    return lines


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


def _score_rows(task: str, before: Result | None, after: Result | None) -> list[dict[str, Any]]:
    """A row a metric, the headline first; one row with notes only for a task without scores."""
    latest = after or before
    ran = [result for result in (_ran(before), _ran(after)) if result is not None]
    names = list(dict.fromkeys(name for result in ran for name in result["metrics"]))
    headline = ran[-1]["headline"] if ran else None
    base = {"task": task, "protocol": latest["protocol"] if latest else None, "notes": _notes(before, after)}
    if not names:
        return [base | {"metric": None, "headline": True, "before": None, "after": None, "change": None}]
    names.sort(key=lambda name: name != headline)
    return [
        base
        | {
            "metric": name,
            "headline": name == headline,
            "before": _metric(before, name),
            "after": _metric(after, name),
            "change": _change(before, after, name),
        }
        for name in names
    ]


def _notes(before: Result | None, after: Result | None) -> list[str]:
    notes = []
    for moment, result in (("before", before), ("after", after)):
        if result is None:
            continue
        if result["not_run"]:
            notes.append(f"{moment}: not run: {result['not_run']}")
        if result["suspect"]:
            notes.append(f"{moment}: suspect: {result['suspect']}")
        if result.get("cut_prompts"):
            notes.append(f"{moment}: {result['cut_prompts']} prompts did not fit the model and lost their beginning")
        if result.get("cut_answers"):
            notes.append(f"{moment}: {result['cut_answers']} answers reached the token limit instead of ending")
    parts = (after or before or {}).get("parts_not_run", {})
    notes += [f"{part}: not run: {reason}" for part, reason in parts.items()]
    if before and after and before["protocol"] != after["protocol"]:
        notes.append(f"before was measured under another protocol: {before['protocol']}")
    return notes


def _metric(result: Result | None, name: str) -> dict[str, Any] | None:
    return result["metrics"].get(name) if result is not None else None


def _change(before: Result | None, after: Result | None, name: str) -> dict[str, float | None] | None:
    """After minus before, with its standard error: of the items' differences where both judged the same items."""
    old, new = _metric(before, name), _metric(after, name)
    if old is None or new is None:
        return None
    assert before is not None
    assert after is not None
    differences = _differences(_verdicts(before, name), _verdicts(after, name))
    if len(differences) > 1 and math.isclose(statistics.fmean(differences), new["value"] - old["value"], abs_tol=1e-9):
        stderr: float | None = statistics.stdev(differences) / math.sqrt(len(differences))
    elif old["stderr"] is None or new["stderr"] is None:
        stderr = None
    else:
        stderr = math.hypot(old["stderr"], new["stderr"])
    return {"value": new["value"] - old["value"], "stderr": stderr}


def _verdicts(result: Result, name: str) -> dict[str, float]:
    found = {item["id"]: item["verdict"].get(name) for item in result["items"]}
    return {identifier: float(score) for identifier, score in found.items() if isinstance(score, int | float)}


def _differences(old: dict[str, float], new: dict[str, float]) -> list[float]:
    """New minus old, item by item; empty unless both judged the same items."""
    return [new[identifier] - old[identifier] for identifier in old] if old.keys() == new.keys() else []
