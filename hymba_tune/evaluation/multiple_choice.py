"""Items of lm-eval's multiple-choice tasks: the likeliest choice is the answer."""

import math
from typing import Any

from hymba_tune.evaluation.harness import Sample

METRIC = "acc"


def choice_item(sample: Sample, identifier: str, labels: list[str], right: int, prompt: str | None) -> dict[str, Any]:
    """A result's item.

    labels: what the choices are called; right: index of the right one; prompt: the question, None where it may not be
    shown. The answer is the likeliest label with the log-likelihood of each; a model whose likelihoods are not numbers
    has no answer.
    """
    logprobs = [float(response[0]) for response in sample.responses]
    broken = any(math.isnan(value) for value in logprobs)
    chosen = None if broken else labels[max(range(len(logprobs)), key=logprobs.__getitem__)]
    score = next(iter(sample.scores.values()))[METRIC]
    return {
        "id": identifier,
        "prompt_sha256": sample.prompt_sha256,
        "prompt": prompt,
        "answer": ""
        if broken
        else ", ".join(f"{label} {value:.3f}" for label, value in zip(labels, logprobs, strict=True)),
        "extracted": chosen,
        "target": labels[right],
        "verdict": {METRIC: 0.0 if broken else score},
        "why": "its likelihoods are not numbers" if broken else "right" if score else f"{chosen} is likelier",
        "dropped_prompt_tokens": sample.dropped_prompt_tokens,
    }
