"""Items of lm-eval's multiple-choice tasks: the likeliest choice is the answer."""

import math
from collections.abc import Sequence
from typing import Any

from hymba_tune.evaluation.harness import Sample

METRIC = "acc"


def choice_item(sample: Sample, identifier: str, labels: list[str], right: int, prompt: str | None) -> dict[str, Any]:
    """A result's item.

    labels: what the choices are called; right: index of the right one; prompt: the question, None where it may not be
    shown. The answer is the likeliest label with the log-likelihood of each; a model whose likelihoods are not numbers
    has no answer.
    """
    answer, chosen = likeliest(labels, sample.responses)
    score = 0.0 if chosen is None else next(iter(sample.scores.values()))[METRIC]
    return {
        "id": identifier,
        "prompt_sha256": sample.prompt_sha256,
        "prompt": prompt,
        "answer": answer,
        "extracted": chosen,
        "target": labels[right],
        "verdict": {METRIC: score},
        "why": why_choice(chosen, bool(score)),
        "dropped_prompt_tokens": sample.dropped_prompt_tokens,
    }


def likeliest(labels: Sequence[str], responses: Sequence[Any]) -> tuple[str, str | None]:
    """Each label with its log-likelihood, as text, and the likeliest; ("", None) where one is not a number.

    responses: (log-likelihood, is greedy) of each label.
    """
    logprobs = [float(response[0]) for response in responses[: len(labels)]]
    if not logprobs or any(math.isnan(value) for value in logprobs):
        return "", None
    shown = ", ".join(f"{label} {value:.3f}" for label, value in zip(labels, logprobs, strict=True))
    return shown, labels[max(range(len(logprobs)), key=logprobs.__getitem__)]


def why_choice(chosen: str | None, right: bool) -> str:
    """The verdict on a choice in a few words."""
    if chosen is None:
        return "its likelihoods are not numbers"
    return "right" if right else f"{chosen} is likelier"
