"""tiny_constraints: answers whose form is laid down in words and checked by a program, in the manner of IFEval.

The content is words to write down, things of a kind to name, or a sentence to say; the form is up to four constraints.
They stand in the request, in a system prompt, or come in a later turn. A constraint is a list, its name
and its values, of:

    ["upper"]  ["lower"]               the case of all letters
    ["dashes"]  ["numbers"]  ["commas"]  ["JSON"]  how items are laid out
    ["words", [...]]                   these words, once each, in this order, and no others
    ["kind", [...], n]                 n different ones of these words, and no others
    ["sentence", text, n]              the sentence, n times, and nothing else
    ["begin", text]  ["end", text]     the first or the last line
    ["quoted"]                         double quotes around all of it
    ["without", word]

Key: content and constraints.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from hymba_tune.data.synthetic import words
from hymba_tune.data.synthetic.problem import Message, Problem
from hymba_tune.data.synthetic.questions import draw_fact

Constraint = list[Any]

KINDS = {
    "colors": words.COLORS,
    "animals": words.ANIMALS,
    "foods": words.FOODS,
    "days": words.DAYS,
    "cities": words.CITIES,
    "rooms": words.ROOMS,
    "places": words.PLACES,
}
NAMES = (
    *("upper", "lower", "dashes", "numbers", "commas", "JSON"),
    *("words", "kind", "sentence", "begin", "end", "quoted", "without"),
)
"""All constraints."""
_POOL = words.NAMES + words.CITIES + words.COLORS + words.THINGS + words.FOODS + words.ANIMALS
_NUMBERS = ("zero", "one", "two", "three", "four", "five")
_FRAMES = ("Sure", "Done", "Hello")

_CASES = {
    "upper": ("in upper case", "in capital letters"),
    "lower": ("in lower case", "in small letters"),
}
_LAYOUTS = {
    "dashes": ("as a list with dashes", "each on a line after a dash"),
    "numbers": ("as a numbered list", "each on a line with its number"),
    "commas": ("with commas between them", "on one line with commas"),
    "JSON": ("as a JSON list", "in JSON"),
}
_ORDERS = {
    "as given": ("",),
    "backwards": (" backwards", " from the last to the first"),
    "sorted": (" sorted from A to Z", " in the order of the alphabet"),
}
CONTENT_SHARES = (0.8, 0.1, 0.1)
"""Of things of a kind, given words and a sentence: the last two are hard for a model of a million parameters."""
SYSTEM_SHARE = 0.25
FOLLOW_UP_SHARE = 0.25


def draw(rng: random.Random) -> Problem:
    """One of the three kinds of content, its form in the request, in a system prompt or after a first answer."""
    (draw_content,) = rng.choices((_of_a_kind, _words, _sentence), CONTENT_SHARES)
    content, request = draw_content(rng)
    form = _form(rng, content)
    wishes = [_wish(rng, constraint) for constraint in form]
    chance = rng.random()
    earlier: list[Message] = []
    first = [content, *form]
    if form and chance < SYSTEM_SHARE:
        moved = wishes.pop()
        earlier = [{"role": "system", "content": f"Always answer {moved}."}]
        asked = _joined(request, wishes)
    elif form and chance < SYSTEM_SHARE + FOLLOW_UP_SHARE:
        moved = wishes.pop()
        first = [content, *form[:-1]]
        earlier = [
            {"role": "user", "content": _joined(request, wishes)},
            {"role": "assistant", "content": write(first)},
        ]
        asked = f"Now {moved}."
    else:
        asked = _joined(request, wishes)
    target = [content, *form]
    other_keys = (_key(first),) if first != target else ()
    return Problem(
        key=_key(target),
        prompt=[*earlier, {"role": "user", "content": asked}],
        reply={"role": "assistant", "content": write(target)},
        target=target,
        scorer="constraints",
        other_keys=other_keys,
    )


def _key(constraints: Sequence[Constraint]) -> tuple[Any, ...]:
    return ("constraints", json.dumps(constraints))


def _joined(request: str, wishes: Sequence[str]) -> str:
    """The request with its wishes: one sentence."""
    return f"{', '.join([request, *wishes])}."


def _words(rng: random.Random) -> tuple[Constraint, str]:
    given = rng.sample(_POOL, rng.randint(2, 5))
    order = rng.choice(list(_ORDERS))
    arranged = {"as given": given, "backwards": given[::-1], "sorted": sorted(given, key=str.lower)}[order]
    verb = rng.choice(("Write", "List"))
    return ["words", arranged], f"{verb} {' '.join(given)}{rng.choice(_ORDERS[order])}"


def _of_a_kind(rng: random.Random) -> tuple[Constraint, str]:
    name = rng.choice(list(KINDS))
    count = rng.randint(2, 4)
    return ["kind", list(KINDS[name]), count], f"{rng.choice(('Name', 'Give me'))} {_NUMBERS[count]} {name}"


def _sentence(rng: random.Random) -> tuple[Constraint, str]:
    sentence, count = draw_fact(rng).right(), rng.randint(1, 3)
    times = "" if count == 1 else f"{_NUMBERS[count]} times "
    return ["sentence", sentence, count], f'{rng.choice(("Say", "Write"))} {times}"{sentence}"'


def _form(rng: random.Random, content: Constraint) -> list[Constraint]:
    """Constraints that can be met together, in random order."""
    form: list[Constraint] = []
    layout = rng.choice(list(_LAYOUTS))
    if content[0] != "sentence":
        form.append([layout])
    if content[0] == "kind" and rng.random() < 0.25:
        form.append(["without", rng.choice(content[1])])
    if rng.random() < 0.5:
        form.append([rng.choice(list(_CASES))])
    if layout != "JSON" or content[0] == "sentence":
        frame = rng.choice(("begin", "end", "quoted", "none"))
        if frame in ("begin", "end"):
            form.append([frame, rng.choice(_FRAMES)])
        elif frame == "quoted":
            form.append([frame])
    rng.shuffle(form)
    return form


def _wish(rng: random.Random, constraint: Constraint) -> str:
    name, *values = constraint
    if name in ("begin", "end"):
        verb, place = {"begin": ("starting", "first"), "end": ("ending", "last")}[name]
        return rng.choice((f'{verb} with "{values[0]}"', f'with "{values[0]}" as the {place} line'))
    if name == "without":
        return rng.choice((f'without "{values[0]}"', f'leaving out "{values[0]}"'))
    if name == "quoted":
        return rng.choice(("in double quotes", "with double quotes around it"))
    return rng.choice((_CASES | _LAYOUTS)[name])


def write(constraints: Sequence[Constraint]) -> str:
    """An answer that meets all constraints."""
    form: dict[str, list[Any]] = {name: values for name, *values in constraints}
    if "sentence" in form:
        body = "\n".join([form["sentence"][0]] * form["sentence"][1])
    else:
        body = _laid_out(_items(form), next(name for name in [*form, "plain"] if name in (*_LAYOUTS, "plain")))
    lines = [*form.get("begin", []), body, *form.get("end", [])]
    text = "\n".join(lines)
    text = text.upper() if "upper" in form else text.lower() if "lower" in form else text
    return f'"{text}"' if "quoted" in form else text


def _items(form: dict[str, list[Any]]) -> list[str]:
    """The first that fit: which ones of a kind is left open, so one choice is easier to learn than many."""
    if "words" in form:
        return list(form["words"][0])
    options, count = form["kind"]
    return [option for option in options if [option] != form.get("without")][:count]


def _laid_out(items: Sequence[str], layout: str) -> str:
    return {
        "dashes": "\n".join(f"- {item}" for item in items),
        "numbers": "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)),
        "commas": ", ".join(items),
        "JSON": json.dumps(list(items)),
        "plain": " ".join(items),
    }[layout]
