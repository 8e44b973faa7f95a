"""results.json -> report.md, through templates/report.md.jinja.

Everything a template prints is escaped for Markdown unless a filter here made it: a name with a pipe or an answer with
HTML comes out as text.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from hymba_tune.report.collect import STEPS, collect, thinned
from hymba_tune.report.text import fenced, inline, shortened
from hymba_tune.run_dir import RunDir

ANSWER_CHARACTERS = 1200
BRIEF_CHARACTERS = 160
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60
CURVE_ROWS = 10


class Markdown(str):
    """Text that is Markdown already."""


def write_report(path: str | Path) -> Path:
    """Writes results.json and report.md of the run in `path`, finished or not, and returns the report."""
    run = RunDir(path)
    results = collect(path)
    # A lone surrogate in an answer, which UTF-8 cannot hold, becomes a JSON escape.
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    run.write_text(run.results, text.decode() + "\n")
    return run.write_text(run.report, render_markdown(results))


def render_markdown(results: dict[str, Any]) -> str:
    """The report of `collect`'s results."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hymba_tune.report", "templates"),
        autoescape=False,  # Markdown has its own rules: see `_escaped`
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "count": _count,
        "number": _number,
        "duration": _duration,
        "sparkline": _sparkline,
        "answer": lambda value: Markdown(fenced(shortened(_as_text(value), ANSWER_CHARACTERS))),
        "yaml": lambda value: Markdown(
            fenced(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip(), "yaml")
        ),
        "code": lambda value: Markdown(f"`{inline(str(value)).replace('`', '')}`"),
        "brief": _brief,
        "columns": _columns,
        "thinned": lambda points: thinned(points, CURVE_ROWS),
    }
    return environment.get_template("report.md.jinja").render(results=results, steps=STEPS)


def _escaped(value: Any) -> str:
    if isinstance(value, Markdown):
        return value
    return "–" if value is None else inline(str(value))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()


def _percent(metric: dict[str, Any] | None) -> Markdown:
    """`42.3 ± 2.8`, in percent."""
    if metric is None:
        return Markdown("–")
    error = "" if metric["stderr"] is None else f" ± {100 * metric['stderr']:.1f}"
    return Markdown(f"{100 * metric['value']:.1f}{error}")


def _points(change: dict[str, Any] | None) -> Markdown:
    """`+12.0 ± 3.1` percentage points; a change beyond two standard errors is bold."""
    if change is None:
        return Markdown("–")
    error = change["stderr"]
    text = f"{100 * change['value']:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    clear = error is not None and abs(change["value"]) > 2 * error
    return Markdown(f"**{text}**" if clear else text)


def _count(value: Any) -> Markdown:
    return Markdown("–" if value is None else f"{round(value):,}".replace(",", " "))


def _number(value: float | None) -> Markdown:
    return Markdown("–" if value is None else f"{value:.4g}")


def _duration(seconds: float | None) -> Markdown:
    if seconds is None:
        return Markdown("–")
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return Markdown(
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
    )


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
