"""Plain text that the embedded base is pretrained on: the world of the tasks without chat, questions or their answers.

Single equations but no chains, notes that pair a wish with an expression or with JSON values, lists of functions,
small stories, facts said again in other words and manners, words in other orders, layouts and cases. A quarter of it is
copying and nothing else, without which so small a model does not learn to copy at all. Whatever could be a problem's
content is drawn from the training side of the split.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from hymba_tune.data.synthetic import words
from hymba_tune.data.synthetic.calls import FUNCTIONS, Call, draw_call
from hymba_tune.data.synthetic.functions import FUNCTION_NAMES, PARAMETER_NAMES, draw_task
from hymba_tune.data.synthetic.problem import is_held_out
from hymba_tune.data.synthetic.questions import Fact, draw_fact
from hymba_tune.data.synthetic.word_problems import LARGEST

_POOL = (
    *(words.NAMES + words.CITIES + words.DAYS + words.COLORS + words.THINGS + words.FOODS + words.ANIMALS),
    *(words.PLACES + words.ROOMS + words.DEVICES + words.ADJECTIVES + FUNCTION_NAMES + PARAMETER_NAMES),
)
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
    """A wish, or two, and the values as JSON."""
    calls = [_call(rng) for _ in range(rng.choice((1, 1, 1, 2)))]
    wishes = " and ".join(call.request(rng) for call in calls)
    return f"{wishes}: {' '.join(json.dumps(call.arguments) for call in calls)}"


def _call(rng: random.Random) -> Call:
    call = draw_call(rng, rng.choice(FUNCTIONS))
    while is_held_out(call.key()):
        call = draw_call(rng, call.function)
    return call


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


def _recall(rng: random.Random) -> str:
    """Facts, and one or all of them said again in other words."""
    facts = [_fact(rng) for _ in range(rng.randint(1, 3))]
    told = " ".join(fact.told() for fact in facts)
    again = rng.sample(facts, rng.choice((1, len(facts))))
    return f"{told} So {' And '.join(fact.right() for fact in again)}"


def _fact(rng: random.Random) -> Fact:
    fact = draw_fact(rng)
    while is_held_out(fact.key()):
        fact = draw_fact(rng)
    return fact


def _speech(rng: random.Random) -> str:
    """A plain fact, and how somebody with a manner of speaking says it."""
    fact = _fact(rng)
    speaker, (openings, closings) = rng.choice(list(words.VOICES.items()))
    return f'{fact.told()} The {speaker} says: "{rng.choice(openings)} {fact.right()} {rng.choice(closings)}"'


def _rearranged(rng: random.Random) -> str:
    """Words or a sentence, and the same changed in named ways."""
    chosen = rng.sample(_POOL, rng.randint(2, 5))
    line = " ".join(chosen)
    if rng.random() < 0.25:
        line = _fact(rng).right()
        chosen = line.split()
    arranged = {"as given": chosen, "backwards": chosen[::-1], "sorted": sorted(chosen, key=str.lower)}
    layouts: dict[str, Callable[[list[str]], str]] = {
        "words": " ".join,
        "commas": ", ".join,
        "list": lambda items: "\n".join(f"- {item}" for item in items),
        "numbered": lambda items: "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)),
        "JSON": lambda items: json.dumps(list(items)),
        "quoted": lambda items: f'"{" ".join(items)}"',
        "twice": lambda items: "\n".join([" ".join(items)] * 2),
        "last line": lambda items: f"{' '.join(items)}\n{rng.choice(_POOL)}",
    }
    cases: dict[str, Callable[[str], str]] = {"upper case": str.upper, "lower case": str.lower, "same case": str}
    order, layout, case = (rng.choice(list(options)) for options in (arranged, layouts, cases))
    changed = cases[case](layouts[layout](arranged[order]))
    return f"{line}\n{order}, {layout}, {case}:\n{changed}"


def _things(rng: random.Random, least: int, most: int) -> list[str]:
    """Words and numbers of the world, a third of them numbers."""
    count = rng.randint(least, most)
    return [str(rng.randint(1, 99)) if rng.random() < 1 / 3 else rng.choice(_POOL) for _ in range(count)]


def _repeated(rng: random.Random) -> str:
    """A random line, said again once to three times: nothing but copying helps."""
    line = " ".join(_things(rng, 3, 9))
    return "\n".join([line] * rng.randint(2, 4))


def _looked_up(rng: random.Random) -> str:
    """Names with something each, then some of the names again, with what belongs to them."""
    names = rng.sample(_POOL, rng.randint(2, 6))
    table = {name: _things(rng, 1, 1)[0] for name in names}
    again = rng.sample(names, rng.randint(1, len(names)))
    sides = (", ".join(f"{name} {table[name]}" for name in group) for group in (names, again))
    return ". So ".join(sides) + "."


_KINDS: tuple[tuple[Part, float, tuple[int, int]], ...] = (
    (_equation, 0.2, (8, 16)),
    (_counted, 0.3, (2, 5)),
    (_expression, 0.15, (2, 4)),
    (_record, 0.35, (2, 4)),
    (_catalogue, 0.05, (1, 2)),
    (_story, 0.05, (1, 2)),
    (_recall, 0.2, (2, 4)),
    (_speech, 0.08, (1, 3)),
    (_rearranged, 0.2, (2, 4)),
    (_repeated, 0.4, (2, 5)),
    (_looked_up, 0.3, (2, 5)),
)
"""(part, share of documents, how many parts a document has)"""
