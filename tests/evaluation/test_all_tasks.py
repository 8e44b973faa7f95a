"""Every task of the catalogue on made-up items: batched or not, on endless and on hostile answers."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.evaluation import engine, rolebench
from hymba_tune.evaluation.catalogue import TASKS
from hymba_tune.evaluation.generate import Generation
from hymba_tune.evaluation.suite import run_suite
from hymba_tune.model import load_model
from hymba_tune.tiny import tiny_path
from tests.evaluation.stand_ins import write_stand_ins

nltk = pytest.importorskip("nltk")
pytest.importorskip("lm_eval")
pytest.importorskip("tree_sitter")

Results = dict[str, dict[str, Any]]

# Log-likelihoods as items show them, with three decimals: another order of float32 sums may round one otherwise.
TOLERANCE = 2e-3
_LIKELIHOOD = re.compile(r"-?\d+\.\d{3}\b")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """The embedded model, float32, and its tokenizer."""
    return load_model(tiny_path()).eval(), load_tokenizer(tiny_path())


def run_one(tiny: tuple[Any, Any], task: str, out: Path, data: Path) -> dict[str, Any]:
    [result] = run_suite(tiny[0], tiny[1], [task], out, data=data)
    return result


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nltk.data, "path", [*nltk.data.path])  # the stand-in must not stay on it
    return write_stand_ins(tmp_path / "data")


def run(tiny: tuple[Any, Any], tasks: Iterable[str], out: Path, data: Path, **settings: Any) -> Results:
    results = run_suite(tiny[0], tiny[1], list(tasks), out, data=data, limit=2, **settings)
    assert not [result["not_run"] for result in results if result["not_run"]]
    return {result["task"]: result for result in results}


def test_a_batch_of_64_gives_the_answers_of_batches_of_1_in_every_task(tiny, data, tmp_path):
    together = run(tiny, TASKS, tmp_path / "64", data, max_new_tokens=4, batch_tokens=64 * 2048)
    alone = run(tiny, TASKS, tmp_path / "1", data, max_new_tokens=4, batch_tokens=1)
    assert together.keys() == alone.keys() == TASKS.keys()
    for task, result in together.items():
        holds_what_a_result_must(task, result)
        assert result["metrics"] == alone[task]["metrics"], task
        for item, other in zip(result["items"], alone[task]["items"], strict=True):
            assert _LIKELIHOOD.sub("", str(item)) == _LIKELIHOOD.sub("", str(other))
            numbers = [[float(text) for text in _LIKELIHOOD.findall(one["answer"])] for one in (item, other)]
            assert numbers[0] == pytest.approx(numbers[1], abs=TOLERANCE)


LIKELIHOODS = {"gpqa", "mmlu", "mmlu_upstream"}
ITEM = {"id", "prompt_sha256", "prompt", "answer", "extracted", "target", "verdict", "why", "dropped_prompt_tokens"}


def holds_what_a_result_must(task: str, result: dict[str, Any]) -> None:
    assert re.search(r" v\d+$", result["protocol"])
    assert result["headline"] in result["metrics"]
    assert all(metric.keys() == {"value", "n", "stderr"} for metric in result["metrics"].values())
    assert {"model", "tokenizer", "chat_template", "dtype", "max_length", "limit", "data"} <= result["settings"].keys()
    assert {"torch", "transformers"} <= result["packages"].keys()
    assert result["seconds"] > 0
    generated = any(item["answer"] for item in result["items"]) and task not in LIKELIHOODS
    assert (result["tokens_per_second"] or 0) > 0 if generated else result["tokens_per_second"] is None
    for item in result["items"]:
        assert item.keys() >= (ITEM if task in LIKELIHOODS else ITEM | {"finish_reason"})
        assert len(item["prompt_sha256"]) == 64
        assert item["why"]
        assert (item["prompt"] is None) == (task == "gpqa")


def test_without_files_every_benchmark_says_how_to_get_them_and_has_no_score(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    (tmp_path / "empty").mkdir()
    here = [name for name in TASKS if not name.startswith("tiny_")]
    results = run_suite(tiny[0], tiny[1], here, tmp_path / "out", data=tmp_path / "empty")
    for result in results:
        assert re.search(r"\bget (it|them) from |nltk\.downloader", result["not_run"])
        assert (result["metrics"], result["items"], result["suspect"]) == ({}, [], None)


def answers(monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """From now on every prompt is answered by `text`, and up to its limit; returns the limits as they are asked for."""
    limits: list[int] = []

    def generate(*arguments: Any, max_new_tokens: list[int], **settings: Any) -> Iterator[tuple[int, Generation]]:
        limits.extend(max_new_tokens)
        yield from ((index, Generation(text, [5] * limit, "length")) for index, limit in enumerate(max_new_tokens))

    monkeypatch.setattr(engine, "generate_as_finished", generate)
    return limits


LIMITS = {"ifeval": 1280, "bfcl_v2": 1000, "bfcl_v2_tools": 1000, "gsm8k_upstream": 256}
LIMITS |= dict.fromkeys(rolebench.PROTOCOLS, 512)


@pytest.mark.parametrize("task", LIMITS)
def test_a_model_that_never_stops_ends_at_the_tasks_limit_and_is_counted(tiny, data, tmp_path, monkeypatch, task):
    limits = answers(monkeypatch, "on and on ")
    result = run_one(tiny, task, tmp_path, data)
    assert set(limits) == {LIMITS[task]}
    assert result["cut_answers"] == len(result["items"]) > 0


def test_gsm8k_leaves_an_endless_answer_what_the_model_holds_beside_its_prompt(tiny, data, tmp_path, monkeypatch):
    limits = answers(monkeypatch, "on and on ")
    run_one(tiny, "gsm8k", tmp_path, data)
    assert all(256 <= limit < tiny[0].config.max_position_embeddings for limit in limits)


HOSTILE = {
    "100,000 characters": "x" * 100_000,
    "100,000 digits": "#### " + "9" * 100_000,
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>" * 100,
    "control characters": "\x00\x1b[31m\x07\u202e\ud800" * 500,
    "deep brackets": "[f(a=" + "[{(" * 30_000,
    "code meant to run": "```python\n__import__('pathlib').Path('{}').write_text('ran')\n```\n"
    "[__import__('pathlib').Path('{}').write_text('ran')]",
    "nothing": "",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers_are_scored_in_every_benchmark_and_never_run(tiny, data, tmp_path, monkeypatch, kind):
    ran, began = tmp_path / "ran", time.process_time()
    text = HOSTILE[kind].replace("{}", str(ran))
    answers(monkeypatch, text)
    results = run(tiny, ["gsm8k", *LIMITS], tmp_path / "out", data, max_new_tokens=4)
    assert time.process_time() - began < 30
    assert not ran.exists()
    for task, result in results.items():
        assert all(0 <= metric["value"] <= 1 for metric in result["metrics"].values())
        assert json.loads((tmp_path / "out" / f"{task}.json").read_text(encoding="utf-8"))["items"]
        assert all(item["answer"] == text for item in result["items"])
        assert ("answers are empty" in (result["suspect"] or "")) == (kind == "nothing")
