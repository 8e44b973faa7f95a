"""Attention in blocks of queries against a dense mask, forward and backward, and its time against the length.

    python -m benchmarks.windowed_attention [--rounds 5] [--threads 2]

Claims (CPU, float32): at least 3 x a dense mask at 4,096 tokens with a window of 1,024; linear in the length beyond the
window. `dense` is torch's scaled_dot_product_attention with a mask of tokens x (prefix + tokens), which takes its
unfused path because values are wider than keys; `dense flash` pads queries and keys with zeros to the values' width so
that the fused kernel takes them. `llama` is what a Llama of this width pays: fused, causal, values as narrow as keys,
no prefix. All sides take turns in one process; medians; ratios from CPU seconds, since wall time depends on who else
computes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write_result
from benchmarks.training_step import race
from hymba_tune.model.ops import cpu_attention
from hymba_tune.model.ops.reference import visible_tokens
from hymba_tune.model.precision import choose_matmul_precision

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 8, 4, 64, 128
PREFIX, WINDOW = 128, 1024
LENGTHS = (1024, 2048, 4096, 8192, 16384)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_result(
        "windowed_attention",
        {
            "matmul_precision": choose_matmul_precision(),
            "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "width": WIDTH, "value_width": VALUE_WIDTH},
            "prefix": PREFIX,
            "window": WINDOW,
            "1 x 4096": against_dense([4096], torch.float32, arguments.rounds),
            "4 x 512": against_dense([512] * 4, torch.float32, arguments.rounds),
            "4 x 512 bfloat16": against_dense([512] * 4, torch.bfloat16, arguments.rounds),
            "64 x 32": against_dense([32] * 64, torch.float32, arguments.rounds),
            "CPU microseconds a token": by_length(arguments.rounds),
        },
    )


def against_dense(lengths: list[int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    tokens, boundaries = sum(lengths), cumulative(lengths)
    inputs = random_inputs(tokens, dtype)
    visible = F.pad(visible_tokens(boundaries, tokens, WINDOW), (PREFIX, 0), value=True)
    sides: dict[str, Callable[[], None]] = {
        "blocks": lambda: step(blocks(boundaries), inputs),
        "dense": lambda: step(dense(visible, WIDTH), inputs),
        "dense flash": lambda: step(dense(visible, VALUE_WIDTH), inputs),
        "llama": llama_step(lengths, dtype),
    }
    times = race(sides, rounds, tokens)
    ours = times["blocks"]["cpu_seconds"]
    ratios = {f"{name} / blocks": times[name]["cpu_seconds"] / ours for name in sides if name != "blocks"}
    return {"sides": times, "ratios": ratios}


def by_length(rounds: int) -> dict[str, float]:
    """One segment of each length: CPU time of a token, which stops growing once the window is full."""
    sides: dict[str, Callable[[], None]] = {}
    for tokens in LENGTHS:
        attention, inputs = blocks(cumulative([tokens])), random_inputs(tokens, torch.float32)
        sides[str(tokens)] = functools.partial(step, attention, inputs)
    times = race(sides, rounds, tokens=1)
    return {name: 1e6 * times[name]["cpu_seconds"] / int(name) for name in sides}


def blocks(boundaries: Tensor) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        return cpu_attention.segment_attention(q, k, v, boundaries, prefix_k, prefix_v, WINDOW)

    return attention


def dense(visible: Tensor, width: int) -> Attention:
    """Every query against every key, queries and keys padded to `width` features."""

    def attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        keys, values = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
        wide_q, wide_k = (F.pad(t, (0, width - WIDTH)) for t in (q, keys))
        q_, k_, v_ = (t.transpose(0, 1).unsqueeze(0) for t in (wide_q, wide_k, values))
        out = F.scaled_dot_product_attention(q_, k_, v_, visible, scale=WIDTH**-0.5, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return attention


def llama_step(lengths: list[int], dtype: torch.dtype) -> Callable[[], None]:
    """Equal segments as a batch, the way transformers calls the fused kernel."""
    batch, tokens = len(lengths), lengths[0]
    q, k, v = (
        torch.randn(batch, heads, tokens, WIDTH, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    weights = torch.randn_like(q)

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), weights)

    return run


def step(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
    *operands, weights = inputs
    torch.autograd.grad(attention(*operands), operands, weights)


def random_inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, prefix_k, prefix_v and the output's gradient"""

    def draw(count: int, heads: int, width: int) -> Tensor:
        return torch.randn(count, heads, width, dtype=dtype, requires_grad=True)

    return (
        draw(tokens, HEADS, WIDTH),
        draw(tokens, KV_HEADS, WIDTH),
        draw(tokens, KV_HEADS, VALUE_WIDTH),
        draw(PREFIX, KV_HEADS, WIDTH),
        draw(PREFIX, KV_HEADS, VALUE_WIDTH),
        torch.randn(tokens, HEADS, VALUE_WIDTH, dtype=dtype),
    )


def cumulative(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


if __name__ == "__main__":
    main()
