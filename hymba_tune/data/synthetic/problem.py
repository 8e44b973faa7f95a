"""What an embedded problem is, and the split that keeps held-out problems out of everything that is trained on.

A problem's *keys* are its content without its wording: the chain of equations, the expression to write, the call with
its arguments. One problem in HELD_OUT_EVERY is held out, by a hash of its key: training takes only problems none of
whose keys is held out, evaluation only problems whose scored key is. Both sides draw from the same generators, so they
are equally hard, and no item can be answered by remembering it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

Key = tuple[Any, ...]
Message = dict[str, Any]
Scorer = Literal["number", "code", "calls", "constraints", "preference", "rouge"]

HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One conversation and how its scored reply is judged.

    key: what the scored reply answers, the wording left out (of two calls, the first).
    other_keys: the same of everything else that is answered in the conversation.
    prompt: the messages before the scored reply; reply: that assistant message; rest: what follows it.
    scorer: `number` compares what follows `####` with target, `code` the syntax tree of the reply's code with that of
        target (a source text), `calls` the reply's calls with target (a list of {"name", "arguments"}), order and all;
        `constraints` checks each of target's constraints (see constraints.py), `preference` whether the reply is as
        target says (see manners.py), `rouge` compares with each of target's texts.
    rejected: of a preference pair, the reply that is not preferred.
    """

    key: Key
    prompt: list[Message]
    reply: Message
    target: Any
    scorer: Scorer
    rest: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    other_keys: tuple[Key, ...] = ()
    rejected: Message | None = None

    def is_for_evaluation(self) -> bool:
        return is_held_out(self.key)

    def is_for_training(self) -> bool:
        return not any(is_held_out(key) for key in (self.key, *self.other_keys))

    def conversation(self) -> dict[str, Any]:
        """As the data mix takes it: {"messages", "tools"?}, or {"prompt", "chosen", "rejected", "tools"?}."""
        conversation: dict[str, Any] = {"messages": [*self.prompt, self.reply, *self.rest]}
        if self.rejected is not None:
            conversation = {"prompt": self.prompt, "chosen": [self.reply], "rejected": [self.rejected]}
        return {**conversation, "tools": self.tools} if self.tools else conversation


def is_held_out(key: Key) -> bool:
    """Whether a problem with this key may only be evaluated; the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0
