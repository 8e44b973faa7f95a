"""Cross-entropy over the vocabulary that never holds the logits of a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Tokens scored at a time: 256 x 32,001 float32 logits are 33 MB.
CHUNK = 256
IGNORED = -100


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of labels (..,) under the logits head(hidden) (.., V), summed in float32.

    Args:
        hidden: (.., C).
        num_items: divide by this instead of the number of labels that are not -100 (gradient accumulation).

    Returns:
        () float32 (float64 for float64 input); 0, with zero gradients, where every label is -100.
    """
    scored = labels.flatten() != IGNORED
    hidden, labels = hidden.flatten(0, -2)[scored], labels.flatten()[scored]
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        total = total + checkpoint(_summed, h, head, y, use_reentrant=False)
    return total / torch.as_tensor(len(labels) if num_items is None else num_items).clamp(min=1)


def _summed(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
