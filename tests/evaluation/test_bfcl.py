"""BFCL's answers are read as data, judged by the official rules, and averaged as the leaderboard averages."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.errors import UserError
from hymba_tune.evaluation import bfcl, bfcl_questions
from hymba_tune.evaluation.bfcl_ast import check
from hymba_tune.evaluation.bfcl_decode import Call, Undecodable, decode, decode_tool_calls
from hymba_tune.evaluation.engine import Answer

pytest.importorskip("tree_sitter")

WEATHER = {
    "name": "weather.get",
    "description": "Weather.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "scale": {"type": "float"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "place": {"type": "dict"},
            "stops": {"type": "array", "items": {"type": "dict"}},
            "pair": {"type": "tuple", "items": {"type": "float"}},
            "metric": {"type": "boolean"},
        },
        "required": ["city"],
    },
}
ACCEPTED = {
    "city": ["San Francisco, CA"],
    "days": [3, ""],
    "scale": [1.5, 2.0, ""],
    "tags": [["wind", "rain"], ""],
    "place": [{"lat": [37], "name": ["Bay", ""]}, ""],
    "stops": [[{"at": ["Oakland"]}], ""],
    "pair": [[1.0, 2.0], ""],
    "metric": ["use_metric", True, ""],
}


def row(category: str = "simple", functions: Any = None, truth: Any = None) -> dict[str, Any]:
    truth = [{"weather.get": ACCEPTED}] if truth is None else truth
    return {
        "id": f"{category}_0",
        "category": category,
        "question": [{"role": "user", "content": "Weather?"}],
        "function": [WEATHER] if functions is None else functions,
        "ground_truth": truth,
    }


def error_type(answer: Any, **kwargs: Any) -> str | None:
    item = row(**kwargs)
    fault = bfcl.judge(item, bfcl.decode_or_error("bfcl_v2", item, answer))
    return fault and fault.error_type


def test_every_gold_answer_gets_the_official_verdict_and_error_type(data_dir):
    rows = {row["id"]: row for row in bfcl_questions.bfcl_rows(data_dir)}
    compared, disagreements = 0, []
    for gold in sorted((data_dir / "scoring_gold" / "bfcl_v2").glob("*.jsonl")):
        for answer in map(json.loads, gold.read_text(encoding="utf-8").splitlines()):
            item = rows[answer["id"]]
            fault = bfcl.judge(item, bfcl.decode_or_error("bfcl_v2", item, answer["result"]))
            compared += 1
            if (fault is None, fault and fault.error_type) != (answer["valid"], answer["error_type"]):
                disagreements.append((gold.name, answer["id"], fault))
    assert compared == 2497 + 1699 + 2491
    assert disagreements == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('[weather.get(city="san francisco CA")]', None),  # case, blanks and , . / - _ * ^ do not count in strings
        (' weather.get(city="San Francisco, CA")', None),
        ('[weather.get(city="San Francisco, CA", days=3, scale=2, metric=True)]', None),  # an integer is a float
        ('[weather.get(city="San Francisco, CA", metric=use_metric)]', None),  # a variable
        ('[weather.get(city="San Francisco, CA", tags=["Wind", "rain"])]', None),
        ('[weather.get(city="San Francisco, CA", place={"lat": 37})]', None),
        ('[weather.get(city="San Francisco, CA", stops=[{"at": "oakland"}])]', None),
        ('[weather.get(city="San Francisco, CA", pair=(1.0, 2.0))]', None),
        ('[weather.get(city="San Francisco, CA", days=1+2)]', None),
        ('[weather.get(city="San Francisco, CA", days=+3)]', "value_error:others"),  # read as -3, as officially
        ("I cannot help.", "ast_decoder:decoder_failed"),
        ("[]", "ast_decoder:decoder_failed"),
        ("[weather.get(city=1), weather.get(city=2)]", "simple_function_checker:wrong_count"),
        ('[get(city="San Francisco, CA")]', "simple_function_checker:wrong_func_name"),
        ("[weather.get(days=3)]", "simple_function_checker:missing_required"),
        ('[weather.get(city="San Francisco, CA", hour=1)]', "simple_function_checker:unexpected_param"),
        ('[weather.get(city="Oakland")]', "value_error:string"),
        ("[weather.get(city=94)]", "type_error:simple"),
        ('[weather.get(city="San Francisco, CA", days="3")]', "type_error:simple"),
        ('[weather.get(city="San Francisco, CA", days=True)]', "type_error:simple"),
        ('[weather.get(city="San Francisco, CA", tags=[1])]', "value_error:list/tuple"),  # "" accepted: no type check
        ('[weather.get(city="San Francisco, CA", tags=["rain", "wind"])]', "value_error:list/tuple"),
        ('[weather.get(city="San Francisco, CA", place={"lon": 37})]', "value_error:dict_key"),
        ('[weather.get(city="San Francisco, CA", place={"lat": 38})]', "value_error:dict_value"),
        ('[weather.get(city="San Francisco, CA", stops=[])]', None),
        ('[weather.get(city="San Francisco, CA", stops=[{"at": "a"}, {}])]', "value_error:list_dict_count"),
    ],
)
def test_a_simple_answer(answer, expected):
    assert error_type(answer) == expected


def test_a_wrong_element_type_and_a_parameter_that_may_not_be_left_out():
    truth = [{"weather.get": {"city": ["Rome"], "tags": [["wind"]]}}]
    assert error_type('[weather.get(city="Rome", tags=[1])]', truth=truth) == "type_error:nested"
    assert error_type('[weather.get(city="Rome")]', truth=truth) == "simple_function_checker:missing_optional"


def test_parallel_calls_come_in_any_order_and_each_answers_one():
    truth = [{"weather.get": {"city": ["Rome"]}}, {"weather.get": {"city": ["Oslo"]}}]
    right, twice = '[weather.get(city="Oslo"), weather.get(city="Rome")]', '[weather.get(city="Rome"), ' * 2
    assert error_type(right, category="parallel", truth=truth) is None
    none = "parallel_function_checker_no_order:cannot_find_match"
    assert error_type(twice.replace("[w", "w") + "]", category="parallel", truth=truth) == none
    one = "parallel_function_checker_no_order:wrong_count"
    assert error_type('[weather.get(city="Oslo")]', category="live_parallel_multiple", truth=truth) == one


def test_multiple_takes_the_described_function_and_an_undescribed_one_is_never_answered():
    other = WEATHER | {"name": "other"}
    truth = [{"weather.get": {"city": ["Rome"]}}]
    assert error_type('weather.get(city="Rome")', category="multiple", functions=[other, WEATHER], truth=truth) is None
    assert error_type("", category="multiple", truth=truth) == "ast_decoder:decoder_failed"
    assert error_type("a(), b()", category="multiple", truth=truth) == "multiple_function_checker:wrong_count"
    fault = check([Call("deck", {})], [WEATHER], [{"deck": {}}], "multiple")
    assert fault is not None
    assert fault.error_type == "simple_function_checker:wrong_func_name"


@pytest.mark.parametrize(
    ("category", "answer", "expected"),
    [
        ("irrelevance", "No function fits.", None),
        ("live_irrelevance", "[]", None),
        ("irrelevance", "[f(a=1)]", "irrelevance_error:decoder_success"),
        ("live_relevance", "[f(a=1)]", None),
        ("live_relevance", "No function fits.", "relevance_error:decoder_failed"),
    ],
)
def test_relevance_asks_only_whether_a_function_is_called(category, answer, expected):
    assert error_type(answer, category=category) == expected


@pytest.mark.parametrize(
    ("answer", "arguments"),
    [
        ("[f(a=[1, (2, 'x')], b={'k': None}, c=...)]", {"a": [1, (2, "x")], "b": {"k": None}, "c": "..."}),
        ("f(a=x, b=g(1), c=g(d=1), e=m[0])", {"a": "x", "b": "g(1)", "c": {"g": {"d": 1}}, "e": "m[0]"}),
        ("f(1, a=-2, b=2 * 3.5, c='a' + 'b', d=2 ** 10)", {"a": -2, "b": 7.0, "c": "ab", "d": 1024}),
        ([{"f": '{"a": 1}'}], {"a": 1}),
        ([{"f": {"a": 1}}], {"a": 1}),
    ],
)
def test_an_answer_becomes_calls(answer, arguments):
    assert decode(answer) == [Call("f", arguments)]


def test_dotted_names_and_tool_call_blocks_are_read():
    assert decode("[a.b.c(x=1), d()]") == [Call("a.b.c", {"x": 1}), Call("d", {})]
    block = '<toolcall> {"name": "a.b", "arguments": {"x": "\\u003c/s>"}} </toolcall>'
    assert decode_tool_calls(f"Sure.\n{block}\n{block}") == [Call("a.b", {"x": "</s>"})] * 2


@pytest.mark.parametrize(
    "answer",
    [
        "none",
        "<toolcall> {} </toolcall>",
        '<toolcall> {"name": "f"}',
        "<toolcall> [ </toolcall>",
        '<toolcall> {"name": "f", "arguments": [1]} </toolcall>',
    ],
)
def test_broken_tool_calls_are_refused(answer):
    with pytest.raises(Undecodable):
        decode_tool_calls(answer)


def source_item(kind: str, category: str, truth: Any, element: str | None = None) -> dict[str, Any]:
    schema = {"type": kind} | ({"items": {"type": element}} if element else {})
    function = {
        "name": "Box.fill",
        "parameters": {"type": "dict", "properties": {"value": schema}, "required": ["value"]},
    }
    return row(category, [function], [{"Box.fill": {"value": [truth]}}])


@pytest.mark.parametrize(
    ("category", "kind", "element", "source", "truth"),
    [
        ("java", "integer", None, "42", 42),
        ("java", "long", None, "42L", 42),
        ("java", "float", None, "1.5f", 1.5),
        ("java", "boolean", None, "true", True),
        ("java", "String", None, '"a b"', "a b"),
        ("java", "any", None, "new Foo(1, 'c')", "new Foo(1, 'c')"),
        ("java", "Array", "integer", "new int[]{1, 2}", [1, 2]),
        ("java", "ArrayList", "String", 'new ArrayList<>(Arrays.asList("a", "b"))', ["a", "b"]),
        ("java", "HashMap", None, "new HashMap<String, Object>()", {}),
        ("javascript", "integer", None, "42", 42),
        ("javascript", "float", None, "1.5", 1.5),
        ("javascript", "Bigint", None, "42n", 42),
        ("javascript", "Boolean", None, "true", True),
        ("javascript", "String", None, "'a b'", "a b"),
        ("javascript", "array", "String", "['a', 'b']", ["a", "b"]),
        ("javascript", "array", "array", "[[1, 2], [3]]", [[1, 2], [3]]),
        ("javascript", "dict", None, '{a: 1, b: "x"}', {"a": [1], "b": ["x"]}),
        ("javascript", "any", None, "someVariable", "someVariable"),
    ],
)
def test_source_text_is_converted_by_its_declared_type(category, kind, element, source, truth):
    item = source_item(kind, category, truth, element)
    assert bfcl.judge(item, bfcl.decode_or_error("bfcl_v2", item, f"[Box.fill(value={source})]")) is None
    wrong = bfcl.judge(item, bfcl.decode_or_error("bfcl_v2", item, "[Box.fill(value=other)]"))
    assert wrong is not None
    not_source = bfcl.judge(item, [Call("Box.fill", {"value": 5})])
    assert not_source is not None
    assert not_source.error_type == ("type_error:java" if category == "java" else "type_error:js")


# The published converters' patterns: ours must read the same from every text that they read in bounded time.
ARRAY_OF_ARRAYS = re.compile(r"\[\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\]|\bnew\s+Array\(\s*\[.*?\]\s*(,\s*\[.*?\]\s*)*\)")


def test_arrays_of_arrays_are_found_as_the_published_pattern_finds_them():
    import itertools

    from hymba_tune.evaluation.bfcl_javascript import _rows

    for start in ("[[", "new Array([", "[ [1],["):
        for rest in itertools.product(["[", "]", ",", "\n", "1", ")"], repeat=5):
            text = start + "".join(rest)
            published = ARRAY_OF_ARRAYS.match(text)
            assert _rows(text) == (published[0] if published else None), text


HOSTILE = {
    "long": "x" * 100_000,
    "over the limit": "[" + "f(a=1)," * 20_000 + "]",
    "brackets": "f(a=" + "[" * 50_000 + "]" * 50_000 + ")",
    "open brackets": "[{(" * 30_000,
    "minus": "f(a=" + "-" * 90_000 + "1)",
    "attributes": "f(a=" + "a." * 45_000 + "b)",
    "sum": "f(a=" + "1+" * 45_000 + "1)",
    "power": "f(a=9**9**9**9)",
    "powers": "f(a=((((9**64)**64)**64)**64)**64)",
    "string product": "f(a='a' * 10**9)",
    "padding": "f(a='%999999999d' % 1)",
    "digits": "f(a=" + "9" * 90_000 + ")",
    "huge integer": f"weather.get(city='x', scale={'9' * 4000})",
    "control characters": "".join(map(chr, range(32))) * 100,
    "surrogate": "f(a='\ud800')",
    "html": "<script>alert(1)</script>",
    "less than": "a<" * 50_000,
    "deep json": '<toolcall> {"name": "f", "arguments": ' + '{"a":' * 20_000,
    "tags": "<toolcall>" * 10_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_scored_in_bounded_time(name):
    began = time.process_time()
    for category in ("simple", "parallel", "live_irrelevance"):
        for task in bfcl.PROTOCOLS:
            verdict = bfcl.score(task, row(category), HOSTILE[name])
            assert verdict.scores == {"accuracy": float(category == "live_irrelevance" and "right" in verdict.why)}
            assert len(verdict.why) < 5_000
    for category in ("java", "javascript"):
        assert bfcl.score("bfcl_v2", source_item("any", category, 1), HOSTILE[name]).scores == {"accuracy": 0.0}
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("category", "kind", "value"),
    [
        ("javascript", "array", "[" + "[1]," * 900 + "5]"),  # the published pattern takes 2^900 steps
        ("javascript", "dict", "{" + "a," * 2_000 + "}"),
        ("java", "HashMap", "new HashMap<>() {" + " " * 4_000),
        ("java", "HashMap", "new HashMap<>() {{" + 'put("",' * 500 + "}}"),
        ("java", "ArrayList", "new ArrayList<>() {{" + "add(" * 900 + "}}"),
    ],
)
def test_hostile_values_are_converted_in_bounded_time(category, kind, value):
    item = source_item(kind, category, 1, "String" if kind in ("array", "ArrayList") else None)
    began = time.process_time()
    assert bfcl.judge(item, [Call("Box.fill", {"value": value})]) is not None
    assert time.process_time() - began < 10


def test_nothing_of_an_answer_is_run(tmp_path):
    touch = f"__import__('pathlib').Path({str(tmp_path / 'run')!r}).touch()"
    for answer in (
        f"[{touch}]",
        f"f(a={touch})",
        f"f(a={touch} + 1)",
        f"f(a=(lambda: {touch})())",
        f"f(a=[{touch}][0])",
    ):
        bfcl.score("bfcl_v2", row(), answer)
    assert list(tmp_path.iterdir()) == []


def test_the_overall_metrics_are_the_leaderboards_means():
    right = {name: [1.0] * (number + 1) + [0.0] for number, name in enumerate(bfcl_questions.CATEGORIES)}
    metrics = bfcl.overall(right)
    share = {name: metrics[name].value for name in bfcl_questions.CATEGORIES}
    simple = (share["simple"] + share["java"] + share["javascript"]) / 3
    rest = ("multiple", "parallel", "parallel_multiple", "irrelevance")
    live = [share[f"live_{name}"] for name in ("simple", "multiple", "parallel", "parallel_multiple", "relevance")]
    assert metrics["hymba"].value == pytest.approx(sum(live) / 5)
    assert metrics["non_live_ast"].value == pytest.approx((simple + sum(share[name] for name in rest)) / 5)
    pooled = [score for name in bfcl_questions.LIVE for score in right[name]]
    assert metrics["live"].value == pytest.approx(sum(pooled) / len(pooled))
    both = [(simple + share["live_simple"]) / 2, *((share[name] + share[f"live_{name}"]) / 2 for name in rest)]
    assert metrics["overall_ast"].value == pytest.approx((sum(both) + share["live_relevance"]) / 6)
    error = metrics["hymba"].stderr
    assert error is not None
    assert 0 < error < 1
    assert "hymba" not in bfcl.overall({"live_simple": [1.0, 0.0]})


class ScriptedEngine:
    """Gives the same answer to every prompt, and keeps the prompts."""

    def __init__(self, answer: str) -> None:
        self.answer, self.prompts = answer, []  # type: ignore[var-annotated]

    def encode_chat(self, messages: Any, tools: Any = None) -> list[int]:
        self.prompts.append((messages, tools))
        return [len(self.prompts)]

    def limit(self, new_tokens: int) -> int:
        return new_tokens

    def generate(self, prompts: Any, *, max_new_tokens: Any, stop: Any = ()) -> list[Answer]:
        assert set(max_new_tokens) == {1000}
        return [Answer(self.answer, 3, "stop", 0) for _ in prompts]


@pytest.mark.parametrize("task", bfcl.PROTOCOLS)
def test_a_run_takes_the_first_items_of_each_category(task, data_dir):
    engine = ScriptedEngine("I cannot do that.")
    scores = bfcl.run_bfcl(task, engine, bfcl_questions.bfcl_rows(data_dir), 2)  # type: ignore[arg-type]
    assert len(scores.items) == 2 * len(bfcl_questions.CATEGORIES)
    assert {name: metric.value for name, metric in scores.metrics.items() if metric.value > 0} == {
        "irrelevance": 1.0, "live_irrelevance": 1.0, "non_live_ast": 0.2, "overall_ast": pytest.approx(1 / 6),
        "live": pytest.approx(1 / 6),
    }  # fmt: skip
    json.dumps(scores.items)
    (system, *_), tools = engine.prompts[0]
    if task == "bfcl_v2":
        assert tools is None
        assert system["content"].startswith("\nYou are an expert in composing functions.")
        assert "'type': 'dict'" in system["content"]
        assert "Note that the provided function is in Python 3 syntax." in system["content"]
    else:
        assert system["role"] == "user"
        assert tools[0]["parameters"]["type"] == "object"


def test_java_parameters_are_asked_for_as_source_text():
    function = {
        "name": "f",
        "description": "Does.",
        "parameters": {
            "type": "dict",
            "properties": {
                "a": {"type": "any", "description": "A."},
                "b": {"type": "ArrayList", "items": {"type": "String"}, "description": "B."},
            },
        },
    }
    described = bfcl_questions.describe_function(function, "java")
    assert described["description"] == "Does. Note that the provided function is in Java 8 SDK syntax."
    a, b = described["parameters"]["properties"].values()
    assert a == {
        "type": "string",
        "description": "A. This parameter can be of any type of Java object in string representation.",
    }
    assert b == {
        "type": "string",
        "description": "B. This is Java ArrayList type parameter in string representation. The list elements are of "
        "type String; they are not in string representation.",
    }
    assert function["parameters"]["properties"]["a"]["type"] == "any"  # type: ignore[index]


def write_category(folder: Path, question: dict[str, Any], answer: dict[str, Any]) -> None:
    (folder / "possible_answer").mkdir()
    (folder / "BFCL_v2_simple.json").write_text(json.dumps(question))
    (folder / "possible_answer" / "BFCL_v2_simple.json").write_text(json.dumps(answer))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"question": "Weather?"}, "question is not a list of messages"),
        ({"function": {}}, "function is not a list"),
        ({"function": [{"name": "f"}]}, "no 'parameters'"),
        ({"function": [{"name": "f", "parameters": {"properties": {"a": {"type": "widget"}}}}]}, "unknown type"),
        ({"id": "simple_1"}, "no ground_truth"),
    ],
)
def test_a_broken_item_is_refused_with_its_file_and_name(tmp_path, change, complaint):
    item = row()
    write_category(tmp_path, {**item, **change}, {"id": "simple_0", "ground_truth": item["ground_truth"]})
    with pytest.raises(UserError, match=complaint) as error:
        bfcl_questions.read_category(tmp_path, "simple")
    assert "BFCL_v2_simple.json" in str(error.value)


def test_missing_files_say_where_to_get_them(tmp_path):
    with pytest.raises(BenchmarkNotFound, match="gorilla"):
        bfcl_questions.bfcl_rows(tmp_path)
