"""A source's row -> a conversation: one small function a format, and a user's own columns by a field mapping.

A conversation is {"messages": [{"role", "content", "tool_calls"?}], "tools"?}. Roles are system, user, assistant and
tool; a tool call is {"name", "arguments": dict}; a tool is the JSON schema of one function, without OpenAI's wrapper.
Every function raises BadRow for a row that does not make a conversation worth training on; whoever read the row knows
the file and the line.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Conversation = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


class BadRow(ValueError):
    """What is wrong with a row, without its place."""


def messages(row: Row) -> Conversation:
    """`messages` with role and content, `tools`; OpenAI's form of tools, tool calls and text parts is read too."""
    return conversation(field(row, "messages"), row.get("tools"))


def single_turn(row: Row) -> Conversation:
    """`user` and `assistant`, `system` and `tools` where they exist: what a mapping of other columns usually makes."""
    turns = [{"role": role, "content": _plain(field(row, role))} for role in ("user", "assistant")]
    return conversation([*system_turn(row), *turns], row.get("tools"))


def alpaca(row: Row) -> Conversation:
    """`instruction`, `input` (may be empty), `output` or `response`, `system` where it exists."""
    reply = row["response"] if "response" in row else field(row, "output")
    return single_turn({"system": row.get("system"), "user": instruction(row), "assistant": reply})


def sharegpt(row: Row) -> Conversation:
    """`conversations` with from and value; function_call and observation turns; `system` and `tools` columns."""
    turns = list_of_dicts(field(row, "conversations"), "conversations")
    return conversation([*system_turn(row), *sharegpt_turns(turns)], row.get("tools"))


def xlam(row: Row) -> Conversation:
    """Salesforce/xlam-function-calling-60k: `query`, `tools` and `answers` (JSON texts); the reply is the calls."""
    calls = _as_list(_json(field(row, "answers"), "answers"))
    turns = [{"role": "user", "content": field(row, "query")}, {"role": "assistant", "tool_calls": calls}]
    return conversation(turns, row.get("tools"))


def hermes(row: Row) -> Conversation:
    """NousResearch/hermes-function-calling-v1: sharegpt with tools and calls written in tags inside the text.

    The system text that explains the tags goes when there are tools, since our template shows them itself.
    """
    tools = row.get("tools")
    turns: list[Row] = []
    for turn in list_of_dicts(field(row, "conversations"), "conversations"):
        text = str(turn.get("value") or "")
        if turn.get("from") == "system" and "<tools>" in text:
            tools = tools or "".join(_tagged(text, "tools")[-1:])
        elif turn.get("from") == "gpt" and "<tool_call>" in text:
            calls = [_loose_json(call) for call in _tagged(text, "tool_call")]
            rest = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL)
            turns.append({"role": "assistant", "content": rest, "tool_calls": calls})
        else:
            value = "\n".join(part.strip() for part in _tagged(text, "tool_response")) or text
            turns.append({"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": value})
    return conversation(turns, _loose_json(tools) if isinstance(tools, str) and tools else tools)


def nemotron(row: Row) -> Conversation:
    """nvidia/Nemotron-Post-Training-Dataset-v1: `messages` with tool calls, tools in the JSON of `metadata`.

    `<think>` parts are left out (Hymba does not reason aloud); a prompt that was withheld, given as `-`, is a bad row.
    """
    metadata = _json(row.get("metadata") or "{}", "metadata")
    turns: list[Row] = []
    for message in list_of_dicts(field(row, "messages"), "messages"):
        text = message.get("content") or ""
        if message.get("role") == "user" and text.strip() in ("", "-"):
            raise BadRow("the user's message was withheld by the publisher")
        if message.get("role") == "assistant":
            text = re.sub(r"^.*</think>", "", text, flags=re.DOTALL)
        if text.strip() or message.get("role") != "system":
            turns.append({**message, "content": text})
    return conversation(turns, metadata.get("tools") if isinstance(metadata, dict) else None)


FORMATS: dict[str, Callable[[Row], Conversation]] = {
    function.__name__: function for function in (messages, single_turn, alpaca, sharegpt, xlam, hermes, nemotron)
}


def instruction(row: Row) -> str:
    """`instruction` and, after a blank line, `input` if there is any."""
    return "\n\n".join(part for part in (field(row, "instruction"), row.get("input")) if part)


