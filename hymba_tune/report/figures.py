"""Figures as people read them, the same in Markdown, on a page and in the terminal."""

from collections.abc import Mapping
from typing import Any

NOTHING = "–"


def percent(metric: Mapping[str, Any] | None) -> str:
    """`42.3 ± 2.8`, in percent."""
    if metric is None:
        return NOTHING
    error = "" if metric["stderr"] is None else f" ± {100 * metric['stderr']:.1f}"
    return f"{100 * metric['value']:.1f}{error}"


def points(change: Mapping[str, Any] | None) -> str:
    """`+12.0 ± 3.1` percentage points."""
    if change is None:
        return NOTHING
    error = "" if change["stderr"] is None else f" ± {100 * change['stderr']:.1f}"
    return f"{100 * change['value']:+.1f}{error}"


def count(value: float | None) -> str:
    """`12 345`."""
    return NOTHING if value is None else f"{round(value):,}".replace(",", " ")


def number(value: float | None) -> str:
    """Four digits."""
    return NOTHING if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """`3 h 05 min`, `3 min 05 s` or `5 s`."""
    if seconds is None:
        return NOTHING
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
