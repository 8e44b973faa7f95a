"""results -> one HTML file that needs nothing else: no network, no script, light and dark, for screen, phone and paper.

Everything a template prints is escaped by Jinja, and characters without a glyph are written out first: an answer can
neither become markup nor turn the page's direction. A content security policy forbids scripts and loading as a second
wall.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from hymba_tune.report import charts
from hymba_tune.report.collect import STEPS, thinned
from hymba_tune.report.figures import NOTHING, count, duration, number, percent, points
from hymba_tune.report.glance import glance
from hymba_tune.report.text import shortened, visible

ANSWER_CHARACTERS = 1200
BRIEF_CHARACTERS = 160
PIECE_CHARACTERS = 4000
"""Longest piece of training text shown."""
CURVE_ROWS = 10
CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
MOST_LINES = 12
"""Lines of a chart of scores: more can't be told apart."""


def render_page(template: str, **values: Any) -> str:
    """A template of templates/ with its values."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hymba_tune.report", "templates"),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "count": count,
        "number": number,
        "duration": duration,
        "answer": lambda value: _cut(_as_text(value), ANSWER_CHARACTERS),
        "piece": lambda value: _cut(value, PIECE_CHARACTERS),
        "brief": lambda value: _cut(value if isinstance(value, str) else _json(value), BRIEF_CHARACTERS),
        "yaml": _yaml,
        "columns": _columns,
        "words": lambda name: str(name).replace("_", " "),
        "slug": lambda name: re.sub(r"[^A-Za-z0-9]+", "-", str(name)),
        "thinned": lambda lines: thinned(lines, CURVE_ROWS),
    }
    environment.globals |= {
        "glance": glance,
        "steps": STEPS,
        "curves": CURVES,
        "curve_chart": _curve_chart,
        "data_chart": _data_chart,
        "score_chart": _score_chart,
    }
    text = environment.get_template(template).render(**values)
    return text.encode("utf-8", "replace").decode()


def _shown(value: Any) -> Any:
    """What a template prints, before it is escaped."""
    if isinstance(value, Markup):
        return value
    return NOTHING if value is None else visible(str(value))


def _cut(text: str, characters: int) -> str:
    """Short enough before and after its invisible characters are written out."""
    return shortened(visible(shortened(text, characters)), characters)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else _yaml(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold something in some row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) for row in rows)]


def _curve_chart(training: dict[str, Any], field: str) -> Markup:
    points = training["curve"]
    return charts.curve(CURVES[field], [point["step"] for point in points], [point[field] for point in points])


def _data_chart(sources: Sequence[dict[str, Any]]) -> Markup:
    """Tokens of each source: with and without loss, or of the prompts and each side of pairs."""
    counted = [source for source in sources if source.get("tokens")]
    names = [str(source["source"]) for source in counted]
    learned = {"with loss": "supervised_tokens", "chosen": "chosen_tokens", "rejected": "rejected_tokens"}
    parts = {
        label: [source[key] for source in counted]
        for label, key in learned.items()
        if counted and all(key in source for source in counted)
    }
    rest = [source["tokens"] - sum(values[i] for values in parts.values()) for i, source in enumerate(counted)]
    return charts.bars("Tokens of each source", names, {**parts, "without loss": rest}, "tokens")


def _score_chart(headline: dict[str, Any]) -> Markup:
    names = headline["table"]["columns"]
    lines = {
        row["task"]: [_point(cell) for cell in row["cells"]] for row in headline["table"]["rows"] if row["headline"]
    }
    return charts.scores("Scores", names, dict(list(lines.items())[:MOST_LINES]))


def _point(cell: dict[str, Any] | None) -> tuple[float, float] | None:
    if cell is None:
        return None
    return 100 * cell["metric"]["value"], 100 * (cell["metric"]["stderr"] or 0.0)
