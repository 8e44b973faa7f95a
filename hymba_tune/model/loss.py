"""Cross-entropy over the vocabulary that never holds the logits of a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens scored at a time: 256 x 32,001 float32 logits are 33 MB.
CHUNK = 256
IGNORED = -100


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of labels (..,) under logits hidden (.., C) @ weight (V, C).T, summed in float32.

    Args:
        num_items: divide by this instead of the number of labels that are not -100 (gradient accumulation).
    """
    scored = labels.flatten() != IGNORED
    hidden, labels = hidden.flatten(0, -2)[scored], labels.flatten()[scored]
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        total = total + checkpoint(_summed, h, weight, y, use_reentrant=False)
    return total / (len(labels) if num_items is None else num_items)


def _summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
