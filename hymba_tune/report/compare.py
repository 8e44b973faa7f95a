"""Several runs side by side: their scores, each against the first, their training, and the settings that differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hymba_tune.report.collect import collect, read_recipe
from hymba_tune.report.figures import count, duration, number, percent, points
from hymba_tune.report.headline import headline
from hymba_tune.report.page import render_page
from hymba_tune.report.pipeline import collect_pipeline, is_pipeline
from hymba_tune.report.scores import task_results
from hymba_tune.report.settings import changed_settings
from hymba_tune.report.text import visible
from hymba_tune.run_dir import RunDir

STYLES = {"better": "green", "worse": "red"}


def collect_comparison(paths: Sequence[Path]) -> dict[str, Any]:
    """headline (scores after each run, against the first), runs (each one's training) and changes (of settings).

    The runs of a pipeline stand one by one. A run is named by its folder, by its path where two have the same name.
    """
    runs = _named([run for path in paths for run in _runs(path)])
    first, *others = runs
    recipes = {name: read_recipe(run) for name, run in runs.items()}
    return {
        "headline": headline({name: task_results(run, "after") for name, run in runs.items()}, against="first"),
        "runs": [{"name": name, "training": collect(run.path)["training"] or {}} for name, run in runs.items()],
        "first": first,
        "changes": {name: changed_settings(recipes[first], recipes[name]) for name in others},
    }


def compare(paths: Sequence[Path], console: Console | None = None) -> None:
    """Print a comparison."""
    console = console or Console()
    results = collect_comparison(paths)
    console.print(_scores(results["headline"]), _trainings(results["runs"]), sep="\n\n")
    for name, changes in results["changes"].items():
        console.print(
            f"\nsettings of {visible(name)}, where they differ from {visible(results['first'])}", markup=False
        )
        for row in changes:
            console.print(f"  {row['key']}: {visible(str(row['old']))} -> {visible(str(row['new']))}", markup=False)


def write_comparison(paths: Sequence[Path], file: Path) -> Path:
    """Write a comparison as a page."""
    page = render_page("comparison.html.jinja", results=collect_comparison(paths))
    return RunDir(file.parent).write_text(file.name, page)


def _runs(path: Path) -> list[RunDir]:
    if not is_pipeline(path):
        return [RunDir(path)]
    return [RunDir(path / stage["stage"]) for stage in collect_pipeline(path)["stages"]]


def _named(runs: Sequence[RunDir]) -> dict[str, RunDir]:
    names = [run.path.absolute().name for run in runs]
    unique = len(set(names)) == len(names)
    return {name if unique else str(run.path): run for name, run in zip(names, runs, strict=True)}


def _scores(scores: Mapping[str, Any]) -> Table | str:
    if not scores["columns"]:
        return "No task has been scored."
    table = Table("after", box=None, pad_edge=False)
    for column in scores["columns"]:
        table.add_column(Text(visible(f"{column['task']}\n{column['metric']}")))
    for row in scores["rows"]:
        table.add_row(Text(visible(row["name"])), *map(_cell, row["cells"]))
    for row in scores["published"]:
        values = ["" if value is None else f"{value:.1f}" for value in row["values"]]
        table.add_row(Text(visible(f"{row['model']} (published)")), *values, style="dim")
    return table


def _cell(cell: Mapping[str, Any] | None) -> Text:
    if cell is None:
        return Text("")
    text = Text(percent(cell["metric"]))
    if cell["change"]:
        mark = f" {cell['verdict']}" if cell["verdict"] else ""
        text.append(f"\n{points(cell['change'])}{mark}", STYLES.get(cell["verdict"] or "", "dim"))
    return text


def _trainings(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("run", "steps", "tokens", "time", "tokens/s", "first loss", "last loss", box=None, pad_edge=False)
    for run in runs:
        part = run["training"]
        table.add_row(
            Text(visible(run["name"])),
            count(part.get("steps")),
            count(part.get("tokens")),
            duration(part.get("seconds")),
            count(part.get("tokens_per_second")),
            number(part.get("first_loss")),
            number(part.get("last_loss")),
        )
    return table
