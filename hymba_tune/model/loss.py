"""Cross-entropy over the vocabulary that never holds the logits of a whole batch, and computes each of them once.

The gradient of cross-entropy needs nothing but the probabilities, so it is taken while a chunk's logits are there: the
forward pass leaves the gradients of hidden states and head, the backward pass only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Tokens scored at a time: 256 x 32,001 float32 logits are 33 MB. A GPU is faster with fewer passes over the head's
# gradient, and has the room.
CHUNK, CHUNK_ON_GPU = 256, 2048
# Rows of the head that a GPU's fast products need a multiple of; 32,001 take six times as long as 32,008.
ALIGNED = 8
IGNORED = -100


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Linear, labels: Tensor, num_items: Tensor | int | None = None
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
    total: Tensor = _SummedCrossEntropy.apply(hidden, head.weight, labels)
    return total / torch.as_tensor(len(labels) if num_items is None else num_items).clamp(min=1)


class _SummedCrossEntropy(torch.autograd.Function):
    """hidden (T, C), weight (V, C), labels (T,) -> the sum of cross-entropies ()."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        for_hidden, for_weight, _ = ctx.needs_input_grad
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        words, (chunk, multiple) = len(weight), _layout(hidden)
        if words % multiple:
            weight = F.pad(weight, (0, 0, 0, -words % multiple))
        d_hidden = torch.zeros_like(hidden) if for_hidden else None
        d_weight = torch.zeros_like(weight) if for_weight else None
        if torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))  # once, not in every product
        for start in range(0, len(labels), chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = F.linear(h, weight)
            wide = logits.to(total.dtype)
            wide[:, words:] = -torch.inf
            log_probabilities = torch.log_softmax(wide, 1, out=wide)
            total -= log_probabilities.gather(1, y).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = log_probabilities.exp_()
            d_logits.scatter_add_(1, y, d_logits.new_full((), -1.0).expand(y.shape))
            d_logits = d_logits.to(logits.dtype)
            if d_hidden is not None:
                d_hidden[start : start + chunk] = d_logits @ weight
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, h)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight[:words])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = (
            None if gradient is None else gradient * d_total.to(gradient.dtype) for gradient in ctx.saved_tensors
        )
        return d_hidden, d_weight, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; in one pass unless the total is wider than the product (autocast)."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _layout(hidden: Tensor) -> tuple[int, int]:
    """Tokens of a chunk, and what the number of the head's rows must be a multiple of."""
    return (CHUNK_ON_GPU, ALIGNED) if hidden.is_cuda else (CHUNK, 1)
