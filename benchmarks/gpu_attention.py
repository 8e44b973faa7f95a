"""Attention over the stream on a GPU: the Triton kernels against torch's FlexAttention, forward and backward.

    python -m benchmarks.gpu_attention

Claim: faster than FlexAttention, which is why the project has kernels of its own. The heads of Hymba-1.5B, 128 meta
tokens and 8,192 tokens in bfloat16, in one document and in eight; a layer with a window of 1,024 and a global one.
FlexAttention gets its block mask for nothing, and shapes that are known when it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.record import gpu_seconds, require_gpu, write_result
from hymba_tune.model.ops import triton_attention

META, TOKENS, WINDOW, ROUNDS = 128, 8192, 1024, 10
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((25, 64), (5, 64), (5, 128))
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(META + TOKENS, *shape, **options) for shape in shapes]


def ours(documents: int, window: int | None) -> Attend:
    ends = torch.arange(documents + 1, device="cuda") * (TOKENS // documents)
    return lambda q, k, v: triton_attention.segment_attention(q, k, v, ends, window=window, num_meta=META)


def flex(documents: int, window: int | None) -> Attend:
    size = TOKENS // documents

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (query - META) // size == (key - META) // size
        near = same if window is None else same & (query - key <= window)
        return (query >= key) & ((key < META) | ((query >= META) & near))

    mask = create_block_mask(visible, None, None, META + TOKENS, META + TOKENS, "cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        out: Tensor = compiled(*heads_first, block_mask=mask, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attend


def seconds(attend: Attend) -> tuple[float, float]:
    """Of the forward, and of forward and backward."""
    given = inputs()
    upstream = torch.randn_like(attend(*given))
    with torch.no_grad():
        forward = gpu_seconds(lambda: attend(*given), ROUNDS)
    return forward, gpu_seconds(lambda: attend(*given).backward(upstream), ROUNDS)


def gradients(attend: Attend) -> list[Tensor]:
    given = inputs()
    out = attend(*given)
    out.sum().backward()
    return [out.detach(), *(t.grad for t in given if t.grad is not None)]


def difference(a: Attend, b: Attend) -> float:
    """The largest of output and gradients, each relative to its size."""
    pairs = zip(gradients(a), gradients(b), strict=True)
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs)


def main() -> None:
    require_gpu()
    figures: dict[str, Any] = {}
    for documents in (1, 8):
        for window in (WINDOW, None):
            mine, theirs = ours(documents, window), flex(documents, window)
            kind = f"{documents} documents, " + ("global" if window is None else f"window {window}")
            figures[kind] = {"largest_difference": difference(mine, theirs)}
            for name, attend in (("triton", mine), ("flex", theirs)):
                forward, both = seconds(attend)
                figures[kind][name] = {"forward_ms": forward * 1e3, "forward_backward_ms": both * 1e3}
    write_result("gpu_attention", {"meta": META, "tokens": TOKENS, "layers": figures})


if __name__ == "__main__":
    main()
