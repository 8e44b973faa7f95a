"""The embedded tasks judge by value, not by wording, and never run an answer."""

import json
import time

import pytest

from hymba_tune.data.synthetic import held_out
from hymba_tune.evaluation.chat_task import Verdict
from hymba_tune.evaluation.embedded import SCORERS, TASKS, run_embedded, score_calls, score_code, score_number
from hymba_tune.evaluation.engine import Engine


def right(verdict: Verdict) -> bool:
    return verdict.scores["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("2 + 3 = 5\n#### 5", True), ("#### 4\n#### 5", True), ("####5 ", True), ("#### 5 apples", False), ("5", False)],
)
def test_numbers_follow_the_last_mark(answer, expected):
    assert right(score_number(answer, "5")) is expected


def test_thousands_commas_do_not_matter():
    assert right(score_number("#### 1,234", "1234"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("def f(n):\n    return n - 8 + 7", True),
        ("Here:\n```python\ndef f(n):\n  return (n - 8) + 7  # so\n```\nDone.", True),
        ("def f(n):\n    return n + 7 - 8", False),
        ("", False),
    ],
)
def test_code_is_compared_as_a_syntax_tree(answer, expected):
    assert right(score_code(answer, "def f(n):\n    return n - 8 + 7")) is expected


CALL = {"name": "send", "arguments": {"to": "Ann", "count": 2, "now": True}}


def called(*calls: object) -> str:
    return "\n".join(f"<toolcall> {json.dumps(call)} </toolcall>" for call in calls)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"now": True, "count": 2, "to": "Ann"}, True),
        ({"to": "Ann", "count": 2.0, "now": True}, True),
        ({"to": "Ann", "count": 2, "now": 1}, False),
        ({"to": "Ann", "count": "2", "now": True}, False),
    ],
)
def test_calls_are_compared_as_json_values(arguments, expected):
    assert right(score_calls(called({"arguments": arguments, "name": "send"}), [CALL])) is expected


def test_a_missing_or_an_extra_call_is_wrong():
    assert not right(score_calls(called(CALL), [CALL, CALL]))
    assert not right(score_calls(called(CALL, CALL), [CALL]))
    assert score_calls("I would rather not", [CALL]).extracted is None


HOSTILE = [
    "(" * 100_000,
    "[" * 100_000,
    "<toolcall> " + "[" * 100_000,
    '<toolcall> {"a": ' + "9" * 10_000 + "}",
    "<toolcall>" * 10_000,
    "```" * 30_000,
    "x = " + "-" * 50_000 + "1",
    "\x00\x1b]0;",
    "__import__('os').abort()",
]


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_quick(scorer, answer):
    target = [CALL] if scorer == "calls" else "x = 1"
    start = time.perf_counter()
    assert not right(SCORERS[scorer](answer, target))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("task", TASKS)
def test_every_reference_answer_is_right(task):
    for item in held_out(task, 20):
        answer = {
            "number": lambda target: f"so\n#### {target}",
            "code": lambda target: target,
            "calls": lambda target: called(*target),
        }[item["scorer"]](item["target"])
        assert right(SCORERS[item["scorer"]](answer, item["target"]))


def test_an_embedded_task_runs(tiny_hymba, character_tokenizer):
    engine = Engine(tiny_hymba, character_tokenizer, max_new_tokens=4)
    scores = run_embedded(engine, held_out("tiny_math", 5), 3)
    assert scores.metrics["exact_match"].n == 3
    assert scores.items[0]["prompt"] == held_out("tiny_math", 1)[0]["messages"][-1]["content"]
