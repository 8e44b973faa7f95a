"""The embedded data: what --tiny trains on and is scored on. Made by code, the same for the same seed on every machine.

    problem.py        a problem, its key, and the split by keys that keeps evaluation apart from training
    word_problems.py  tiny_math    functions.py  tiny_code    calls.py  tiny_calls
    constraints.py  tiny_constraints    manners.py  tiny_chat, tiny_preferences    roles.py  tiny_roles
    questions.py  what the last three ask
    documents.py      plain text for pretraining the embedded base: the same world, no chat, no answers
    words.py          the world's words

A generator gives training conversations (tiny_preferences: pairs); `held_out` gives evaluation items, none of which any
generator can draw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from hymba_tune.data.synthetic import calls, constraints, functions, manners, roles, word_problems
from hymba_tune.data.synthetic.documents import raw_document
from hymba_tune.data.synthetic.problem import Problem
from hymba_tune.errors import UserError

__all__ = ["DOCUMENT_GENERATORS", "GENERATORS", "OF_PAIRS", "conversations", "held_out", "raw_document"]

T = TypeVar("T")

_DRAWERS: dict[str, Callable[[random.Random], Problem]] = {
    "tiny_math": word_problems.draw,
    "tiny_code": functions.draw,
    "tiny_calls": calls.draw,
    "tiny_constraints": constraints.draw,
    "tiny_chat": manners.draw_chat,
    "tiny_preferences": manners.draw_pair,
    "tiny_roles": roles.draw,
}


def _training_generator(draw: Callable[[random.Random], Problem]) -> Callable[[random.Random], dict[str, Any]]:
    def generate(rng: random.Random) -> dict[str, Any]:
        problem = draw(rng)
        while not problem.is_for_training():
            problem = draw(rng)
        return problem.conversation()

    return generate


GENERATORS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    name: _training_generator(draw) for name, draw in _DRAWERS.items()
}
"""name -> a function that draws one training conversation: {"messages", "tools"?}, or pair."""

OF_PAIRS = ("tiny_preferences",)
"""Those of GENERATORS that draw preference pairs."""

DOCUMENT_GENERATORS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "tiny_documents": lambda rng: {"text": raw_document(rng)}
}
"""name -> a function that draws one document to pretrain on: {"text"}."""


def conversations(name: str, n: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """n training conversations, or documents, of a generator.

    Raises UserError for an unknown name.
    """
    generate = _named({**GENERATORS, **DOCUMENT_GENERATORS}, name)
    rng = random.Random(f"{name}/{seed}")
    return (generate(rng) for _ in range(n))


def held_out(name: str, n: int) -> list[dict[str, Any]]:
    """The first n evaluation items: {"id", "messages" (the prompt), "tools"?, "target", "scorer"}, no prompt twice.

    They are always the same; no training conversation shares a key with them. Scorers: see problem.Problem.

    Raises UserError for an unknown name.
    """
    draw = _named(_DRAWERS, name)
    rng = random.Random(f"{name}/held out")
    items: dict[str, dict[str, Any]] = {}
    while len(items) < n:
        problem = draw(rng)
        if problem.is_for_evaluation():
            prompt = json.dumps([problem.prompt, problem.tools])
            items.setdefault(prompt, _item(f"{name}-{len(items):04}", problem))
    return list(items.values())


def _item(identifier: str, problem: Problem) -> dict[str, Any]:
    item = {"id": identifier, "messages": problem.prompt, "target": problem.target, "scorer": problem.scorer}
    return {**item, "tools": problem.tools} if problem.tools else item


def _named(table: Mapping[str, T], name: str) -> T:
    if name not in table:
        raise UserError(f"generator: {name!r} is not one; use {', '.join(table)}")
    return table[name]
