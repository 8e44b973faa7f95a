"""Previews and statistics of a mix in the terminal. Text of the data is shown, never obeyed: no markup, no controls."""

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from hymba_tune.inspection.preview import Kind, Part, Piece, Preview
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
