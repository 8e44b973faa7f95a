"""Every source format makes the one form of a conversation, or says what is wrong with a row."""

import json

import pytest

from hymba_tune.data.formats import FORMATS, BadRow, conversation, mapped

TOOL = {"name": "f", "description": "F", "parameters": {}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"name": "f", "arguments": {"a": 1}}
USER = {"role": "user", "content": "Q"}
REPLY = {"role": "assistant", "content": "A"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"b": 2}'}

ROWS: dict[str, list[tuple]] = {
    "messages": [
        ({"messages": [USER, REPLY], "tools": None}, [USER, REPLY], None),
        ({"messages": [USER, CALLED, RESULT, REPLY], "tools": [TOOL]}, [USER, CALLED, RESULT, REPLY], [TOOL]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                        ],
                    },
                    {"role": "tool", "content": {"b": 2}, "tool_call_id": "1"},
                ],
                "tools": json.dumps([WRAPPED]),
            },
            [USER, CALLED, RESULT],
            [TOOL],
        ),
    ],
    "single_turn": [
        ({"user": "Q", "assistant": "A"}, [USER, REPLY], None),
        (
            {"system": "S", "user": "Q", "assistant": 5},
            [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "5"}],
            None,
        ),
    ],
    "alpaca": [
        ({"instruction": "Q", "input": "", "output": "A"}, [USER, REPLY], None),
        ({"instruction": "Q", "input": "x", "response": "A"}, [{"role": "user", "content": "Q\n\nx"}, REPLY], None),
    ],
    "sharegpt": [
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": '{"b": 2}'},
                    {"from": "gpt", "value": "A"},
                ],
                "tools": json.dumps([TOOL]),
            },
            [USER, CALLED, RESULT, REPLY],
            [TOOL],
        ),
        (
            {"conversations": [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}], "system": "S"},
            [{"role": "system", "content": "S"}, USER, REPLY],
            None,
        ),
    ],
    "xlam": [
        (
            {"query": "Q", "tools": json.dumps([TOOL]), "answers": json.dumps([CALL, CALL])},
            [USER, {**CALLED, "tool_calls": [CALL, CALL]}],
            [TOOL],
        ),
    ],
    "hermes": [
        (
            {
                "conversations": [
                    {
                        "from": "system",
                        "value": f"Signatures in <tools></tools>: <tools> {[WRAPPED]} </tools> Use <tool_call>",
                    },
                    {"from": "human", "value": "Q"},
                    {
                        "from": "gpt",
                        "value": f"Sure.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{json.dumps(CALL)}</tool_call>",
                    },
                    {"from": "tool", "value": '<tool_response>\n{"b": 2}\n</tool_response>'},
                    {"from": "gpt", "value": "A"},
                ],
            },
            [USER, {"role": "assistant", "content": "Sure.\n\n", "tool_calls": [CALL, CALL]}, RESULT, REPLY],
            [TOOL],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Write JSON."},
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            [{"role": "system", "content": "Write JSON."}, USER, REPLY],
            None,
        ),
    ],
    "nemotron": [
        (
            {
                "messages": [
                    {"role": "system", "content": "", "tool_calls": []},
                    {"role": "user", "content": "Q", "tool_calls": []},
                    {"role": "assistant", "content": "<think>\nhm\n</think>\nA", "tool_calls": []},
                ],
                "metadata": json.dumps({"tools": [WRAPPED]}),
            },
            [USER, {"role": "assistant", "content": "\nA"}],
            [TOOL],
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "row", "expected", "tools"),
    [(name, *case) for name, cases in ROWS.items() for case in cases],
)
def test_each_format_makes_the_one_form(name, row, expected, tools):
    made = FORMATS[name](row)
    assert made == ({"messages": expected, "tools": tools} if tools else {"messages": expected})
    assert json.loads(json.dumps(made)) == made


def test_every_format_has_a_case():
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER], r"there is no assistant turn to learn from \(turns: user\)"),
        ([], r"there is no assistant turn to learn from \(turns: none\)"),
        ([USER, {"role": "bot", "content": "A"}], "message 2: unknown role 'bot'; use system, user, assistant, tool"),
        ([USER, {"role": "assistant", "content": " \n"}], "message 2: the assistant says nothing"),
        ([{"role": "user", "content": None}, REPLY], "message 1: the user turn has no content"),
        ([USER, {"role": "assistant", "content": 3}], "message 2: content is int, not text"),
        ([USER, REPLY, {"role": "system", "content": "S"}], "a system message comes after other turns"),
        ([{**USER, "tool_calls": [CALL]}, REPLY], "message 1: tool_calls in a user turn"),
        ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "message 2: tool call without a name"),
        ([USER, {"role": "assistant", "tool_calls": ["f(1)"]}], "message 2: tool call without a name"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a: 1"}]}],
            r"message 2: arguments of f: not JSON \(Expecting property name.*character 1\): {a: 1",
        ),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "f are not a JSON object"),
        (["Q", "A"], "messages is not a list of objects"),
        ("text", "messages is not a list of objects"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(turns, message):
    with pytest.raises(BadRow, match=message):
        conversation(turns)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("messages", {"text": "x"}, r"no column 'messages' \(columns: text\)"),
        ("messages", {"messages": [USER, REPLY], "tools": "[{]"}, "tools: not JSON"),
        ("messages", {"messages": [USER, REPLY], "tools": ["f"]}, "tools is not a list of objects"),
        ("alpaca", {"instruction": "Q"}, "no column 'output'"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "x"}]}, "message 1: unknown speaker 'narrator'"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(1)"}]}, "function_call: not JSON"),
        ("xlam", {"query": "Q", "answers": "[]"}, "message 2: the assistant says nothing"),
        ("hermes", {"conversations": [{"from": "gpt", "value": "<tool_call>f(1)</tool_call>"}]}, "neither JSON nor"),
        ("nemotron", {"messages": [{"role": "user", "content": "-"}, REPLY]}, "withheld by the publisher"),
    ],
)
def test_formats_name_the_column_or_turn(name, row, message):
    with pytest.raises(BadRow, match=message):
        FORMATS[name](row)


def test_a_mapping_takes_columns_and_fills_texts():
    row = {"question": "Q", "answers": ["A", "B"], "role": "a pirate", "n": 3}
    mapping = {"system": "You are {role}.", "user": "question", "assistant": "{answers[0]} {n}"}
    made = FORMATS["single_turn"](mapped(row, mapping))
    assert [message["content"] for message in made["messages"]] == ["You are a pirate.", "Q", "A 3"]
    assert mapped({"dialog": [USER, REPLY]}, {"messages": "dialog"})["messages"] == [USER, REPLY]


@pytest.mark.parametrize("source", ["nothing", "{nothing}", "{answers[9]}", "{answers", "{question.x}"])
def test_a_mapping_that_does_not_fit_names_the_columns(source):
    with pytest.raises(BadRow, match=r"map: .*\(columns: question, answers\)"):
        mapped({"question": "Q", "answers": ["A"]}, {"user": source})
