"""The files of a report: results.json, and from it report.md and report.html, through the templates in templates/.

Everything that a Markdown template prints is escaped for Markdown unless a filter here made it: a name with a pipe or
an answer with HTML comes out as text. Pages have their own rules (page.py).
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from hymba_tune.report.collect import STEPS, collect, thinned
from hymba_tune.report.figures import count, duration, number, percent, points
from hymba_tune.report.markdown import Markdown, render_template
from hymba_tune.report.page import render_page
from hymba_tune.report.pipeline import collect_pipeline, is_pipeline
from hymba_tune.report.scores import verdict
from hymba_tune.report.text import fenced, inline, shortened
from hymba_tune.run_dir import RunDir

ANSWER_CHARACTERS = 1200
BRIEF_CHARACTERS = 160
FIGURES: dict[str, Callable[[Any], str]] = {"percent": percent, "count": count, "number": number, "duration": duration}
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60
CURVE_ROWS = 10


def write_report(path: str | Path) -> Path:
    """Writes results.json, report.md and report.html of a run or a pipeline's folder, finished or not.

    Returns report.md. Raises UserError for a file that was broken from outside.
    """
    run = RunDir(path)
    kind: Literal["stage", "pipeline"] = "pipeline" if is_pipeline(path) else "stage"
    results = collect_pipeline(path) if kind == "pipeline" else collect(path)
    # A lone surrogate in an answer, which UTF-8 cannot hold, becomes a JSON escape.
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    run.write_text(run.results, text.decode() + "\n")
    run.write_text(run.page, render_page(f"{kind}.html.jinja", results=results))
    return run.write_text(run.report, render_markdown(results, kind))


def rebuild(path: str | Path) -> Path:
    """write_report, and before it that of each stage of a pipeline's folder."""
    if is_pipeline(path):
        for stage in collect_pipeline(path)["stages"]:
            write_report(Path(path) / stage["stage"])
    return write_report(path)


def render_markdown(results: dict[str, Any], kind: Literal["stage", "pipeline"] = "stage") -> str:
    """The report of `collect`'s results, or of `collect_pipeline`'s."""
    filters = {
        **{name: _markdown(figure) for name, figure in FIGURES.items()},
        "points": _points,
        "sparkline": _sparkline,
        "answer": lambda value: Markdown(fenced(shortened(_as_text(value), ANSWER_CHARACTERS))),
        "code": lambda value: Markdown(f"`{inline(str(value)).replace('`', '')}`"),
        "brief": _brief,
        "columns": _columns,
        "thinned": lambda points: thinned(points, CURVE_ROWS),
    }
    return render_template(f"{kind}.md.jinja", filters, results=results, steps=STEPS)


def _markdown(figure: Callable[[Any], str]) -> Callable[[Any], Markdown]:
    return lambda value: Markdown(figure(value))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()


def _points(change: dict[str, Any] | None) -> Markdown:
    """Percentage points; a change beyond two standard errors is bold."""
    return Markdown(f"**{points(change)}**" if verdict(change) else points(change))


def _sparkline(values: Sequence[float | None]) -> Markdown:
    """A row of bars from the lowest to the highest value; each stands for the mean of its part of the values."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return Markdown("")
    bins = [
        numbers[i * len(numbers) // SPARK_WIDTH : (i + 1) * len(numbers) // SPARK_WIDTH] for i in range(SPARK_WIDTH)
    ]
    means = [sum(part) / len(part) for part in bins if part]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0
    return Markdown("".join(SPARKS[round((mean - low) * scale)] for mean in means))


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that hold something in some row."""
    return [name for name in rows[0] if any(row.get(name) for row in rows)]


def _brief(value: Any) -> Markdown:
    """A value in a line of text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Markdown(inline(shortened(text, BRIEF_CHARACTERS)))
