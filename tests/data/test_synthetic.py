"""The embedded data: right answers, the same for a seed, and nothing held out that could be trained on."""

import ast
import json
import operator
import random
import re
from collections import Counter
from typing import Any

import pytest

from hymba_tune.data.synthetic import (
    GENERATORS,
    calls,
    constraints,
    documents,
    functions,
    held_out,
    manners,
    questions,
    raw_document,
    roles,
    word_problems,
    words,
)
from hymba_tune.data.synthetic.problem import HELD_OUT_EVERY
from hymba_tune.errors import UserError

NAMES = sorted(GENERATORS)
DRAWERS = {
    "tiny_math": word_problems.draw,
    "tiny_code": functions.draw,
    "tiny_calls": calls.draw,
    "tiny_constraints": constraints.draw,
    "tiny_chat": manners.draw_chat,
    "tiny_preferences": manners.draw_pair,
    "tiny_roles": roles.draw,
}
WORKED = ("tiny_math", "tiny_code", "tiny_calls")
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def training(name, n, seed=0):
    rng = random.Random(seed)
    return [GENERATORS[name](rng) for _ in range(n)]


def evaluation_problems(name, n):
    rng = random.Random(1)
    drawn = (DRAWERS[name](rng) for _ in range(n * HELD_OUT_EVERY * 2))
    return [problem for problem in drawn if problem.is_for_evaluation()][:n]


def contents(name, messages):
    """What the conversation's replies work out, read off their text: equation chains, function bodies, calls."""
    replies = [message for message in messages if message["role"] == "assistant"]
    if name == "tiny_math":
        return [tuple(EQUATION.findall(reply["content"])) for reply in replies]
    if name == "tiny_code":
        return [_body_without_names(reply["content"].split("```")[1].removeprefix("python\n")) for reply in replies]
    return [json.dumps(call) for reply in replies for call in reply.get("tool_calls", [])]


def _body_without_names(code):
    function = ast.parse(code).body[0]
    parameter = function.args.args[0].arg
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == parameter:
            node.id = "parameter"
    return ast.unparse(function.body[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_always_gives_the_same_conversations(name):
    assert training(name, 20) == training(name, 20)
    assert training(name, 20) != training(name, 20, seed=1)


def test_the_items_are_the_ones_that_published_scores_were_made_with():
    first = {name: held_out(name, 1)[0]["target"] for name in WORKED}
    assert first == {
        "tiny_calls": [{"name": "find_train", "arguments": {"start": "Lima", "end": "Athens", "day": "Tuesday"}}],
        "tiny_code": "def check(n):\n    return n - 8 + 7",
        "tiny_math": "39",
    }


@pytest.mark.parametrize("name", WORKED)
def test_no_held_out_content_is_worked_in_training(name):
    trained = {content for example in training(name, 4000) for content in contents(name, example["messages"])}
    scored = [contents(name, [problem.reply])[0] for problem in evaluation_problems(name, 300)]
    assert len(set(scored)) > 150, "few items, often repeated"
    assert not trained & set(scored)


PATTERNS = {
    kind.told: re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(kind.told))) for kind in questions.KINDS
}


def facts(text):
    """The keys of all facts that a text tells, found by their wording."""
    matches = [match for pattern in PATTERNS.values() for match in pattern.finditer(text)]
    return {("fact", *(match[name] for name in sorted(match.groupdict()))) for match in matches}


def texts(example):
    turns = example.get("messages") or [*example["prompt"], *example["chosen"], *example["rejected"]]
    return "\n".join(message["content"] or "" for message in turns)


@pytest.mark.parametrize("name", ["tiny_chat", "tiny_preferences", "tiny_roles"])
def test_no_fact_that_is_asked_about_in_evaluation_is_told_in_training(name):
    trained = set().union(*(facts(texts(example)) for example in training(name, 1500)))
    asked = {problem.key for problem in evaluation_problems(name, 300) if problem.key[0] == "fact"}
    assert len(asked) > 100
    assert len(trained) > 800
    assert not trained & asked


def test_no_constrained_request_is_both_trained_and_evaluated():
    """Names of things of a kind make a small space, in which chance would bring the same request again."""
    requests = [example["messages"][:-1] for example in training("tiny_constraints", 6000)]
    trained = {json.dumps(messages) for messages in requests}
    held = {json.dumps(item["messages"]) for item in held_out("tiny_constraints", 500)}
    assert len(trained) < len(requests)
    assert not trained & held


