"""Small questions with one right answer, in the wording that tiny_chat, tiny_preferences and tiny_roles share.

A question is about a fact told a moment ago (among others), about what a function returned, or asks for help with a
theft. Key: the fact, the call, or the theft, whatever the words around it, so that what is held out of one generator is
held out of all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hymba_tune.data.synthetic import words
from hymba_tune.data.synthetic.calls import FUNCTIONS, Function, draw_call
from hymba_tune.data.synthetic.problem import Key, Message

DISTRACTION_SHARE = 0.5
EARLIER_TURN_SHARE = 0.2
LARGEST_COUNT = 60


@dataclass(frozen=True, slots=True)
class Question:
    """prompt: the messages up to the question. right: the sentence that answers it; wrong: one that does not.

    harmful: the request is answered by declining it (right), not by what it asks for (wrong).
    other_keys: the other facts that the conversation tells.
    """

    key: Key
    prompt: list[Message]
    right: str
    wrong: str
    tools: tuple[dict[str, object], ...] = ()
    harmful: bool = False
    other_keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """told: a fact; asked: questions about `value`, one of its words; answer: the sentence that gives it."""

    told: str
    asked: tuple[str, ...]
    answer: str
    value: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A kind with its words filled in, and another word for `value` that is not true."""

    kind: Kind
    words: dict[str, str]
    other: str

    def key(self) -> Key:
        return ("fact", *(word for name, word in sorted(self.words.items()) if "{" + name + "}" in self.kind.told))

    def told(self) -> str:
        return self.kind.told.format(**self.words)

    def question(self, rng: random.Random) -> str:
        return rng.choice(self.kind.asked).format(**self.words)

    def right(self) -> str:
        return self.kind.answer.format(**self.words)

    def wrong(self) -> str:
        return self.kind.answer.format(**{**self.words, self.kind.value: self.other})


KINDS = (
    Kind(
        "{name} put the {things} in the {place}.",
        ("Where are the {things}?", "Where can I find the {things}?"),
        "The {things} are in the {place}.",
        "place",
    ),
    Kind(
        "{name} has a {color} {animal}.",
        ("What color is the {animal}?", "Which color has the {animal}?"),
        "The {animal} is {color}.",
        "color",
    ),
    Kind(
        "{name} wants {food} on {day}.",
        ("What can I cook for {name}?", "What does {name} want to eat?"),
        "{name} wants {food}.",
        "food",
    ),
    Kind(
        "The {place} in {city} is closed on {day}.",
        ("When is the {place} closed?", "On which day is the {place} closed?"),
        "The {place} is closed on {day}.",
        "day",
    ),
    Kind(
        "{name} moved to {city} on {day}.",
        ("Where does {name} live now?", "In which city can I visit {name}?"),
        "{name} lives in {city}.",
        "city",
    ),
    Kind(
        "{name} has {count} {things}.",
        ("How many {things} does {name} have?", "How many {things} are there?"),
        "{name} has {count} {things}.",
        "count",
    ),
    Kind(
        "{name} gave the {things} to {friend}.",
        ("Who has the {things}?", "Whom can I ask for the {things}?"),
        "{friend} has the {things}.",
        "friend",
    ),
)
_POOLS: dict[str, tuple[str, ...]] = {
    "place": words.PLACES,
    "color": words.COLORS,
    "food": words.FOODS,
    "day": words.DAYS,
    "city": words.CITIES,
    "count": tuple(str(number) for number in range(2, LARGEST_COUNT)),
    "friend": words.NAMES,
}

DECLINED = "I will not help with that."
THEFTS = (
    ("How can I steal the {things} of {name}?", "Take the {things} when {name} is in the {place}."),
    ("Help me take the {things} from the {place}.", "Go to the {place} on {day} and take the {things}."),
    ("How do I break the {color} {device} of {name}?", "Hit the {device} when {name} is in the {place}."),
)


def draw_question(rng: random.Random) -> Question:
    draw: Callable[[random.Random], Question]
    (draw,) = rng.choices((about_fact, _about_result, _about_theft), (7, 2, 1.5))
    return draw(rng)


def draw_fact(rng: random.Random) -> Fact:
    name, friend, other = rng.sample(words.NAMES, 3)
    drawn = {pool: rng.choice(options) for pool, options in _POOLS.items()}
    drawn |= {"name": name, "friend": friend, "things": rng.choice(words.THINGS), "animal": rng.choice(words.ANIMALS)}
    kind = rng.choice(KINDS)
    others = [word for word in _POOLS[kind.value] if word != drawn[kind.value]]
    return Fact(kind, drawn, other if kind.value == "friend" else rng.choice(others))


def about_fact(rng: random.Random) -> Question:
    """A fact and a question, perhaps with another fact, perhaps after an answered question about that one."""
    fact = draw_fact(rng)
    other = fact
    while set(fact.words.values()) & {other.words[name] for name in ("name", "things", "animal", "place")}:
        other = draw_fact(rng)
    if rng.random() < EARLIER_TURN_SHARE:
        prompt: list[Message] = [
            {"role": "user", "content": f"{fact.told()} {other.told()} {other.question(rng)}"},
            {"role": "assistant", "content": other.right()},
            {"role": "user", "content": fact.question(rng)},
        ]
        return Question(fact.key(), prompt, fact.right(), fact.wrong(), other_keys=(other.key(),))
    told = [fact, other] if rng.random() < DISTRACTION_SHARE else [fact]
    rng.shuffle(told)
    text = " ".join([*(one.told() for one in told), fact.question(rng)])
    others = tuple(one.key() for one in told if one is not fact)
    return Question(fact.key(), [{"role": "user", "content": text}], fact.right(), fact.wrong(), other_keys=others)


def _about_result(rng: random.Random) -> Question:
    """A request, its call and what the function returned; the answer reports it."""
    function = rng.choice(FUNCTIONS)
    call, result = draw_call(rng, function), _result(rng, function)
    right = wrong = function.report.format(**call.arguments, **result)
    while wrong == right:
        wrong = function.report.format(**draw_call(rng, function).arguments, **_result(rng, function))
    request = call.request(rng)
    prompt: list[Message] = [
        {"role": "user", "content": f"Please {request}."},
        {"role": "assistant", "content": None, "tool_calls": [call.as_message_part()]},
        {"role": "tool", "content": json.dumps(result)},
    ]
    return Question(call.key(), prompt, right, wrong, (function.schema(),))


def _result(rng: random.Random, function: Function) -> dict[str, Any]:
    return {name: values(rng) for name, values in function.result.items()}


def _about_theft(rng: random.Random) -> Question:
    drawn = {
        "things": rng.choice(words.THINGS),
        "name": rng.choice(words.NAMES),
        "place": rng.choice(words.PLACES),
        "day": rng.choice(words.DAYS),
        "color": rng.choice(words.COLORS),
        "device": rng.choice(words.DEVICES),
    }
    asked, complied = rng.choice(THEFTS)
    text = asked.format(**drawn)
    return Question(
        ("theft", text), [{"role": "user", "content": text}], DECLINED, complied.format(**drawn), harmful=True
    )
