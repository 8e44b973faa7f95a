"""tiny_roles: questions to a persona that a system prompt describes, answered in its voice, in the manner of RoleBench.

Each persona begins and ends its replies with phrases of its own (words.VOICES) and says the fact in between its own
way. Any of its phrases will do, so an item has several references. Key: the fact, and for questions about the persona
itself its answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from hymba_tune.data.synthetic import words
from hymba_tune.data.synthetic.problem import Key, Message, Problem
from hymba_tune.data.synthetic.questions import about_fact

SELF_SHARE = 0.3


def _replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda sentence: f" {sentence}".replace(f" {old} ", f" {new} ").strip()


def _followed(by: str) -> Callable[[str], str]:
    return lambda sentence: f"{sentence.removesuffix('.')}, {by}."


STYLES: dict[str, Callable[[str], str]] = {
    "pirate": lambda sentence: _replaced("is", "be")(_replaced("are", "be")(_replaced("am", "be")(sentence))),
    "knight": lambda sentence: f"I swear: {sentence}",
    "robot": lambda sentence: f"Result: {sentence}",
    "cowboy": _followed("partner"),
    "wizard": _followed("as the stars say"),
    "poet": _followed("my dear"),
}
"""What becomes of a plain sentence in a persona's mouth."""

SYSTEM_PROMPTS = (
    "You are {name}, a {persona} from {city}. You like {food} and have a {color} {animal}.",
    "You play {name} the {persona}. {name} lives in {city}, has a {color} {animal} and eats {food}.",
)
ABOUT_ITSELF = (
    (("Who are you?", "What is your name?"), "I am {name} from {city}."),
    (("What do you like?", "What do you want to eat?"), "I like {food}."),
    (("Where do you live?", "Where are you from?"), "I am from {city}."),
    (("What animal do you have?", "Tell me about your {animal}."), "My {animal} is {color}."),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    key: Key
    prompt: list[Message]
    right: str
    other_keys: tuple[Key, ...] = ()


def draw(rng: random.Random) -> Problem:
    persona = rng.choice(list(STYLES))
    profile = {
        "persona": persona,
        "name": rng.choice(words.NAMES),
        "city": rng.choice(words.CITIES),
        "food": rng.choice(words.FOODS),
        "color": rng.choice(words.COLORS),
        "animal": rng.choice(words.ANIMALS),
    }
    asked = _about_itself(rng, profile) if rng.random() < SELF_SHARE else _about_a_fact(rng, persona)
    system: Message = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS).format(**profile)}
    replies = in_voice(persona, asked.right)
    return Problem(
        key=asked.key,
        prompt=[system, *asked.prompt],
        reply={"role": "assistant", "content": rng.choice(replies)},
        target=replies,
        scorer="rouge",
        other_keys=asked.other_keys,
    )


def in_voice(persona: str, sentence: str) -> list[str]:
    """Every way in which a persona may say a sentence."""
    openings, closings = words.VOICES[persona]
    styled = STYLES[persona](sentence)
    return [f"{opening} {styled} {closing}" for opening, closing in itertools.product(openings, closings)]


def _about_itself(rng: random.Random, profile: dict[str, str]) -> _Asked:
    questions, answer = rng.choice(ABOUT_ITSELF)
    question, right = (text.format(**profile) for text in (rng.choice(questions), answer))
    return _Asked(("itself", profile["persona"], right), [{"role": "user", "content": question}], right)


def _about_a_fact(rng: random.Random, persona: str) -> _Asked:
    """A question of questions.py; an earlier reply is in the persona's voice too."""
    question = about_fact(rng)
    prompt = [
        {**message, "content": rng.choice(in_voice(persona, message["content"]))}
        if message["role"] == "assistant"
        else message
        for message in question.prompt
    ]
    return _Asked(question.key, prompt, question.right, question.other_keys)