def test_no_held_out_content_stands_in_pretraining_documents():
    rng = random.Random(2)
    text = "\n".join(raw_document(rng) for _ in range(4000))
    bodies = {problem.target.split("return ")[1] for problem in evaluation_problems("tiny_code", 300)}
    arguments = {json.dumps(problem.target[0]["arguments"]) for problem in evaluation_problems("tiny_calls", 300)}
    lines = {re.sub(r"^\w+ = ", "", line) for line in text.split("\n")}
    records = set(re.findall(r"\{.*\}", text))
    assert not bodies & lines
    assert not arguments & records
    asked = {problem.key for problem in evaluation_problems("tiny_preferences", 300)}
    assert not asked & facts(text)
    assert len(facts(text)) > 1000
    assert any("if x" in line for line in lines)
    assert any('"city"' in record for record in records)


def test_what_is_only_copied_stands_in_the_document_before():
    rng = random.Random(4)
    for _ in range(200):
        lines = documents._repeated(rng).split("\n")
        assert all(lines.count(line) >= 2 for line in lines)
        given, said = documents._looked_up(rng).removesuffix(".").split(". So ")
        assert set(said.split(", ")) <= set(given.split(", "))


def test_pretraining_documents_have_neither_the_chat_format_nor_the_answers_format():
    rng = random.Random(3)
    text = "\n".join(raw_document(rng) for _ in range(2000))
    assert not re.search(r"extra_id|####|```|toolcall|def |\?|Write|return", text)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_items_are_distinct_prompts_to_answer(name):
    items = held_out(name, 300)
    assert len({item["id"] for item in items}) == 300
    assert len({json.dumps([item["messages"], item.get("tools")]) for item in items}) == 300
    assert all(item["messages"][-1]["role"] in ("user", "tool") for item in items)
    assert held_out(name, 50) == items[:50]


def test_worked_steps_are_true_and_end_in_the_answer():
    for problem in (word_problems.draw(random.Random(seed)) for seed in range(500)):
        equations = EQUATION.findall(problem.reply["content"])
        assert len(equations) >= 2
        assert all(OPERATORS[sign](int(a), int(b)) == int(result) for a, sign, b, result in equations)
        assert problem.reply["content"].endswith(f"#### {equations[-1][-1]}")
        assert problem.target == equations[-1][-1]
        given = set(re.findall(r"\d+", problem.prompt[-1]["content"]))
        results = {result for *_, result in equations}
        assert all({a, b} <= given | results for a, _, b, _ in equations), problem


def test_documents_state_true_equations():
    rng = random.Random(4)
    equations = EQUATION.findall("\n".join(raw_document(rng) for _ in range(1000)))
    assert len(equations) > 1000
    assert all(OPERATORS[sign](int(a), int(b)) == int(result) for a, sign, b, result in equations)


def test_code_does_what_its_wish_says():
    meant = {_number_wish: range(25), _list_wish: ([7, 2, 9, 30, 12, 13],), _text_wish: ("abcdefghijkl",)}
    meant[_condition_wish] = range(45)
    seen: Counter[Any] = Counter()
    for task in map(functions.draw_task, map(random.Random, range(600))):
        for wish, arguments in meant.items():
            for argument in arguments:
                wanted = wish(task.what, argument)
                if wanted is not None:
                    assert eval(task.expression(), {task.parameter: argument}) == wanted, task
                    seen[wish] += 1
                    break
    assert set(seen) == set(meant)
    assert seen.total() == 600


def _number_wish(what, value):
    found = re.fullmatch(r"`\w+` (\w+) (\d+), then (\w+) (\d+)", what)
    return _changed(_changed(value, found[1], found[2]), found[3], found[4]) if found else None


def _list_wish(what, values):
    found = re.fullmatch(r"(.*) `x` (\w+) (\d+) for each `x` in `\w+` (.*?)(\d*)", what)
    if not found:
        return None
    folds: dict[str, Any] = {"the sum of": sum, "the largest of": max, "the smallest of": min, "a list of": list}
    kept = {
        "greater than ": lambda x, k: x > k,
        "less than ": lambda x, k: x < k,
        "not equal to ": lambda x, k: x != k,
        "that is even": lambda x, k: x in range(0, 99, 2),
        "that is odd": lambda x, k: x in range(1, 99, 2),
    }[found[4]]
    return folds[found[1]]([_changed(x, found[2], found[3]) for x in values if kept(x, int(found[5] or 0))])


def _text_wish(what, text):
    found = re.fullmatch(r"(the|`\w+` without the) (first|last) (\d) letters (?:of `\w+` )?(.*)", what)
    if not found:
        return None
    k, style = int(found[3]), found[4]
    cut = k if found[2] == "first" else len(text) - k
    part = text[:cut] if (found[1] == "the") == (found[2] == "first") else text[cut:]
    if style.startswith("repeated"):
        return "".join(part for _ in range(int(style.split()[1])))
    if '"' in style:
        word = style.split('"')[1]
        return part + word if style.startswith("followed by") else word + part
    return {"in upper case": part.upper(), "in lower case": part.lower()}[style]


