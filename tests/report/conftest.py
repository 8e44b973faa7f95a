"""A run directory written by hand: two tasks before and after, one that could not run, a hostile answer."""

import json
from pathlib import Path
from typing import Any

import pytest

HOSTILE = "#### 7 <script>alert(1)</script> | `x` ```\n# not a heading\x1b[31m \u202etxet \ud800 " + "z" * 3000


def item(index: int, score: float, answer: str = "so\n#### 4") -> dict[str, Any]:
    return {
        "id": f"gsm8k/test/{index}",
        "prompt_sha256": f"{index:064x}",
        "prompt": f"Question {index}: what is 2 + 2?",
        "answer": answer,
        "extracted": {"strict_match": "4", "flexible_extract": "4"},
        "target": "4",
        "verdict": {"strict_match": score, "flexible_extract": score},
        "why": "right" if score else "5 is not 4",
    }


def result(task: str, scores: list[float], suspect: str | None = None) -> dict[str, Any]:
    mean = sum(scores) / len(scores)
    stderr = (mean * (1 - mean) / (len(scores) - 1)) ** 0.5
    metric = {"value": mean, "n": len(scores), "stderr": stderr}
    items = [item(i, score, HOSTILE if i == 3 else "so\n#### 4") for i, score in enumerate(scores)]
    return {
        "task": task,
        "protocol": f"{task}, 5-shot v1",
        "headline": "strict_match",
        "metrics": {"flexible_extract": metric, "strict_match": metric},
        "settings": {"limit": len(scores)},
        "items": items,
        "packages": {"torch": "2.13.0"},
        "seconds": 12.5,
        "tokens_per_second": 900.0,
        "cut_prompts": 0,
        "cut_answers": 3,
        "suspect": suspect,
        "not_run": None,
    }


def not_run(task: str) -> dict[str, Any]:
    empty = result(task, [0.0, 0.0])
    return empty | {
        "headline": None,
        "metrics": {},
        "items": [],
        "cut_answers": 0,
        "not_run": "gpqa: data missing; ask its authors",
    }


RECIPE = """\
stage: sft1
method: sft
model:
  from: tiny
trainer:
  learning_rate: 0.002
eval:
  suites: [gsm8k, gpqa]
"""
ENVIRONMENT = {
    "hymba_tune": "0.1.0",
    "git": {"commit": "0123abcd", "changed": False},
    "command": "hymba-tune run recipes/sft1.yaml --tiny",
    "time": "2026-11-23T10:00:00+00:00",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "trl": "1.16.0"},
    "hardware": {"cpu": "a CPU", "cores": 2},
}
DATA = {
    "sources": [
        {"source": "math", "licence": "MIT", "conversations": 900},
        {"source": "a|b", "licence": None, "conversations": 100},
    ],
    "packing": {"documents": 1000, "rows": 210, "dropped": 3},
}


def metrics_line(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 400,
        "loss": 4.0 / step**0.3,
        "learning_rate": 0.002 * (1 - step / 401),
        "grad_norm": 1.5,
        "tokens": 4096 * step,
        "supervised_tokens": 2000 * step,
        "tokens_per_second": 9000.0,
        "seconds": 0.5 * step,
    }


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Cut off in its training."""
    run = tmp_path / "run"
    (run / "eval" / "before").mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (run / "state.json").write_text(json.dumps({"finished": ["data", "before"]}))
    (run / "data.json").write_text(json.dumps(DATA))
    lines = "".join(json.dumps(metrics_line(step)) + "\n" for step in range(1, 401))
    (run / "metrics.jsonl").write_text(lines + '{"step": 401, "lo')
    (run / "eval" / "before" / "gsm8k.json").write_text(json.dumps(result("gsm8k", [0, 1, 0, 0, 0, 0, 1, 0])))
    return run


@pytest.fixture
def finished(begun: Path) -> Path:
    """The same run at its end."""
    after = begun / "eval" / "after"
    after.mkdir()
    improved = result("gsm8k", [1, 0, 1, 1, 1, 1, 1, 0], suspect="3 of 8 answers are empty: check the chat template")
    (after / "gsm8k.json").write_text(json.dumps(improved))
    (after / "gpqa.json").write_text(json.dumps(not_run("gpqa")))
    (after / "answers.jsonl").write_text("not a result\n")
    (begun / "state.json").write_text(json.dumps({"finished": ["data", "before", "training", "after"]}))
    return begun


@pytest.fixture
def pipeline(finished: Path, tmp_path: Path) -> Path:
    """A folder of two stages, the second cut off, of three."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    finished.rename(folder / "sft1")
    second = folder / "sft2"
    (second / "eval").mkdir(parents=True)
    recipe = (folder / "sft1" / "recipe.yaml").read_text().replace("stage: sft1", "stage: sft2")
    (second / "recipe.yaml").write_text(recipe.replace("from: tiny", "from: stage:sft1").replace("0.002", "0.001"))
    (second / "state.json").write_text(json.dumps({"finished": ["data"]}))
    (second / "warnings.json").write_text(json.dumps([{"stage_step": "training 3", "message": "loss 0 <b>"}]))
    (folder / "pipeline.json").write_text(json.dumps({"stages": ["sft1", "sft2", "dpo"]}))
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--make-golden", action="store_true", help="write tests/report/golden from the current code")