def sharegpt_turns(turns: Iterable[Row]) -> list[Row]:
    """Messages of turns with from and value, not checked any further."""
    messages: list[Row] = []
    for number, turn in enumerate(turns, start=1):
        speaker, value = turn.get("from"), turn.get("value")
        role = SHAREGPT_ROLES.get(str(speaker).lower())
        if role is None:
            raise BadRow(f"message {number}: unknown speaker {speaker!r}; known are {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            messages.append({"role": role, "tool_calls": _as_list(_json(value, f"message {number}: function_call"))})
        else:
            messages.append({"role": role, "content": value})
    return messages


def mapped(row: Row, mapping: dict[str, str]) -> Row:
    """The row with new columns: `question` takes that column as it is, `{title}: {items[0]}` makes a text of some."""
    return {**row, **{name: _filled(row, source) for name, source in mapping.items()}}


def conversation(turns: Iterable[Row], tools: Any = None) -> Conversation:
    """The one form that every format ends in; raises BadRow for a turn it can't take or a lack of replies."""
    result = [_message(turn, number) for number, turn in enumerate(list_of_dicts(turns, "messages"), start=1)]
    roles = [message["role"] for message in result]
    if "assistant" not in roles:
        raise BadRow(f"there is no assistant turn to learn from (turns: {', '.join(roles) or 'none'})")
    if roles != sorted(roles, key=lambda role: role != "system"):
        raise BadRow("a system message comes after other turns; it must come first")
    parsed = _tools(tools)
    return {"messages": result, "tools": parsed} if parsed else {"messages": result}


def _message(turn: Row, number: int) -> Row:
    role = turn.get("role")
    if role not in ROLES:
        raise BadRow(f"message {number}: unknown role {role!r}; use {', '.join(ROLES)}")
    content = _text(turn.get("content"), role, number)
    calls = [_tool_call(call, number) for call in turn.get("tool_calls") or []]
    if calls and role != "assistant":
        raise BadRow(f"message {number}: tool_calls in a {role} turn; only the assistant calls tools")
    if role == "assistant" and not calls and not (content or "").strip():
        raise BadRow(f"message {number}: the assistant says nothing")
    if content is None and role != "assistant":
        raise BadRow(f"message {number}: the {role} turn has no content")
    return {"role": role, "content": content, "tool_calls": calls} if calls else {"role": role, "content": content}


def _text(content: Any, role: str, number: int) -> str | None:
    """Text, OpenAI's list of text parts, or, from a tool, any JSON value."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise BadRow(f"message {number}: content is {type(content).__name__}, not text")


def _tool_call(call: Any, number: int) -> Row:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRow(f"message {number}: tool call without a name: {_shown(call)}")
    arguments = inner.get("arguments")
    arguments = _json(arguments, f"message {number}: arguments of {inner['name']}") if arguments else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"message {number}: arguments of {inner['name']} are not a JSON object: {_shown(arguments)}")
    return {"name": inner["name"], "arguments": arguments}


def _tools(tools: Any) -> list[Row]:
    parsed = _json(tools, "tools") if isinstance(tools, str) and tools.strip() else tools or []
    return [tool.get("function", tool) for tool in list_of_dicts(parsed or [], "tools")]


def system_turn(row: Row) -> list[Row]:
    """The `system` column as a message, nothing where there is none."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def field(row: Row, name: str) -> Any:
    """A column that must be there; raises BadRow."""
    if row.get(name) is None:
        raise BadRow(f"no column {name!r} (columns: {', '.join(row)})")
    return row[name]


def _filled(row: Row, source: str) -> Any:
    if source in row:
        return row[source]
    try:
        if "{" in source:
            return source.format_map(row)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise BadRow(f"map: {source!r} does not fit (columns: {', '.join(row)}): {error!r}") from None
    raise BadRow(f"map: no column {source!r} (columns: {', '.join(row)})")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def list_of_dicts(value: Any, name: str) -> list[Row]:
    """A column that must be a list of objects; raises BadRow."""
    value = list(value) if isinstance(value, list | tuple) else None
    if value is None or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"{name} is not a list of objects")
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _json(value: Any, name: str) -> Any:
    """A JSON text's value; what is no text is a value already."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"{name}: not JSON ({error.msg}, character {error.pos}): {_shown(value)}") from None


def _loose_json(text: str) -> Any:
    """JSON, or the Python literal that some published rows hold in its place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise BadRow(f"neither JSON nor a Python literal: {_shown(text)}") from None


def _tagged(text: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
