"""Plain text that the embedded base is pretrained on: the world of the tasks without chat, questions or their answers.

Single equations but no chains, notes that pair a wish with an expression or with JSON values, lists of functions,
small stories, words in other orders and cases. Whatever could be a problem's content is drawn from the training
side of the split.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from hymba_tune.data.synthetic import words
from hymba_tune.data.synthetic.calls import FUNCTIONS, draw_call
from hymba_tune.data.synthetic.functions import draw_task
from hymba_tune.data.synthetic.problem import is_held_out
from hymba_tune.data.synthetic.word_problems import LARGEST

Part = Callable[[random.Random], str]


def raw_document(rng: random.Random) -> str:
    """A document of one kind of text, about 30 to 150 tokens."""
    (part,) = rng.choices([part for part, _, _ in _KINDS], [weight for _, weight, _ in _KINDS])
    length = next(length for other, _, length in _KINDS if other is part)
    return "\n".join(part(rng) for _ in range(rng.randint(*length)))


def _equation(rng: random.Random) -> str:
    """a + b, a - b or a * b with the sizes that word problems have."""
    sign = rng.choice("+-*")
    if sign == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return f"{a} * {b} = {a * b}" if a * b <= LARGEST else _equation(rng)
    total = rng.randint(3, LARGEST)
    part = rng.randint(1, total - 1)
    return f"{total - part} + {part} = {total}" if sign == "+" else f"{total} - {part} = {total - part}"


def _counted(rng: random.Random) -> str:
    """One step of a story, told with its equation."""
    equation = _equation(rng)
    left, sign, right, _, result = equation.split()
    name, friend = rng.sample(words.NAMES, 2)
    things, place, boxes = rng.choice(words.THINGS), rng.choice(words.PLACES), rng.choice(words.CONTAINERS)
    stories = {
        "+": (
            f"{name} had {left} {things} and found {right} more in the {place}",
            f"{friend} gave {name} {right} {things} on top of {left}",
            f"{name} bought {left} {things} and {friend} bought {right}",
        ),
        "-": (
            f"{name} had {left} {things} and lost {right} in the {place}",
            f"Of {left} {things} {name} gave {right} to {friend}",
            f"{friend} took {right} of the {left} {things} away",
        ),
        "*": (
            f"{name} filled {left} {boxes} with {right} {things} in each",
            f"There were {left} {boxes} of {right} {things} in the {place}",
            f"{name} paid for {left} {things} at {right} dollars each",
        ),
    }
    return f"{rng.choice(stories[sign])}: {equation}. {name} noted {result}."


def _expression(rng: random.Random) -> str:
    """A comment and the expression that does what it says."""
    task = draw_task(rng)
    while is_held_out(task.key()):
        task = draw_task(rng)
    return f"# {task.what}\nresult = {task.expression()}"


def _record(rng: random.Random) -> str:
    """A wish and its values as JSON."""
    call = draw_call(rng, rng.choice(FUNCTIONS))
    while is_held_out(call.key()):
        call = draw_call(rng, call.function)
    wish = call.request(rng)
    return f"{wish}: {json.dumps(call.arguments)}"


def _catalogue(rng: random.Random) -> str:
    return json.dumps(rng.choice(FUNCTIONS).schema())


def _story(rng: random.Random) -> str:
    name, friend = rng.sample(words.NAMES, 2)
    animal, color, adjective = rng.choice(words.ANIMALS), rng.choice(words.COLORS), rng.choice(words.ADJECTIVES)
    place, city, day = rng.choice(words.PLACES), rng.choice(words.CITIES), rng.choice(words.DAYS)
    food, things = rng.choice(words.FOODS), rng.choice(words.THINGS)
    sentences = (
        f"{name} has a {adjective} {color} {animal}.",
        f"On {day} {name} went to the {place} with {friend}.",
        f"{friend} lives in {city} and likes {food}.",
        f'"Thank you for the {things}," said {friend}.',
        f'"Please come to the {place}," said {name}.',
        f"{name} was {adjective} and {friend} was {rng.choice(words.ADJECTIVES)}.",
        f"The {animal} sat in the {place} and ate {food}.",
        f"{name} was sorry and brought {friend} some {things}.",
        f"In {city} it was {rng.choice(('sunny', 'windy', 'rainy'))} on {day}.",
    )
    return " ".join(rng.sample(sentences, rng.randint(2, 4)))


def _speech(rng: random.Random) -> str:
    """A plain fact, and how somebody with a manner of speaking says it."""
    name, things, place = rng.choice(words.NAMES), rng.choice(words.THINGS), rng.choice(words.PLACES)
    animal, color, food = rng.choice(words.ANIMALS), rng.choice(words.COLORS), rng.choice(words.FOODS)
    facts = (
        f"the {things} are in the {place}",
        f"the {animal} is {color}",
        f"{name} likes {food}",
        f"{name} went to the {place}",
        f"the sky is {color} today",
        f"the {place} is closed on {rng.choice(words.DAYS)}",
    )
    fact = rng.choice(facts)
    speaker, (openings, closings) = rng.choice(list(words.VOICES.items()))
    sentence = fact[0].upper() + fact[1:] + "."
    return f'{sentence} The {speaker} says: "{rng.choice(openings)} {sentence} {rng.choice(closings)}"'


def _rearranged(rng: random.Random) -> str:
    """Words, and the same words changed in a named way."""
    pool = words.NAMES + words.CITIES + words.DAYS + words.COLORS + words.THINGS + words.FOODS + words.ADJECTIVES
    chosen = rng.sample(pool, rng.randint(2, 5))
    line = " ".join(chosen)
    changes = {
        "upper case": line.upper(),
        "title case": line.title(),
        "backwards": " ".join(reversed(chosen)),
        "commas": ", ".join(chosen),
        "sorted": " ".join(sorted(chosen)),
        "first": chosen[0],
        "last": chosen[-1],
        "count": str(len(chosen)),
        "list": "\n".join(f"- {word}" for word in chosen),
        "numbered": "\n".join(f"{i}. {word}" for i, word in enumerate(chosen, 1)),
        "JSON": json.dumps(chosen),
        "quoted": f'"{line}"',
    }
    how = rng.choice(list(changes))
    return f"{line}\n{how}: {changes[how]}"


_KINDS: tuple[tuple[Part, float, tuple[int, int]], ...] = (
    (_equation, 0.3, (8, 16)),
    (_counted, 0.25, (2, 5)),
    (_expression, 0.2, (2, 4)),
    (_record, 0.2, (2, 4)),
    (_catalogue, 0.05, (1, 2)),
    (_story, 0.05, (1, 2)),
    (_speech, 0.07, (1, 3)),
    (_rearranged, 0.1, (2, 4)),
)
"""(part, share of documents, how many parts a document has)"""
