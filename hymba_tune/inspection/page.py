"""Previews and statistics of a mix as pages: one file each, no network, no script."""

from pathlib import Path

from hymba_tune.inspection.preview import Preview
from hymba_tune.inspection.stats import MixStats
from hymba_tune.report import charts
from hymba_tune.report.page import render_page
from hymba_tune.run_dir import RunDir


def write_preview(preview: Preview, file: Path) -> Path:
    """Write a preview as a page."""
    return _write(file, render_page("preview.html.jinja", preview=preview))


def write_stats(stats: MixStats, file: Path) -> Path:
    """Write statistics as a page, with a histogram of lengths and the tokens of each source."""
    lengths = {source.source: source.lengths for source in stats.sources}
    learned = [float(source.learned) for source in stats.sources]
    rest = [float(source.tokens - source.learned) for source in stats.sources]
    names = [source.source for source in stats.sources]
    page = render_page(
        "stats.html.jinja",
        stats=stats,
        lengths=charts.histogram(f"Lengths of {stats.kind}", lengths, "tokens"),
        tokens=charts.bars("Tokens of each source", names, {"with loss": learned, "without loss": rest}, "tokens"),
    )
    return _write(file, page)


def _write(file: Path, page: str) -> Path:
    return RunDir(file.parent).write_text(file.name, page)
