"""Scorers by name judge values, bound what they read, and never run or trust an answer."""

import json
import time

import pytest

from hymba_tune.evaluation.scorers import LONGEST, SCORERS, target_fault

CALLS = [{"name": "f", "arguments": {"a": 1}}]


def right(name: str, answer: str, target: object) -> bool:
    return SCORERS[name](answer, target).scores["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("name", "answer", "target", "expected"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", ["Lutetia", "Paris"], False),
        ("exact", "Lutetia", ["Lutetia", "Paris"], True),
        ("contains", "It is PARIS, of course.", "Paris", True),
        ("contains", "It is Lyon.", ["Paris", "Lutetia"], False),
        ("number", "so 3 and then 1,234.50", "1234.5", True),
        ("number", "-7", ["8", "-7"], True),
        ("number", "7", "-7", False),
        ("number", "no digits", "7", False),
        ("code", "```python\nx = 1+1\n```", "x = (1 + 1)", True),
        ("code", "x = 2", ["x = 1", "x=2"], True),
        ("calls", '<toolcall> {"name": "f", "arguments": {"a": 1}} </toolcall>', CALLS, True),
        ("calls", '<toolcall> {"name": "f", "arguments": {"a": "1"}} </toolcall>', CALLS, False),
    ],
)
def test_verdicts(name, answer, target, expected):
    assert right(name, answer, target) is expected


def test_rouge_takes_the_best_target():
    scores = SCORERS["rouge"]("the cat sat", ["a dog ran", "the cat sat down"]).scores
    assert scores["rouge_l_recall"] == pytest.approx(3 / 4)
    assert scores["rouge_l_f1"] == pytest.approx(6 / 7)
    assert SCORERS["rouge"]("", "a").extracted is None


@pytest.mark.parametrize("name", SCORERS)
def test_every_target_that_cannot_be_compared_is_refused(name):
    good = [{"name": "f", "arguments": {}}] if name == "calls" else "7"
    assert target_fault(name, good) is None
    for bad in (None, "", [], 7, {"a": 1}, [None], ["x", " "]):
        assert target_fault(name, bad), bad
    assert target_fault("number", "seven")


HOSTILE = {
    "100,000 characters": "x" * 100_000,
    "100,000 digits": "9" * 100_000,
    "signs and commas": "+-,." * 25_000,
    "html": "<script>alert(1)</script>" * 2_000,
    "control characters": "\x1b[31m\x00\x07\u202e" * 10_000,
    "a lone surrogate": "\ud800",
    "deep brackets": "(" * 100_000,
    "deep JSON": "<toolcall>" + "[" * 100_000,
    "many calls": "<toolcall>" * 20_000,
    "many fences": "```\n" * 30_000,
    "code meant to run": "__import__('os').system('touch {marker}')",
    "a fenced bomb": "```python\n" + "x = " + "-" * 19_000 + "1\n```",
    "sentences": "a b. " * 20_000,
}


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers_are_wrong_and_quickly_so(name, kind, tmp_path):
    marker = tmp_path / "ran"
    target = [{"name": "f", "arguments": {}}] if name == "calls" else "3141"
    began = time.process_time()
    verdict = SCORERS[name](HOSTILE[kind].replace("{marker}", str(marker)), target)
    assert time.process_time() - began < 2
    assert all(score == 0.0 for score in verdict.scores.values())
    assert len(json.dumps(verdict.extracted)) <= 7 * LONGEST  # a control character takes six in JSON
    assert not marker.exists()
