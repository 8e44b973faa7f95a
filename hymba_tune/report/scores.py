"""Scores side by side: what a task's result files say, before and after a stage, or in any number of columns.

A change carries a standard error: that of the items' differences where both sides judged the same items.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hymba_tune.run_dir import Moment, RunDir

CLEAR = 2
"""A change of more than so many standard errors is called better or worse."""

Result = dict[str, Any]


def task_results(run: RunDir, moment: Moment) -> dict[str, Result]:
    """The result files of one moment, by task."""
    folder = run.evaluation(moment)
    found = {path.stem: run.read_json(path) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if isinstance(result, dict) and "metrics" in result}


def ran(result: Result | None) -> Result | None:
    """The result if its task ran, else None."""
    return result if result is not None and result["not_run"] is None else None


def score_rows(task: str, before: Result | None, after: Result | None) -> list[dict[str, Any]]:
    """A row a metric, the headline first; one row with notes only for a task without scores."""
    latest = after or before
    known = [result for result in (ran(before), ran(after)) if result is not None]
    names = list(dict.fromkeys(name for result in known for name in result["metrics"]))
    headline = known[-1]["headline"] if known else None
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
            "change": change(before, after, name),
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


def side_by_side(columns: Mapping[str, Mapping[str, Result]], against: str = "previous") -> dict[str, Any]:
    """A table of the headline metrics and of all others: a row a metric, a cell a column.

    columns: {name: {task: result}}. A cell is None, or {metric, change, verdict, against}: the change is from the last
    column before it (`previous`) or from the first (`first`) that has the metric under the same protocol; verdict is
    better, worse, or None for less than CLEAR standard errors.
    """
    found = {
        name: {task: result for task, result in results.items() if ran(result)} for name, results in columns.items()
    }
    tasks = dict.fromkeys(task for results in found.values() for task in results)
    rows = []
    for task in tasks:
        results = [results.get(task) for results in found.values()]
        latest = [result for result in results if result is not None][-1]
        names = sorted(latest["metrics"], key=lambda name: name != latest["headline"])
        rows += [
            {
                "task": task,
                "metric": name,
                "headline": name == latest["headline"],
                "protocol": latest["protocol"],
                "cells": [_cell(list(found), results, i, name, against) for i in range(len(results))],
            }
            for name in names
        ]
    return {"columns": list(found), "rows": rows}


def _cell(
    names: Sequence[str], results: Sequence[Result | None], index: int, metric: str, against: str
) -> dict[str, Any] | None:
    result = results[index]
    if result is None or metric not in result["metrics"]:
        return None
    earlier = [
        i
        for i in range(index)
        if (old := results[i]) is not None and metric in old["metrics"] and old["protocol"] == result["protocol"]
    ]
    if not earlier:
        return {"metric": result["metrics"][metric], "change": None, "verdict": None, "against": None}
    reference = earlier[0 if against == "first" else -1]
    difference = change(results[reference], result, metric)
    return {
        "metric": result["metrics"][metric],
        "change": difference,
        "verdict": verdict(difference),
        "against": names[reference],
    }


def verdict(difference: Mapping[str, float | None] | None) -> str | None:
    """better or worse, None for a change that chance can make."""
    if difference is None or difference["value"] is None or difference["stderr"] is None:
        return None
    if abs(difference["value"]) <= CLEAR * difference["stderr"]:
        return None
    return "better" if difference["value"] > 0 else "worse"


def change(before: Result | None, after: Result | None, name: str) -> dict[str, float | None] | None:
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
