"""A run in the terminal, while it goes on or after it: curves, rate, time left, last answers.

Figures come from metrics.jsonl alone, so a copy of that file is enough; answers from the answers.jsonl that scoring
writes. Nothing is locked or written.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotext
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hymba_tune.errors import UserError
from hymba_tune.report.collect import metric_lines
from hymba_tune.report.figures import count, duration, number
from hymba_tune.report.text import shortened, visible
from hymba_tune.run_dir import RunDir

CURVES = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}
RECENT = 20
"""Logged lines that the rate and the time left are taken from."""
ANSWERS = 2
ANSWER_CHARACTERS = 400
HEIGHT = 9
NARROWEST = 30


def watch(path: Path, *, once: bool = False, seconds: float = 2.0, console: Console | None = None) -> None:
    """Show a run directory (or a metrics.jsonl), again every `seconds` until its last step or Ctrl-C; `once`: one look.

    Raises UserError if there is nothing to watch.
    """
    metrics = path if path.is_file() else RunDir(path).metrics
    if not metrics.exists() and not RunDir(path).recipe.exists():
        raise UserError(f"{path}: holds no run (no metrics.jsonl); give a run directory, as in runs/sft1")
    console = console or Console()
    if once:
        console.print(view(metrics, console.width))
        return
    _follow(lambda: metric_lines(metrics), lambda: view(metrics, console.width), seconds, console)


def view(metrics: Path, width: int) -> Group:
    """What is shown, `width` characters wide."""
    lines = metric_lines(metrics)
    parts = [Text(summary(lines), "bold")]
    columns = 2 if width >= 2 * NARROWEST + 20 else 1
    charts = [_chart(title, lines, key, max(width // columns - 2, NARROWEST)) for key, title in CURVES.items()]
    shown = [chart for chart in charts if chart is not None]
    for start in range(0, len(shown), columns):
        parts += _beside(shown[start : start + columns])
    for answer in last_answers(metrics.parent):
        parts += [Text("answer:", "dim"), Text(answer, overflow="fold")]
    return Group(*parts)


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """`step 40 of 120, loss 1.2, 3 000 tokens/s, 2 min 05 s left`."""
    if not lines:
        return "no step has been logged yet"
    last, recent = lines[-1], lines[-RECENT:]
    total = last.get("max_steps")
    parts = [f"step {last['step']}" + (f" of {total}" if total else ""), f"loss {number(last['loss'])}"]
    steps = recent[-1]["step"] - recent[0]["step"]
    spent = (recent[-1].get("seconds") or 0) - (recent[0].get("seconds") or 0)
    tokens = (recent[-1].get("tokens") or 0) - (recent[0].get("tokens") or 0)
    if steps > 0 and spent > 0:
        parts.append(f"{count(tokens / spent)} tokens/s")
        if total and last["step"] < total:
            parts.append(f"{duration((total - last['step']) * spent / steps)} left")
    if total and last["step"] >= total:
        parts.append(f"done in {duration(last.get('seconds'))}")
    return ", ".join(parts)


def last_answers(run: Path) -> list[str]:
    """The last answers that scoring got in a run, harmless and short."""
    files = sorted(run.glob("eval/*/answers.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        return []
    with files[-1].open(encoding="utf-8", errors="replace") as file:
        lines = deque(file, maxlen=ANSWERS)
    texts = [text for line in lines if (text := _answer(line)) is not None]
    return [visible(shortened(text, ANSWER_CHARACTERS)) for text in texts]


def _answer(line: str) -> str | None:
    """The text of a whole line; None for half a line and for answers without text."""
    try:
        answer = json.loads(line)["answer"]
    except (ValueError, KeyError, TypeError):
        return None
    text = answer.get("text") if isinstance(answer, dict) else None
    return text if isinstance(text, str) else None


def _follow(
    lines: Callable[[], Sequence[Mapping[str, Any]]], shown: Callable[[], Group], seconds: float, console: Console
) -> None:
    with Live(shown(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while not _done(lines()):
                time.sleep(seconds)
                live.update(shown(), refresh=True)
        except KeyboardInterrupt:
            return
        live.update(shown(), refresh=True)


def _done(lines: Sequence[Mapping[str, Any]]) -> bool:
    return bool(lines) and bool(lines[-1].get("max_steps")) and lines[-1]["step"] >= lines[-1]["max_steps"]


def _chart(title: str, lines: Sequence[Mapping[str, Any]], key: str, width: int) -> Text | None:
    """A curve by plotext; None without a finite value."""
    points = [(line["step"], line[key]) for line in lines if _finite(line.get(key))]
    if not points:
        return None
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, HEIGHT)
    plotext.title(title)
    plotext.plot(*zip(*points, strict=True), marker="braille")
    return Text.from_ansi(plotext.build().rstrip())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _beside(charts: Sequence[Text]) -> list[Text]:
    """Charts of the same height, line by line next to each other."""
    rows = zip(*(chart.split("\n") for chart in charts), strict=False)
    return [Text("  ").join(row) for row in rows]
