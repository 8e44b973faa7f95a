"""Charts as SVG for a page: drawn by matplotlib, coloured by the page, readable without eyes.

matplotlib draws with stand-in colours, which become the page's CSS variables: a chart is dark on light paper and light
in dark mode. Text stays text. The same data gives the same bytes. Every chart says in words what it shows.
"""

import io
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hymba_tune.report.text import shortened, visible

SERIES = 6
"""Colours that the page has for lines and bars: --series-0 to --series-5."""
LABEL_CHARACTERS = 20

_INK, _GRID = "#0000f0", "#0000f1"
_STAND_INS = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    **{f"#0000e{number}": f"var(--series-{number})" for number in range(SERIES)},
}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

Number = float | int | None


def curve(title: str, steps: Sequence[int], values: Sequence[Number]) -> Markup:
    """One value over the steps. Empty if there is no finite one; gaps where a value is not finite."""
    heights = [math.nan if value is None or math.isinf(value) else float(value) for value in values]
    points = [(step, value) for step, value in zip(steps, heights, strict=True) if not math.isnan(value)]
    if not points:
        return Markup("")
    lowest, highest = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    first, last = points[0], points[-1]
    words = (
        f"{title} over {len(points)} logged steps: {_short(first[1])} at step {first[0]}, {_short(last[1])} at step "
        f"{last[0]}; lowest {_short(lowest[1])}, highest {_short(highest[1])}."
    )
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(4.4, 2.5)
        axes.plot(
            steps,
            heights,
            color=_colour(0),
            linewidth=1.4,
            marker="o" if len(points) == 1 else None,
        )
        axes.set_xlabel("step")
        return _svg(figure, words)


def bars(title: str, names: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str) -> Markup:
    """Horizontal bars, one a name, of parts laid end to end. Empty without names."""
    if not names:
        return Markup("")
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    said = ", ".join(f"{visible(name)} {_short(total)}" for name, total in zip(names, totals, strict=True))
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(4.8, 0.9 + 0.32 * len(names))
        left = [0.0] * len(names)
        for number, (label, values) in enumerate(parts.items()):
            axes.barh(range(len(names)), values, left=left, color=_colour(number), label=label, height=0.62)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter(lambda value, position: _short(value))
        if len(parts) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(parts), columnspacing=1)
        return _svg(figure, f"{title}, in {unit}: {shortened(said, 600)}.")


def scores(title: str, columns: Sequence[str], lines: Mapping[str, Sequence[tuple[float, float] | None]]) -> Markup:
    """Scores in percent with standard errors, a line a task over the columns."""
    if not lines or len(columns) < 2:
        return Markup("")
    said = []
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(4.8, 3.0)
        for number, (name, values) in enumerate(lines.items()):
            known = [(i, value[0], value[1]) for i, value in enumerate(values) if value is not None]
            if not known:
                continue
            at, middle, error = zip(*known, strict=True)
            axes.errorbar(
                at,
                middle,
                yerr=error,
                color=_colour(number),
                marker=_MARKERS[number % SERIES],
                linestyle=("-", "--")[number // SERIES % 2],
                capsize=3,
                label=_label(name),
            )
            said.append(f"{visible(name)} {' to '.join(f'{value:.1f}' for value in middle)}")
        axes.set_xticks(range(len(columns)), [_label(name) for name in columns])
        axes.set_xlim(-0.25, len(columns) - 0.75)
        axes.set_ylabel("percent")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return _svg(figure, f"{title}, in percent, over {', '.join(map(visible, columns))}: {'; '.join(said)}.")


def histogram(title: str, groups: Mapping[str, Sequence[float]], unit: str) -> Markup:
    """How often each value occurs, the groups stacked."""
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups:
        return Markup("")
    everything = [value for values in groups.values() for value in values]
    words = f"{title}: {len(everything)} values from {_short(min(everything))} to {_short(max(everything))} {unit}."
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(4.8, 2.6)
        axes.hist(
            list(groups.values()),
            bins=40,
            stacked=True,
            color=[_colour(number) for number in range(len(groups))],
            label=[_label(name) for name in groups],
        )
        axes.set_xlabel(unit)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return _svg(figure, words)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


def _colour(number: int) -> str:
    return f"#0000e{number % SERIES}"


def _label(name: str) -> str:
    return _cut(visible(name).replace("\n", " "))


def _cut(name: str) -> str:
    """A name cut to what stands beside an axis. A leading underscore would hide it from a legend."""
    name = name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"
    return f"\u2009{name}" if name.startswith("_") else name


def _short(value: float) -> str:
    """12.3k, 4.5M; small numbers with four digits."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}"


def _svg(figure: Figure, words: str) -> Markup:
    """The figure as an element of a page, which says `words` to who can't see it."""
    key = f"c{zlib.crc32(words.encode()):08x}"
    file = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that matplotlib's font does not have
        figure.savefig(file, format="svg", metadata=metadata)
    root = ElementTree.fromstring(file.getvalue())
    _clean(root, key)
    root.attrib |= {"role": "img", "aria-label": words}
    for size in ("width", "height"):
        root.attrib.pop(size)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(root: ElementTree.Element, key: str) -> None:
    """Ids that nothing refers to go, the others become the chart's own; colours and fonts become the page's."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        identifier = element.attrib.pop("id", None)
        if identifier in used:
            element.set("id", f"{key}-{identifier}")
        for name, value in element.attrib.items():
            element.set(name, _page_value(name, value, key))


def _page_value(name: str, value: str, key: str) -> str:
    if name.endswith("href") or "url(#" in value:
        return re.sub(r"^#|(?<=url\()#", f"#{key}-", value)
    if name in ("style", "fill", "stroke"):
        value = re.sub(r"#0000[ef]\d", lambda found: _STAND_INS[found[0]], value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
    return value
