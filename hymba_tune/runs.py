"""The runs under a folder: what each is, how far it came, its scores. Reads files; loads and locks nothing."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hymba_tune.errors import UserError
from hymba_tune.report.collect import STEPS, collect
from hymba_tune.report.text import visible
from hymba_tune.run_dir import RunDir


def find_runs(folder: Path) -> Iterator[Path]:
    """Every run directory in `folder`, itself included, by name; what lies in a run is not searched.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds runs, as in runs/")
    for here, below, files in os.walk(folder):
        below.sort()
        if "recipe.yaml" in files and ("state.json" in files or "lock" in files):
            below.clear()
            yield Path(here)


def state_of(run: RunDir, results: dict[str, Any]) -> str:
    """`finished`, `running: STEP` or `stopped: STEP`; the step is the first that is not finished."""
    left = [step for step in STEPS if step not in results["finished"]]
    if not left:
        return "finished"
    training = results["training"]
    where = f" step {training['steps']}" if training and left[0] == "training" else ""
    return f"{'running' if run.is_held() else 'stopped'}: {left[0]}{where}"


def runs_table(folder: Path) -> Table:
    """A row a run: folder, stage, method, state, headline scores before and after, date of the last start."""
    table = Table("run", "stage", "method", "state", "scores", "started", box=None, pad_edge=False)
    for path in find_runs(folder):
        results = collect(path)
        began = (results["environment"] or {}).get("time")
        date = datetime.datetime.fromisoformat(began).astimezone().strftime("%Y-%m-%d %H:%M") if began else ""
        name = path.relative_to(folder) if path != folder else path
        cells = (name, results["stage"], results["method"], state_of(RunDir(path), results), _scores(results), date)
        table.add_row(*(escape(visible(str(cell))) for cell in cells))
    return table


def _scores(results: dict[str, Any]) -> str:
    """`gsm8k 12.0 -> 40.5` in percent, a line a task."""
    rows = [row for row in results["scores"] if row["headline"] and (row["before"] or row["after"])]
    return "\n".join(f"{row['task']} {_percent(row['before'])} -> {_percent(row['after'])}" for row in rows)


def _percent(metric: dict[str, Any] | None) -> str:
    return "?" if metric is None else f"{100 * metric['value']:.1f}"
