"""A source's row -> a preference pair: a prompt, the reply that is preferred and the one that is not.

A pair is {"prompt": messages, "chosen": messages, "rejected": messages, "tools"?}. The prompt may hold a system text,
several turns, tool calls and their results; it ends with what is answered. A reply is one assistant message (with tool
calls or not), since everything in it is scored. Formats raise BadRow for a row that makes no pair, and NoPreference for
one that prefers neither reply: that is a property of the data, counted and left out, not an error.
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from hymba_tune.data.formats import (
    BadRow,
    Row,
    conversation,
    field,
    instruction,
    list_of_dicts,
    sharegpt_turns,
    system_turn,
)

Pair = dict[str, Any]
Turns = list[Row]


class NoPreference(ValueError):
    """Why a row prefers neither of its replies, without its place."""


def preference(row: Row) -> Pair:
    """`chosen` and `rejected` as replies to `prompt`, or as whole conversations that begin alike; `system`, `tools`.

    A prompt or reply is a text, a message or a list of messages.
    """
    chosen, rejected = (_turns(field(row, side), "assistant", side) for side in ("chosen", "rejected"))
    if chosen and chosen[0].get("role") != "assistant":
        return _split(chosen, rejected, row)
    return pair([*system_turn(row), *_turns(field(row, "prompt"), "user", "prompt")], chosen, rejected, row)


def sharegpt_preference(row: Row) -> Pair:
    """`conversations` (the prompt), `chosen` and `rejected`, as turns with from and value; `system` and `tools`."""
    prompt = sharegpt_turns(list_of_dicts(field(row, "conversations"), "conversations"))
    chosen, rejected = (sharegpt_turns(list_of_dicts([field(row, side)], side)) for side in ("chosen", "rejected"))
    return pair([*system_turn(row), *prompt], chosen, rejected, row)


def hh_rlhf(row: Row) -> Pair:
    """Anthropic/hh-rlhf: two dialogues as texts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, which begin alike."""
    chosen, rejected = (_dialogue(field(row, side), side) for side in ("chosen", "rejected"))
    return _split(chosen, rejected, row)


def pandalm(row: Row) -> Pair:
    """PandaLM: `instruction`, `input`, `response1`, `response2`; most of annotator1 to 3 choose (0 is a tie)."""
    labels = [field(row, f"annotator{number}") for number in (1, 2, 3)]
    label, votes = Counter(labels).most_common(1)[0]
    if not set(labels) <= {0, 1, 2}:
        raise BadRow(f"the annotators' labels are {labels}, not 0, 1 or 2")
    if votes == 1 or label == 0:
        raise NoPreference(f"the annotators' labels are {labels}")
    replies = {number: str(field(row, f"response{number}")) for number in (1, 2)}
    return preference({"prompt": instruction(row), "chosen": replies[label], "rejected": replies[3 - label]})


def helpsteer2(row: Row) -> Pair:
    """nvidia/HelpSteer2: two rows with the same `prompt`; the `response` with more `helpfulness` is chosen.

    Turns of a prompt are separated by `<extra_id_1>User` and `<extra_id_1>Assistant` lines.
    """
    first, second = row["rows"]
    if field(first, "prompt") != field(second, "prompt"):
        raise BadRow("this row and the next have different prompts; the format takes rows in pairs")
    worse, better = sorted((first, second), key=lambda rated: field(rated, "helpfulness"))
    if first["helpfulness"] == second["helpfulness"]:
        raise NoPreference(f"both responses have helpfulness {first['helpfulness']}")
    _, *parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", f"<extra_id_1>User\n{first['prompt']}")
    prompt = [{"role": role.lower(), "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]
    return preference({"prompt": prompt, "chosen": field(better, "response"), "rejected": field(worse, "response")})


PREFERENCES: dict[str, Callable[[Row], Pair]] = {
    function.__name__: function for function in (preference, sharegpt_preference, hh_rlhf, pandalm, helpsteer2)
}

ROWS_TOGETHER = {"helpsteer2": 2}
"""Formats that make one pair of so many consecutive rows, given to them as {"rows": [...]}."""


def pair(prompt: Turns, chosen: Turns, rejected: Turns, row: Row) -> Pair:
    """The one form that every format ends in, with the row's `tools`.

    Raises BadRow for turns it can't take, NoPreference for replies that are the same.
    """
    last = prompt[-1].get("role") if prompt else "nothing"
    if last not in ("user", "tool"):
        raise BadRow(f"the prompt ends with {last}; it must end with the user's or tool's turn that is answered")
    better, worse = _answered(prompt, chosen, row, "chosen"), _answered(prompt, rejected, row, "rejected")
    if better == worse:
        raise NoPreference("both replies are the same")
    *context, preferred = better.pop("messages")
    return {"prompt": context, "chosen": [preferred], "rejected": worse["messages"][-1:], **better}


def _answered(prompt: Turns, reply: Turns, row: Row, side: str) -> Row:
    """The conversation that a prompt and one reply make."""
    roles = [turn.get("role") for turn in reply]
    if roles != ["assistant"]:
        raise BadRow(
            f"{side}: a reply is one assistant message, not {', '.join(map(str, roles)) or 'nothing'}; "
            "what comes before it belongs in the prompt, the same for both"
        )
    try:
        return conversation([*prompt, *reply], row.get("tools"))
    except BadRow as error:
        raise BadRow(f"{side}: {error}") from None


def _split(chosen: Turns, rejected: Turns, row: Row) -> Pair:
    """Two whole conversations: what they share at the beginning is the prompt."""
    if chosen == rejected:
        raise NoPreference("both conversations are the same")
    alike = sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False)))
    return pair([*system_turn(row), *chosen[:alike]], chosen[alike:], rejected[alike:], row)


def _turns(value: Any, role: str, name: str) -> Turns:
    """A text as one turn of a role; a message or messages as they are."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list_of_dicts([value] if isinstance(value, dict) else value, name)


def _dialogue(text: Any, name: str) -> Turns:
    before, *parts = re.split(r"\n\n(Human|Assistant):", text) if isinstance(text, str) else ["?"]
    if before or not parts:
        raise BadRow(f"{name} is no dialogue that begins with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
