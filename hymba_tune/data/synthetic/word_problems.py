"""tiny_math: arithmetic word problems of two or three steps, in the manner of GSM8K, with worked steps and `#### n`.

A story's text, its question and its steps share the names {a}, {b}, ... of its numbers; {r1}, {r2} are the results of
earlier steps. Key: the chain of equations, so that a held-out chain is never worked in training under any wording.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

from hymba_tune.data.synthetic.problem import Problem
from hymba_tune.data.synthetic.words import CONTAINERS, DAYS, NAMES, PLACES, THINGS

SYSTEM_PROMPTS = (
    "Solve the problem step by step.",
    "You are a careful math teacher.",
    "Work out the answer and write it after ####.",
)
SYSTEM_SHARE = 0.15
LARGEST = 60
_OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, slots=True)
class Story:
    """numbers: name -> (smallest, largest). steps: (equation, sentence with {eq} for the equation worked out)."""

    numbers: dict[str, tuple[int, int]]
    texts: tuple[str, ...]
    questions: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]


_FACTOR, _SMALL, _MORE = (2, 9), (2, 15), (11, 40)

STORIES = (
    Story(
        {"a": _FACTOR, "b": _FACTOR, "c": _SMALL},
        (
            "{name} has {a} {boxes} with {b} {things} in each. {friend} gives {name} {c} more {things}.",
            "There are {a} {boxes} of {b} {things} at home. {name} finds {c} more {things} in the {place}.",
            "{name} buys {a} {boxes} of {things}. Each holds {b} {things}. {friend} brings {c} {things} more.",
        ),
        ("How many {things} does {name} have now?", "How many {things} are there in all?"),
        (("a * b", "The {boxes} hold {eq} {things}."), ("r1 + c", "With the others that is {eq} {things}.")),
    ),
    Story(
        {"a": _FACTOR, "b": _FACTOR, "c": _SMALL},
        (
            "{name} has {a} {boxes} with {b} {things} in each. {name} gives {c} {things} to {friend}.",
            "{name} fills {a} {boxes} with {b} {things} each and then loses {c} {things} in the {place}.",
            "The {place} has {a} {boxes} of {b} {things}. {name} takes {c} {things} away.",
        ),
        ("How many {things} are left?", "How many {things} remain?"),
        (("a * b", "The {boxes} hold {eq} {things}."), ("r1 - c", "After that {eq} {things} are left.")),
    ),
    Story(
        {"a": _MORE, "b": _SMALL, "c": _SMALL},
        (
            "{name} has {a} {things}. {name} buys {b} more and gives {c} to {friend}.",
            "On {day} {name} had {a} {things}. Then {name} found {b} {things} and lost {c}.",
        ),
        ("How many {things} does {name} have now?", "How many {things} are left?"),
        (("a + b", "First there are {eq} {things}."), ("r1 - c", "After that {eq} {things} are left.")),
    ),
    Story(
        {"a": _SMALL, "b": _SMALL},
        (
            "{name} has {a} {things}. {friend} has {b} more {things} than {name}.",
            "{name} counts {a} {things} in the {place}. {friend} counts {b} more than {name}.",
        ),
        ("How many {things} do they have together?", "How many {things} is that together?"),
        (("a + b", "{friend} has {eq} {things}."), ("r1 + a", "Together they have {eq} {things}.")),
    ),
    Story(
        {"a": _SMALL, "b": (1, 12)},
        (
            "{name} has {a} {things}. {friend} has {b} fewer {things} than {name}.",
            "{name} sells {a} {things} on {day}. {friend} sells {b} fewer than {name}.",
        ),
        ("How many {things} is that together?", "How many {things} in all?"),
        (("a - b", "{friend} has {eq} {things}."), ("r1 + a", "Together that is {eq} {things}.")),
    ),
    Story(
        {"a": _FACTOR, "b": _FACTOR, "c": (10, 60)},
        (
            "A pack of {things} costs {a} dollars. {name} buys {b} packs and pays with {c} dollars.",
            "{name} has {c} dollars and buys {b} packs of {things} for {a} dollars each.",
        ),
        ("How many dollars does {name} get back?", "How many dollars are left?"),
        (("a * b", "The packs cost {eq} dollars."), ("c - r1", "That leaves {eq} dollars.")),
    ),
    Story(
        {"a": _FACTOR, "b": _FACTOR, "c": _FACTOR, "d": _FACTOR},
        (
            "{name} buys {a} {things} for {b} dollars each and {c} {others} for {d} dollars each.",
            "At the {place} {name} takes {a} {things} at {b} dollars each and {c} {others} at {d} dollars each.",
        ),
        ("How many dollars does {name} pay?", "How many dollars is that in all?"),
        (
            ("a * b", "The {things} cost {eq} dollars."),
            ("c * d", "The {others} cost {eq} dollars."),
            ("r1 + r2", "In all that is {eq} dollars."),
        ),
    ),
    Story(
        {"a": (5, 29), "b": (1, 15), "c": _SMALL},
        (
            "A bus leaves the {place} with {a} people. At the next stop {b} get off and {c} get on.",
            "There are {a} people in the {place}. Then {b} go home and {c} come in.",
        ),
        ("How many people are there now?", "How many people is that?"),
        (("a - b", "First {eq} people stay."), ("r1 + c", "Then there are {eq} people.")),
    ),
    Story(
        {"a": _FACTOR, "b": _FACTOR, "c": _SMALL},
        (
            "{name} reads {a} pages a day for {b} days and {c} pages on {day}.",
            "For {b} days {name} walks {a} miles a day, and on {day} {name} walks {c} more.",
        ),
        ("How many is that in all?", "What is the total?"),
        (("a * b", "In {b} days that is {eq}."), ("r1 + c", "With {day} it is {eq}.")),
    ),
)


def draw(rng: random.Random) -> Problem:
    """A problem whose steps all stay between 1 and LARGEST."""
    story = rng.choice(STORIES)
    equations = None
    while equations is None:
        numbers = {name: rng.randint(*bounds) for name, bounds in story.numbers.items()}
        equations = _work_out(story, numbers)
    name, friend = rng.sample(NAMES, 2)
    things, others = rng.sample(THINGS, 2)
    words = {
        "name": name,
        "friend": friend,
        "things": things,
        "others": others,
        "boxes": rng.choice(CONTAINERS),
        "place": rng.choice(PLACES),
        "day": rng.choice(DAYS),
    }
    text = f"{rng.choice(story.texts)} {rng.choice(story.questions)}".format(**words, **numbers)
    lines = [
        sentence.format(eq="{} {} {} = {}".format(*equation), **words, **numbers)
        for (_, sentence), equation in zip(story.steps, equations, strict=True)
    ]
    answer = str(equations[-1][-1])
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < SYSTEM_SHARE else []
    return Problem(
        key=("math", *equations),
        prompt=[*system, {"role": "user", "content": text}],
        reply={"role": "assistant", "content": "\n".join([*lines, f"#### {answer}"])},
        target=answer,
        scorer="number",
    )


Equation = tuple[int, str, int, int]


def _work_out(story: Story, numbers: dict[str, int]) -> list[Equation] | None:
    """The story's steps as (left, operator, right, result), or None if a result leaves 1 .. LARGEST."""
    values = dict(numbers)
    equations = []
    for index, (step, _) in enumerate(story.steps, 1):
        left, sign, right = step.split()
        result = _OPERATORS[sign](values[left], values[right])
        if not 1 <= result <= LARGEST:
            return None
        values[f"r{index}"] = result
        equations.append((values[left], sign, values[right], result))
    return equations
