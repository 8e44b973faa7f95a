"""Pages in headless Chromium: those of a real tiny pipeline, of one with hostile answers, and of a mix.

No complaints in the console, no sideways scrolling, tables and curves there, light and dark, axe-core content.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.inspection.page import write_preview, write_stats
from hymba_tune.inspection.preview import preview_mix
from hymba_tune.inspection.stats import mix_stats
from hymba_tune.pipeline import load_pipeline, run_pipeline
from hymba_tune.report.compare import write_comparison
from hymba_tune.report.render import write_report
from tests.report.browser import SIZES, chromium, open_page, violations
from tests.report.conftest import HOSTILE
from tests.test_pipeline import ADAPTER, after, write
from tests.test_stage import recipe_file  # noqa: F401  (a fixture)

pytestmark = pytest.mark.full

PAPER = {False: "rgb(255, 255, 255)", True: "rgb(16, 21, 27)"}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    with chromium(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def real(recipe_file: Path) -> list[Path]:  # noqa: F811
    """Pages of a pipeline that ran, of its stages, of their comparison, and of its mix."""
    folder = recipe_file.parent
    scored = {"suites": ["tiny_math", "tiny_calls"], "limit": 4, "max_new_tokens": 8}
    write(folder, "first", eval=scored)
    write(folder, "second", model=after("first"), adapter=ADAPTER, eval=scored)
    file = folder / "pipeline.yaml"
    file.write_text(f"stages: [first.yaml, second.yaml]\noutput: {{dir: {folder / 'runs'}}}\n")
    runs = [run.path for run in run_pipeline(load_pipeline(file))]
    mix = str(folder / "mix.yaml")
    return [
        folder / "runs" / "report.html",
        *(run / "report.html" for run in runs),
        write_comparison(runs, folder / "comparison.html"),
        write_preview(preview_mix(mix), folder / "preview.html"),
        write_stats(mix_stats(mix), folder / "stats.html"),
    ]


@pytest.fixture
def hostile(pipeline: Path) -> list[Path]:
    """Pages with an answer that tries to be markup, control codes and a turn of direction."""
    assert "<script>" in HOSTILE
    write_report(pipeline / "sft1")
    write_report(pipeline)
    return [pipeline / "report.html", pipeline / "sft1" / "report.html"]


@pytest.mark.parametrize("pages", ["real", "hostile"])
def test_pages_open_at_every_size_without_complaint(browser: Any, pages: str, request: pytest.FixtureRequest) -> None:
    for page in request.getfixturevalue(pages):
        for size in SIZES:
            for dark in (False, True):
                facts = open_page(browser, page, size, dark)
                assert facts["console"] == []
                assert facts["overflow"] <= 0, f"{page.name}, {size}: {facts['overflow']} pixels too wide"
                assert facts["scripts"] == 0
                assert facts["paper"] == PAPER[dark]
                if page.name == "report.html":
                    assert facts["tables"] >= 4
                    assert facts["charts"] > 40


@pytest.mark.parametrize("pages", ["real", "hostile"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_pass_the_accessibility_checks(
    browser: Any, pages: str, dark: bool, request: pytest.FixtureRequest
) -> None:
    for page in request.getfixturevalue(pages):
        open_page(browser, page, "desktop", dark)
        assert violations(browser) == [], page.name
        open_page(browser, page, "phone", dark)
        assert violations(browser) == [], page.name
