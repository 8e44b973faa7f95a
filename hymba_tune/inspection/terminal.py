"""Previews and statistics of a mix in the terminal. Text of the data is shown, never obeyed: no markup, no controls."""

import plotext
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from hymba_tune.inspection.preview import Kind, Part, Piece, Preview
from hymba_tune.inspection.stats import MixStats, SourceStats
from hymba_tune.report.figures import count, number
from hymba_tune.report.text import shortened, visible

CHARACTERS = 4000
"""Longest piece of text shown."""

STYLES: dict[Kind, str] = {
    "marker": "bold cyan",
    "context": "",
    "learned": "black on green",
    "rejected": "black on red",
}
SPECIAL = "bold underline"
MARKS: dict[Kind, tuple[str, str]] = {"learned": ("«", "»"), "rejected": ("‹", "›")}
"""What stands around a piece where there are no colours."""


def show_preview(preview: Preview, console: Console | None = None) -> None:
    """Print a preview."""
    console = console or Console()
    plain = console.color_system is None
    console.print(_legend(plain))
    for row in preview.rows:
        console.print(Rule(Text(row.title, "bold")))
        for part in row.parts:
            console.print(Text(f"{part.title}: {part.tokens} tokens, {part.learned} with loss", "dim italic"))
            console.print(marked(part, plain), soft_wrap=True)


def marked(part: Part, plain: bool) -> Text:
    """A part's text, styled; with `plain` marked with characters too."""
    text = Text()
    for piece in part.pieces:
        before, after = MARKS.get(piece.kind, ("", "")) if plain else ("", "")
        style = f"{STYLES[piece.kind]} {SPECIAL if piece.special else ''}"
        text.append(before + visible(shortened(piece.text, CHARACTERS)) + after, style)
    return text


def _legend(plain: bool) -> Text:
    pieces = [Piece("turn", "marker"), Piece("no loss", "context"), Piece("loss", "learned")]
    pieces += [Piece("rejected reply", "rejected"), Piece("special token", "context", special=True)]
    text = Text()
    for piece in pieces:
        text.append_text(marked(Part("", 0, 0, [piece]), plain)).append("  ")
    return text


def show_stats(stats: MixStats, console: Console | None = None) -> None:
    """Print statistics: a table of the sources, and a histogram of lengths."""
    console = console or Console()
    table = Table("", box=None, pad_edge=False)
    for source in stats.sources:
        table.add_column(Text(visible(source.source)))
    columns = [_column(source) for source in stats.sources]
    for name in columns[0]:
        table.add_row(name, *(Text(column[name]) for column in columns))
    part = "" if stats.complete else ", a random part of the mix"
    console.print(f"{count(stats.looked_at)} {stats.kind}{part}, tokenizer {visible(stats.tokenizer)}\n", markup=False)
    console.print(table, "", _histogram(stats, console.width), sep="\n")


def _column(source: SourceStats) -> dict[str, str]:
    languages = ", ".join(f"{visible(language)} {number}" for language, number in source.languages.items())
    return {
        "rows": count(len(source.lengths)),
        "tokens": count(source.tokens),
        "with loss": f"{source.learned_share:.1%}",
        "median length": count(source.length_at(0.5)),
        "95 % below": count(source.length_at(0.95)),
        "longest": count(max(source.lengths)),
        "mean turns": number(source.mean_turns),
        "with system text": count(source.with_system),
        "with tools": count(source.with_tools),
        "repeated": count(source.repeated),
        "code fences": shortened(languages, 200) or "none",
    }


def _histogram(stats: MixStats, width: int) -> Text:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(min(width, 100), 14)
    plotext.title(f"tokens a {'pair' if stats.kind == 'preferences' else 'conversation'}")
    plotext.hist([length for source in stats.sources for length in source.lengths], bins=40)
    return Text.from_ansi(plotext.build().rstrip())
