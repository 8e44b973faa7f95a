"""The beginning that prompts share, computed once: a benchmark's shots in front of every question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

SHORTEST, FEWEST_ROWS = 64, 3
"""A common beginning is computed apart from this many tokens and rows on; below, the second forward costs more."""


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def shared_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, if it pays to compute them apart; each prompt keeps one of its own."""
    if len(prompts) < FEWEST_ROWS:
        return []
    # What the first and the last in lexical order share, those between them share.
    ordered = sorted(map(tuple, prompts))
    length = min(common(ordered[0], ordered[-1]), min(map(len, prompts)) - 1)
    return list(prompts[0][:length]) if length >= SHORTEST else []


@torch.inference_mode()
def cache_after(model: Any, beginning: Sequence[int], cache: Any = None) -> Any:
    """The model's cache after one row of `beginning`: the empty one given, or the model's own."""
    ids = torch.tensor([beginning], device=model.device)
    mask = torch.ones_like(ids)
    output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.past_key_values
