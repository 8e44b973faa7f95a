"""A headless Chromium for the tests of pages, and what they measure in it. Tests skip where there is none.

python -m tests.report.browser runs/pipeline-tiny/report.html docs/report.png      the picture in the README
"""

import argparse
import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SIZES = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1440, 900)}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
AXE = "HYMBA_TUNE_AXE"
"""Names the file axe.min.js of the package axe-core; else node_modules is looked at."""

FACTS = """return {
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  tables: document.querySelectorAll('table').length, charts: document.querySelectorAll('svg[role=img] path').length,
  scripts: document.querySelectorAll('script').length, paper: getComputedStyle(document.body).backgroundColor,
  opened: performance.timing.loadEventEnd - performance.timing.navigationStart}"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A selenium driver with an empty profile."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver on PATH: pages are not opened")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def open_page(browser: Any, page: Path, size: str = "desktop", dark: bool = False) -> dict[str, Any]:
    """Show a page at one of SIZES and return its FACTS; with `console`, what the browser complained about."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.absolute().as_uri())
    return {**browser.execute_script(FACTS), "console": browser.get_log("browser")}


def violations(browser: Any) -> list[str]:
    """What axe-core finds on the page that is open, everything unfolded; skips without axe-core."""
    given = os.environ.get(AXE)
    file = Path(given) if given else Path("node_modules/axe-core/axe.min.js")
    if not file.is_file():
        pytest.skip(f"no axe-core: set {AXE} to its axe.min.js (npm pack axe-core), or npm install axe-core")
    browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = true })")
    browser.execute_script(file.read_text(encoding="utf-8"))
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then(done)")
    assert {"color-contrast", "html-has-lang"} <= {rule["id"] for rule in found["passes"] + found["violations"]}
    return [f"{one['id']}: {json.dumps([node['target'] for node in one['nodes']][:3])}" for one in found["violations"]]


def screenshot(browser: Any, file: Path, height: int) -> None:
    """A PNG of the open page, from its top."""
    width = browser.execute_script("return document.documentElement.clientWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    asked = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    file.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", asked)["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.report.browser", description="A picture of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", choices=SIZES, default="desktop")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--height", type=int, default=1400)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        open_page(browser, given.page, given.size, given.dark)
        screenshot(browser, given.file, given.height)


if __name__ == "__main__":
    main()
