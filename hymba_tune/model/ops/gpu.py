"""The GPU backend: Triton kernels.

Without a GPU the same code runs on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), slowly: that is how it is
tested.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DEVICES",
    "available",
    "causal_conv1d",
    "elementwise",
    "segment_attention",
    "selective_scan",
    "steps",
    "takes_queries",
]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
META_FIRST = frozenset({"causal_conv1d", "segment_attention", "selective_scan"})

_TECHNIQUE = {
    "selective_scan": "Triton kernels with meta tokens, document starts and initial states",
    "causal_conv1d": "one Triton kernel each way, with meta tokens, document starts and initial states",
    "segment_attention": "Triton kernels over what the meta tokens, documents and windows let a block see",
    "elementwise": "Triton kernels for norms, RoPE and SwiGLU",
    "steps": "Triton kernels, what a row has cached shared out to many programs",
}


def selective_scan(*inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """See reference.selective_scan. Triton is imported at the first call."""
    from hymba_tune.model.ops import triton_scan

    return triton_scan.selective_scan(*inputs, **named)


def segment_attention(*inputs: Any, **named: Any) -> Tensor:
    """See reference.segment_attention. Triton is imported at the first call."""
    from hymba_tune.model.ops import triton_attention

    return triton_attention.segment_attention(*inputs, **named)


def takes_queries(dtype: torch.dtype) -> bool:
    """Whether segment_attention may be given `queries`."""
    return False


def causal_conv1d(*inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """See reference.causal_conv1d. Triton is imported at the first call."""
    from hymba_tune.model.ops import triton_conv

    return triton_conv.causal_conv1d(*inputs, **named)


def elementwise() -> ModuleType:
    """The fused norms, RoPE and SwiGLU. Triton is imported at the first call."""
    from hymba_tune.model.ops import triton_elementwise

    return triton_elementwise


def steps() -> ModuleType:
    """See ops.steps. Triton is imported at the first call."""
    from hymba_tune.model.ops import triton_steps

    return triton_steps


def available(op: str) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed; a CUDA build of torch brings it"
    if _INTERPRETED:
        return True, f"{_TECHNIQUE[op]}, in Triton's interpreter"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA GPU"
    return True, _TECHNIQUE[op]
