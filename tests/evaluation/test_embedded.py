"""The embedded tasks judge by value, not by wording, and never run an answer."""

import json
import time
from typing import Any

import pytest
import torch

from hymba_tune import tiny
from hymba_tune.data.chat import encode_conversation, load_tokenizer, prompt_ids
from hymba_tune.data.synthetic import constraints, held_out
from hymba_tune.evaluation.chat_task import Verdict
from hymba_tune.evaluation.embedded import (
    HEADLINES,
    METRIC,
    SCORERS,
    held_out_items,
    run_embedded,
    score_calls,
    score_code,
    score_constraints,
    score_number,
    score_preference,
    score_rouge,
)
from hymba_tune.evaluation.embedded_constraints import constraints_met
from hymba_tune.evaluation.engine import Engine
from hymba_tune.model import HymbaForCausalLM


def right(verdict: Verdict) -> bool:
    return all(score == 1.0 for score in verdict.scores.values())


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return load_tokenizer(tiny.tiny_path())


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
    target = {
        "calls": [CALL],
        "constraints": FORM,
        "preference": PAIR,
        "rouge": ["It is red."],
    }.get(scorer, "x = 1")
    start = time.perf_counter()
    assert not right(SCORERS[scorer](answer, target))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("task", HEADLINES)
def test_every_reference_answer_is_right(task):
    written = {
        "number": lambda target: f"so\n#### {target}",
        "code": lambda target: target,
        "calls": lambda target: called(*target),
        "constraints": constraints.write,
        "preference": lambda target: target["chosen"],
        "rouge": lambda target: target[-1],
    }
    for item in held_out(task, 60):
        answer = written[item["scorer"]](item["target"])
        assert right(SCORERS[item["scorer"]](answer, item["target"])), (answer, item)


@pytest.mark.parametrize("task", HEADLINES)
def test_items_are_enough_for_small_standard_errors(task):
    assert len(held_out_items(task)) >= (300 if HEADLINES[task] == METRIC else 500)


def test_an_embedded_task_runs(tiny_hymba, character_tokenizer):
    engine = Engine(tiny_hymba, character_tokenizer, max_new_tokens=4)
    scores = run_embedded(engine, held_out("tiny_math", 5), 3)
    assert scores.metrics["exact_match"].n == 3
    assert scores.items[0]["prompt"] == held_out("tiny_math", 1)[0]["messages"][-1]["content"]


FORM: list[list[Any]] = [["words", ["Ann", "red"]], ["dashes"], ["begin", "Sure"], ["end", "Bye"]]


@pytest.mark.parametrize(
    ("answer", "missed"),
    [
        ("Sure\n- Ann\n- red\nBye", set()),
        ("Sure\n- Ann\n- red", {"end", "words"}),
        ("- Ann\n- red\nBye", {"begin", "words"}),
        ("Sure\n- red\n- Ann\nBye", {"words"}),
        ("Sure\n- ann\n- red\nBye", {"words"}),
        ("Sure\nAnn\nred\nBye", {"dashes", "words"}),
        ("", {"words", "dashes", "begin", "end"}),
    ],
)
def test_constraints_are_judged_one_by_one(answer, missed):
    assert {name for name, met in constraints_met(answer, FORM).items() if not met} == missed


@pytest.mark.parametrize(
    ("constraints", "answer", "expected"),
    [
        ([["kind", ["red", "blue", "green"], 2], ["commas"]], "red, blue", True),
        ([["kind", ["red", "blue", "green"], 2], ["commas"]], "red, red", False),
        ([["kind", ["red", "blue", "green"], 2], ["commas"]], "red, pink", False),
        ([["kind", ["red", "blue", "green"], 2], ["commas"], ["without", "blue"]], "red, blue", False),
        ([["kind", ["red", "blue", "green"], 2], ["commas"], ["upper"]], "RED, BLUE", True),
        ([["kind", ["red", "blue", "green"], 2], ["commas"], ["upper"]], "RED, Blue", False),
        ([["words", ["a", "b"]], ["numbers"]], "1. a\n2. b", True),
        ([["words", ["a", "b"]], ["numbers"]], "1. a\n3. b", False),
        ([["words", ["a", "b"]], ["JSON"]], '["a", "b"]', True),
        ([["words", ["a", "b"]], ["JSON"]], '["a", 2]', False),
        ([["words", ["a", "b"]], ["JSON"], ["lower"]], '["a", "b"', False),
        ([["sentence", "Tom sings.", 2], ["quoted"]], '"Tom sings.\nTom sings."', True),
        ([["sentence", "Tom sings.", 2], ["quoted"]], "Tom sings.\nTom sings.", False),
        ([["sentence", "Tom sings.", 2]], "Tom sings.", False),
        ([["sentence", "Tom sings.", 1], ["lower"]], "tom sings.", True),
    ],
)
def test_form_and_content_count_together(constraints, answer, expected):
    assert score_constraints(answer, constraints).scores["all_constraints"] == expected


PAIR = {"right": "The cat is red.", "kind": ["Of course!"], "not": ["Ugh.", "I will not"]}


@pytest.mark.parametrize(
    ("answer", "wins"),
    [
        ("Of course! The cat is red.", True),
        ("The cat is red.", False),
        ("Of course! The cat is blue.", False),
        ("Of course! Ugh. The cat is red.", False),
    ],
)
def test_an_answer_wins_that_is_right_and_kind_and_not_rude(answer, wins):
    assert score_preference(answer, PAIR).scores == {"win_share": float(wins)}


def test_rouge_takes_the_best_reference():
    assert score_rouge("Arr! It be red.", ["Ahoy! It be red.", "Arr! It be red."]).scores == {"rouge_l": 1.0}
    assert score_rouge("It is red.", ["It be red."]).scores["rouge_l"] == pytest.approx(2 / 3)


def test_of_every_pair_the_rule_prefers_the_chosen_reply():
    for item in held_out("tiny_preferences", 200):
        chosen, rejected = (score_preference(item["target"][side], item["target"]) for side in ("chosen", "rejected"))
        assert chosen.scores == {"win_share": 1.0}
        assert rejected.scores == {"win_share": 0.0}


def test_the_likelier_reply_is_counted_as_preferred(tiny_tokenizer):
    rows = held_out("tiny_preferences", 6)
    torch.manual_seed(0)
    model = HymbaForCausalLM(tiny.tiny_config()).eval()
    engine = Engine(model, tiny_tokenizer, max_new_tokens=2)
    scores = run_embedded(engine, rows, 6)
    assert scores.metrics["preference_accuracy"].n == scores.metrics["win_share"].n == 6
    for row, item in zip(rows, scores.items, strict=True):
        prompt = prompt_ids(tiny_tokenizer, row["messages"], row.get("tools"))
        found = []
        for side in ("chosen", "rejected"):
            reply = {"role": "assistant", "content": row["target"][side]}
            ids = encode_conversation(tiny_tokenizer, [*row["messages"], reply], row.get("tools")).input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(logprobs[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))))
        assert item["verdict"]["preference_accuracy"] == float(found[0] > found[1])
