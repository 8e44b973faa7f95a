"""BFCL v2's questions: the published files as rows, and the two ways to ask them.

The categories, the prompt and its hints are those of gorilla at 3f5ace7d (2024-09-15, the last commit before BFCL v3).
"""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound, data_folder, read_jsonl
from hymba_tune.errors import UserError
from hymba_tune.evaluation import bfcl_ast

NON_LIVE = ("simple", "java", "javascript", "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = (
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
CATEGORIES = (*NON_LIVE, *LIVE)
LANGUAGES = {"java": "Java", "javascript": "JavaScript"}
ORIGIN = "github.com/ShishirPatil/gorilla at 3f5ace7d, folder berkeley-function-call-leaderboard/data"

# Data of the protocol (Apache-2.0), character for character: the model's answer depends on every blank.
SYSTEM_PROMPT = """
You are an expert in composing functions. You are given a question and a set of possible functions.\x20
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\x20
If none of the function can be used, point it out. If the given question lacks the parameters required by the function,
also point it out. You should only return the function call in tools call sections.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]

You SHOULD NOT include any other text in the response.

Here is a list of functions in JSON format that you can invoke.

{functions}

"""
_SYNTAX_HINTS = {
    "Python": " Note that the provided function is in Python 3 syntax.",
    "Java": " Note that the provided function is in Java 8 SDK syntax.",
    "JavaScript": " Note that the provided function is in JavaScript syntax.",
}
_JSON_TYPES = {
    **dict.fromkeys(("integer", "byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool", "Boolean"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "Array", "ArrayList"), "array"),
    **dict.fromkeys(("dict", "object", "HashMap"), "object"),
}

Row = dict[str, Any]


def language(category: str) -> str:
    """The language that a category's answers are written in."""
    return LANGUAGES.get(category, "Python")


def bfcl_rows(data: str | Path | None) -> list[Row]:
    """All questions of CATEGORIES in order: id, category, question (messages), function (descriptions), ground_truth.

    Raises BenchmarkNotFound without the files or without the Java and JavaScript parsers, UserError for a broken item.
    """
    if importlib.util.find_spec("tree_sitter") is None:
        raise BenchmarkNotFound('bfcl_v2: tree-sitter is not installed: pip install "hymba-tune[eval]"')
    folder = data_folder(data)
    if folder is None or not (folder / "bfcl_v2").is_dir():
        raise BenchmarkNotFound(
            f"bfcl_v2: no folder bfcl_v2 with BFCL_v2_*.json and possible_answer/; get them from {ORIGIN} and name the "
            "folder around bfcl_v2 in eval.data"
        )
    return [row for category in CATEGORIES for row in read_category(folder / "bfcl_v2", category)]


def read_category(folder: Path, category: str) -> list[Row]:
    """One category's questions with the expected calls of each (none for relevance and irrelevance)."""
    path = folder / f"BFCL_v2_{category}.json"
    answers = folder / "possible_answer" / path.name
    for needed in (path, *([] if "relevance" in category else [answers])):
        if not needed.is_file():
            raise BenchmarkNotFound(f"bfcl_v2: {needed} is missing; get it from {ORIGIN}")
    expected = (
        {} if "relevance" in category else {row.get("id"): row.get("ground_truth") for row in read_jsonl(answers)}
    )
    rows = [row | {"category": category, "ground_truth": expected.get(row.get("id"))} for row in read_jsonl(path)]
    for row in rows:
        fault = _item_fault(row)
        if fault:
            raise UserError(f"{path}: item {row.get('id')!r}: {fault}; get the file again from {ORIGIN}")
    return rows


def _item_fault(row: Row) -> str | None:
    """What keeps an item from being asked and scored."""
    if not isinstance(row.get("question"), list) or not all(isinstance(turn, dict) for turn in row["question"]):
        return "question is not a list of messages"
    if not isinstance(row.get("function"), list):
        return "function is not a list of descriptions"
    if "relevance" in row["category"]:
        return None
    if not row["ground_truth"]:
        return "no ground_truth in possible_answer/"
    written_in = language(row["category"])
    try:
        for function in row["function"]:
            for schema in function["parameters"]["properties"].values():
                kinds = [schema["type"]]
                if schema["type"] in bfcl_ast.LISTS[written_in]:
                    kinds.append(schema["items"]["type"])
                if not bfcl_ast.TYPES[written_in].keys() >= set(kinds):
                    return f"{function['name']}: unknown type in {kinds}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"a function's description has no {error}"
    return None


def prompt_messages(row: Row) -> list[dict[str, Any]]:
    """The leaderboard's prompt: its system prompt with the functions, before a system message of the question."""
    functions = [describe_function(function, row["category"]) for function in row["function"]]
    system = SYSTEM_PROMPT.format(functions=functions)
    turns = row["question"]
    if turns and turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "system", "content": system}, *turns]


def describe_function(function: dict[str, Any], category: str) -> dict[str, Any]:
    """The description with the leaderboard's hints; Java and JavaScript parameters are asked for as source text."""
    written_in = language(category)
    function = copy.deepcopy(function)
    function["description"] = function.get("description", "") + _SYNTAX_HINTS[written_in]
    if written_in != "Python":
        for schema in function["parameters"]["properties"].values():
            _as_source_text(schema, written_in)
    return function


def _as_source_text(schema: dict[str, Any], written_in: str) -> None:
    kind, hint = schema["type"], f" This is {written_in} {schema['type']} type parameter in string representation."
    if kind == "any":
        hint = f" This parameter can be of any type of {written_in} object in string representation."
    if kind in bfcl_ast.LISTS[written_in]:
        element = schema.pop("items")["type"]
        hint += f" The list elements are of type {element}; they are not in string representation."
    if kind == "dict" and "properties" in schema:
        entries = json.dumps(schema.pop("properties"))
        hint += f" The dictionary entries have the following schema; they are not in string representation. {entries}"
    schema["description"] = schema.get("description", "") + hint
    schema["type"] = "string"


def tool_schemas(row: Row) -> list[dict[str, Any]]:
    """The functions as JSON schemas for the chat template's `tools`."""
    return [_json_schema(describe_function(function, row["category"])) for function in row["function"]]


def _json_schema(value: Any) -> Any:
    """The same value with BFCL's type names replaced by JSON schema's."""
    if isinstance(value, list):
        return [_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema = {key: _json_schema(item) for key, item in value.items()}
    if isinstance(value.get("type"), str):
        schema["type"] = _JSON_TYPES.get(value["type"], "string")
    return schema
