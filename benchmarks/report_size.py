"""The size of a pipeline's page, and how long a browser takes to open it: 5 stages x 6 suites x 200 answers.

    python -m benchmarks.report_size

The run directories are generated: answers of the lengths that real ones have, 200 logged steps, 6 sources. Opening is
the time from the request to the load event in headless Chromium, the median of 5; null where there is none.
"""

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from hymba_tune.report.render import write_report

STAGES, SUITES, ITEMS, STEPS, SOURCES = 5, 6, 200, 200, 6
OPENED = 5
WORDS = [
    "the",
    "of",
    "each",
    "number",
    "is",
    "plus",
    "so",
    "that",
    "step",
    "answer",
    "<b>",
    "we",
    "have",
    "&",
    "then",
    "gives",
    "value",
    "code",
    "return",
]


def make_pipeline(folder: Path) -> Path:
    """The run directories of a finished pipeline; the same every time."""
    rng = random.Random(0)
    names = [f"stage{number}" for number in range(STAGES)]
    for number, name in enumerate(names):
        run = folder / name
        for moment in ("before", "after"):
            (run / "eval" / moment).mkdir(parents=True)
            for suite in range(SUITES):
                result = _result(rng, f"suite{suite}", 0.2 + 0.1 * number + 0.1 * (moment == "after"))
                _write(run / "eval" / moment / f"suite{suite}.json", result)
        parent = f"stage:{names[number - 1]}" if number else "tiny"
        recipe = (
            f"stage: {name}\nmethod: sft\nmodel: {{from: {parent}}}\ntrainer: {{learning_rate: {number + 1}.0e-5}}\n"
        )
        (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
        _write(run / "state.json", {"finished": ["data", "before", "training", "after"]})
        _write(run / "data.json", {"sources": [_source(rng, i) for i in range(SOURCES)], "rows": 1000})
        lines = [_line(rng, step) for step in range(1, STEPS + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _write(folder / "pipeline.json", {"stages": names})
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def _result(rng: random.Random, task: str, rate: float) -> dict[str, Any]:
    items = [_item(rng, task, number, float(rng.random() < rate)) for number in range(ITEMS)]
    values = [item["verdict"]["acc"] for item in items]
    metric = {"value": statistics.fmean(values), "n": ITEMS, "stderr": statistics.stdev(values) / ITEMS**0.5}
    facts = {"seconds": 10.0, "tokens_per_second": 900.0, "cut_prompts": 0, "cut_answers": 0}
    blanks = dict.fromkeys(("suspect", "not_run"))
    shown = {"task": task, "protocol": f"{task}, 0-shot, v1", "headline": "acc", "metrics": {"acc": metric}}
    return {**shown, **facts, **blanks, "settings": {}, "items": items, "packages": {}, "parts_not_run": {}}


def _item(rng: random.Random, task: str, number: int, score: float) -> dict[str, Any]:
    return {
        "id": f"{task}/test/{number}",
        "prompt": _text(rng, 80),
        "answer": _text(rng, 200),
        "extracted": str(rng.randrange(1000)),
        "target": str(rng.randrange(1000)),
        "verdict": {"acc": score},
        "why": "right" if score else "another number",
    }


def _source(rng: random.Random, number: int) -> dict[str, Any]:
    tokens = rng.randrange(10**5, 10**7)
    counts = {"read": 9000, "kept": 8000, "conversations": 8000, "documents": 8000}
    return {"source": f"source{number}", "licence": "MIT", **counts, "tokens": tokens, "supervised_tokens": tokens // 3}


def _line(rng: random.Random, step: int) -> dict[str, Any]:
    noise = rng.random()
    rates = {"learning_rate": 1e-5 * (1 - step / (STEPS + 1)), "grad_norm": 1 + noise, "tokens_per_second": 900 + noise}
    sums = {"tokens": 4096 * step, "supervised_tokens": 2000 * step, "seconds": 2.0 * step}
    return {"step": step, "epoch": step / STEPS, "loss": 4 / step**0.3 + 0.1 * noise, **rates, **sums}


def seconds_to_open(page: Path, profile: Path) -> float | None:
    """Median over OPENED visits, None without a browser."""
    import pytest

    from tests.report.browser import chromium, open_page

    try:
        with chromium(profile) as browser:
            return statistics.median(open_page(browser, page)["opened"] for _ in range(OPENED)) / 1000
    except pytest.skip.Exception:
        return None


def measure(folder: Path) -> dict[str, Any]:
    """Bytes of the page, seconds to write the report and to open the page."""
    pipeline = make_pipeline(folder / "pipeline")
    began = time.perf_counter()
    write_report(pipeline)
    written = time.perf_counter() - began
    page = pipeline / "report.html"
    return {
        "stages": STAGES,
        "suites": SUITES,
        "answers_a_suite": ITEMS,
        "bytes": page.stat().st_size,
        "seconds_to_write": written,
        "seconds_to_open": seconds_to_open(page, folder / "profile"),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_result("report_size", measure(Path(folder)))


if __name__ == "__main__":
    main()