def _condition_wish(what, value):
    found = re.fullmatch(r"\"(\w+)\" if `\w+` (.*) (\d+), else \"(\w+)\"", what)
    if not found:
        return None
    k = int(found[3])
    holds = {"is greater than": value > k, "is less than": value < k, "equals": value == k}[found[2]]
    return found[1] if holds else found[4]


def _changed(value, how, amount):
    return {"plus": value + int(amount), "minus": value - int(amount), "times": value * int(amount)}[how]


def test_calls_fit_the_functions_on_offer():
    types = {"string": str, "integer": int}
    for problem in (calls.draw(random.Random(seed)) for seed in range(500)):
        schemas = {tool["name"]: tool["parameters"] for tool in problem.tools}
        for call in problem.target:
            parameters = schemas[call["name"]]
            assert list(call["arguments"]) == parameters["required"] == list(parameters["properties"])
            assert all(
                isinstance(value, types[parameters["properties"][name]["type"]])
                for name, value in call["arguments"].items()
            )


def test_calls_come_in_every_shape():
    examples = training("tiny_calls", 500)
    shapes: Counter[str] = Counter()
    for example in examples:
        roles = [message["role"] for message in example["messages"]]
        shapes["system"] += "system" in roles
        shapes["result"] += roles[-2:] == ["tool", "assistant"]
        shapes["second turn"] += roles.count("user") == 2
        shapes["two calls"] += any(len(message.get("tool_calls", [])) == 2 for message in example["messages"])
        shapes["several functions"] += len(example["tools"]) > 1
    assert all(30 <= count <= 400 for count in shapes.values()), shapes


def test_constrained_requests_come_in_every_shape():
    shapes: Counter[str] = Counter()
    for problem in (constraints.draw(random.Random(seed)) for seed in range(500)):
        shapes.update(name for name, *_ in problem.target)
        shapes["system"] += problem.prompt[0]["role"] == "system"
        shapes["second turn"] += len(problem.prompt) == 3
    assert {*constraints.NAMES, "system", "second turn"} == set(shapes)
    assert all(25 <= count <= 450 for count in shapes.values()), shapes


def test_a_pair_is_a_right_and_kind_reply_and_one_with_a_fault():
    faults: Counter[str] = Counter()
    for problem in (manners.draw_pair(random.Random(seed)) for seed in range(500)):
        chosen, rejected, target = problem.reply["content"], (problem.rejected or {})["content"], problem.target
        assert target["right"] in chosen
        assert any(phrase in chosen for phrase in target["kind"])
        assert not any(phrase in chosen for phrase in target["not"])
        faults["rude or declining"] += any(phrase in rejected for phrase in target["not"])
        faults["not right"] += target["right"] not in rejected
        assert any(phrase in rejected for phrase in target["not"]) or target["right"] not in rejected
    assert faults["rude or declining"] > 200
    assert faults["not right"] > 200


def test_pairs_come_with_tools_several_turns_and_requests_to_decline():
    problems = [manners.draw_pair(random.Random(seed)) for seed in range(500)]
    shapes = {
        "tools": [problem for problem in problems if problem.tools],
        "second turn": [problem for problem in problems if len(problem.prompt) == 3 and not problem.tools],
        "declined": [problem for problem in problems if problem.target["right"] == questions.DECLINED],
    }
    assert all(40 <= len(found) <= 200 for found in shapes.values()), {
        name: len(found) for name, found in shapes.items()
    }
    assert all(problem.prompt[-1]["role"] == "tool" for problem in shapes["tools"])


def test_personas_answer_in_their_own_voice():
    seen: Counter[str] = Counter()
    for problem in (roles.draw(random.Random(seed)) for seed in range(300)):
        (persona,) = (name for name in roles.STYLES if name in problem.prompt[0]["content"])
        openings, closings = words.VOICES[persona]
        seen[persona] += 1
        assert problem.reply["content"] in problem.target
        assert len(problem.target) == len(set(problem.target)) == len(openings) * len(closings)
        assert all(text.startswith(openings) and text.endswith(closings) for text in problem.target)
    assert set(seen) == set(roles.STYLES) < set(words.VOICES)


def test_an_unknown_generator_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"tiny_maths.*tiny_math, tiny_code, tiny_calls"):
        held_out("tiny_maths", 1)
