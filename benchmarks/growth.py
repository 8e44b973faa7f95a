"""Draws docs/growth.png: CPU time a token of attention and scan over the length, as the other benchmarks recorded it.

    python -m benchmarks.growth

A flat line is a cost linear in the length. Attention with a window has to reach it first: beyond 1,024 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.record import RESULTS

DRAWING = Path(__file__).parent.parent / "docs" / "growth.png"


def recorded(name: str) -> Any:
    """{tokens or dtype: figures} of a benchmark's result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["figures"]["CPU microseconds a token"]


def main() -> None:
    lines = {"attention, window 1,024, forward and backward": recorded("windowed_attention")}
    for dtype, lengths in recorded("selective_scan").items():
        lines[f"scan, {dtype}, forward and backward"] = {n: measured["computing"] for n, measured in lengths.items()}
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot([int(tokens) for tokens in points], list(points.values()), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of one document")
    axes.set_ylabel("CPU microseconds a token")
    axes.legend()
    figure.savefig(DRAWING, dpi=110)
    print(DRAWING.name)


if __name__ == "__main__":
    main()
