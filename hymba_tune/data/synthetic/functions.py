"""tiny_code: write a short Python function, in the manner of MBPP. Key: the function's body, names left out.

Every phrase stands beside the expression it asks for. The scorer compares syntax trees, so
nothing that a model writes is ever run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hymba_tune.data.synthetic.problem import Key, Problem
from hymba_tune.data.synthetic.words import ADJECTIVES, ANIMALS, COLORS

SYSTEM_PROMPTS = ("You write short Python functions.", "Answer with Python code only.")
SYSTEM_SHARE = 0.15
REQUESTS = (
    "Write a function `{name}({v})` that returns {what}.",
    "Write a Python function `{name}({v})`. It returns {what}.",
    "I need a function `{name}({v})` to return {what}.",
    "Define `{name}({v})` so that it gives {what}.",
)
FUNCTION_NAMES = ("solve", "pick", "convert", "compute", "make", "change", "find", "get", "run", "build", "check")
_NUMBER_NAMES = ("n", "number", "value")
_LIST_NAMES = ("items", "numbers", "values")
_TEXT_NAMES = ("s", "text", "word")
PARAMETER_NAMES = _NUMBER_NAMES + _LIST_NAMES + _TEXT_NAMES

_FILTERS = (
    ("greater than {k}", "x > {k}"),
    ("less than {k}", "x < {k}"),
    ("not equal to {k}", "x != {k}"),
    ("that is even", "x % 2 == 0"),
    ("that is odd", "x % 2 == 1"),
)
_MAPS = (
    ("plus {m}", "{} + {m}"),
    ("minus {m}", "{} - {m}"),
    ("times {m}", "{} * {m}"),
)
_FOLDS = (
    ("the sum of", "sum({})"),
    ("the largest of", "max({})"),
    ("the smallest of", "min({})"),
    ("a list of", "[{}]"),
)
_TEXT_PARTS = (
    ("the first {k} letters of `{v}`", "@[:{k}]"),
    ("the last {k} letters of `{v}`", "@[-{k}:]"),
    ("`{v}` without the first {k} letters", "@[{k}:]"),
    ("`{v}` without the last {k} letters", "@[:-{k}]"),
)
_TEXT_STYLES = (
    ("in upper case", "{}.upper()"),
    ("in lower case", "{}.lower()"),
    ("repeated {m} times", "{} * {m}"),
    ('followed by "{word}"', '{} + "{word}"'),
    ('after "{word}"', '"{word}" + {}'),
)
_COMPARISONS = (
    ("is greater than {k}", "@ > {k}"),
    ("is less than {k}", "@ < {k}"),
    ("equals {k}", "@ == {k}"),
)


@dataclass(frozen=True, slots=True)
class Task:
    """what: the wish in words; body: the expression with `@` for the parameter; parameter: its name."""

    what: str
    body: str
    parameter: str

    def key(self) -> Key:
        """The same under every parameter name."""
        return ("code", self.body)

    def expression(self) -> str:
        return self.body.replace("@", self.parameter)


def draw(rng: random.Random) -> Problem:
    task = draw_task(rng)
    name = rng.choice(FUNCTION_NAMES)
    request = rng.choice(REQUESTS).format(name=name, v=task.parameter, what=task.what)
    code = f"def {name}({task.parameter}):\n    return {task.expression()}"
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < SYSTEM_SHARE else []
    return Problem(
        key=task.key(),
        prompt=[*system, {"role": "user", "content": request}],
        reply={"role": "assistant", "content": f"```python\n{code}\n```"},
        target=code,
        scorer="code",
    )


def draw_task(rng: random.Random) -> Task:
    """One of the four kinds; plain documents of pretraining use it too."""
    return rng.choice((_on_number, _on_list, _on_text, _on_condition))(rng)


def _on_number(rng: random.Random) -> Task:
    v = rng.choice(_NUMBER_NAMES)
    (first, first_code), (second, second_code) = rng.sample(_MAPS, 2)
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    inner = first_code.format("@", m=a)
    body = second_code.format(f"({inner})" if "*" in second_code else inner, m=b)
    return Task(f"`{v}` {first.format(m=a)}, then {second.format(m=b)}", body, v)


def _on_list(rng: random.Random) -> Task:
    v = rng.choice(_LIST_NAMES)
    (kept, condition), (changed, expression) = rng.choice(_FILTERS), rng.choice(_MAPS)
    fold, code = rng.choice(_FOLDS)
    k, m = rng.randint(2, 20), rng.randint(2, 20)
    what = f"{fold} `x` {changed.format(m=m)} for each `x` in `{v}` {kept.format(k=k)}"
    return Task(what, code.format(f"{expression.format('x', m=m)} for x in @ if {condition.format(k=k)}"), v)


def _on_text(rng: random.Random) -> Task:
    v = rng.choice(_TEXT_NAMES)
    (part, part_code), (style, style_code) = rng.choice(_TEXT_PARTS), rng.choice(_TEXT_STYLES)
    k, m, word = rng.randint(2, 9), rng.randint(2, 9), rng.choice(ANIMALS + COLORS + ADJECTIVES)
    what = f"{part.format(v=v, k=k)} {style.format(m=m, word=word)}"
    return Task(what, style_code.format(part_code.format(k=k), m=m, word=word), v)


def _on_condition(rng: random.Random) -> Task:
    v = rng.choice(_NUMBER_NAMES)
    wish, code = rng.choice(_COMPARISONS)
    k = rng.randint(2, 40)
    yes, no = rng.sample(COLORS + ANIMALS + ADJECTIVES, 2)
    return Task(f'"{yes}" if `{v}` {wish.format(k=k)}, else "{no}"', f'"{yes}" if {code.format(k=k)} else "{no}"', v)
