"""The folder of a pipeline -> one results dictionary over its stages, finished, cut off or still going.

pipeline   name of the folder
planned    stages in order, those not begun too
environment of the last start
headline   scores of the base and after each stage, as headline.py has them
stages     results of each stage that has begun (collect.py)
"""

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError
from hymba_tune.report.collect import SCHEMA, collect, parent_name, read_recipe
from hymba_tune.report.headline import headline
from hymba_tune.report.scores import Result, task_results
from hymba_tune.run_dir import RunDir

BASE = "base"
"""The column of the weights that the first stage starts from."""


def is_pipeline(path: str | Path) -> bool:
    """Whether a folder holds runs, or says that it will."""
    run = RunDir(path)
    return not run.recipe.exists() and (run.pipeline.exists() or bool(_begun(run.path)))


def collect_pipeline(path: str | Path) -> dict[str, Any]:
    """The results of the stages in `path`. Raises UserError for a file that was broken from outside."""
    folder = RunDir(path)
    runs = {run.path.name: run for run in _begun(folder.path)}
    recipes = {name: read_recipe(run) for name, run in runs.items()}
    record = folder.read_json(folder.pipeline) or {"stages": _in_order(recipes)}
    planned = record["stages"]
    if not isinstance(planned, list):
        raise UserError(f"{folder.pipeline}: `stages` is no list; run the pipeline again to have it made")
    begun = [name for name in planned if name in runs]
    return {
        "schema": SCHEMA,
        "pipeline": folder.path.absolute().name,
        "planned": planned,
        "environment": folder.read_json(folder.environment),
        "headline": headline(_columns([runs[name] for name in begun], [parent_name(recipes[name]) for name in begun])),
        "stages": [collect(runs[name].path) for name in begun],
    }


def _begun(folder: Path) -> list[RunDir]:
    return [RunDir(recipe.parent) for recipe in sorted(folder.glob("*/recipe.yaml"))]


def _in_order(recipes: dict[str, dict[str, Any]]) -> list[str]:
    """Parents before children, as far as the recipes say."""
    graph = {
        name: {parent} & recipes.keys() if (parent := parent_name(recipe)) else set()
        for name, recipe in recipes.items()
    }
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError:
        return list(recipes)


def _columns(runs: Sequence[RunDir], parents: Sequence[str | None]) -> dict[str, dict[str, Result]]:
    """The scores of the base and after each stage; what a stage measured before it is a score of the one before."""
    columns: dict[str, dict[str, Result]] = {BASE: {}}
    for run, parent in zip(runs, parents, strict=True):
        start = columns[parent if parent in columns else BASE]
        for task, result in task_results(run, "before").items():
            start.setdefault(task, result)
        columns[run.path.name] = task_results(run, "after")
    return columns
