"""tiny_chat and tiny_preferences: questions answered in several manners.

tiny_chat holds replies as a crowd writes them, kind ones and others, for instruction tuning. tiny_preferences holds
pairs: a kind and right reply, and one that is rude, wrong, or declines (or, where declining is right, helps with a
theft).
"""

from __future__ import annotations

import random

from hymba_tune.data.synthetic.problem import Message, Problem
from hymba_tune.data.synthetic.questions import DECLINED, Question, draw_question
from hymba_tune.data.synthetic.words import VOICES

KIND, RUDE = (VOICES[speaker] for speaker in ("kind clerk", "rude clerk"))
SORRY = "I am sorry, but"
CROWD = {"plain": 0.5, "kind": 0.25, "rude": 0.15, "declining": 0.1}
"""Manners of tiny_chat's replies and their shares."""


def draw_chat(rng: random.Random) -> Problem:
    """A question and some reply. Its scorer is that of a pair: what the crowd says is not the measure."""
    question = draw_question(rng)
    (manner,) = rng.choices(list(CROWD), list(CROWD.values()))
    return _problem(question, reply(rng, question, manner))


def draw_pair(rng: random.Random) -> Problem:
    """A question, the kind and right reply, and one with a fault."""
    question = draw_question(rng)
    faults = ("wrong", "curt") if question.harmful else ("rude", "curt", "wrong", "declining")
    return _problem(question, kindly(rng, question.right), reply(rng, question, rng.choice(faults)))


def reply(rng: random.Random, question: Question, manner: str) -> str:
    opening, closing = rng.choice(RUDE[0]), rng.choice(RUDE[1])
    replies = {
        "plain": question.right,
        "kind": kindly(rng, question.right),
        "rude": f"{opening} {question.right} {closing}",
        "curt": f"{opening} {closing}",
        "wrong": kindly(rng, question.wrong),
        "declining": kindly(rng, DECLINED),
    }
    return replies[manner]


def kindly(rng: random.Random, sentence: str) -> str:
    """A sentence said kindly; being declined, kindly too."""
    opening = SORRY if sentence == DECLINED else rng.choice(KIND[0])
    return f"{opening} {sentence} {rng.choice(KIND[1])}"


def _problem(question: Question, preferred: str, rejected: str | None = None) -> Problem:
    return Problem(
        key=question.key,
        prompt=question.prompt,
        reply=_said(preferred),
        target={
            "chosen": preferred,
            "rejected": rejected,
            "right": question.right,
            "kind": [SORRY, *KIND[0], *KIND[1]],
            "not": [*RUDE[0], *RUDE[1], *([] if question.harmful else [DECLINED])],
        },
        scorer="preference",
        tools=list(question.tools),
        other_keys=question.other_keys,
        rejected=None if rejected is None else _said(rejected),
    )


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}
