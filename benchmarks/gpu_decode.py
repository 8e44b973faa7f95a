"""Decoding on a GPU: the 1.5B model, batch 128, 8K context, against the bandwidth that a step must use.

    python -m benchmarks.gpu_decode

Goal: at least 50 % of the bound. A step reads every weight once, and for each row its K/V, conv inputs and scan state
(which it also writes); the bound is those bytes over the copy bandwidth measured in the same run. The cache holds
zeros: what the numbers are does not change the time.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_training import official_shape
from benchmarks.record import gpu_seconds, require_gpu, write_result
from hymba_tune.model import HymbaCache, HymbaForCausalLM
from hymba_tune.model.static_cache import StaticDecoder

BATCH, CONTEXT, STEPS = 128, 8192, 20


def copy_bytes_per_second() -> float:
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_seconds(lambda: target.copy_(source), STEPS)


def filled_cache(model: HymbaForCausalLM) -> HymbaCache:
    room = STEPS + 8
    cache = HymbaCache(model.config, max_length=CONTEXT + room)
    cache.allocate(BATCH, torch.bfloat16, "cuda")
    cache.lengths = torch.full((BATCH,), CONTEXT, device="cuda")
    cache.slots = CONTEXT
    return cache


@torch.inference_mode()
def main() -> None:
    require_gpu()
    bandwidth = copy_bytes_per_second()
    model: Any = official_shape()
    model = model.to("cuda", torch.bfloat16).eval()
    cache = filled_cache(model)
    held = cache.nbytes()
    decoder = StaticDecoder(model, cache)
    del cache
    chosen = torch.ones(BATCH, dtype=torch.long, device="cuda")
    # Two steps before the graph is captured, one that captures: all before the first that counts.
    for _ in range(StaticDecoder.WARM_UP + 1):
        decoder.step(chosen)
    seconds = gpu_seconds(lambda: decoder.step(chosen), STEPS)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moved = weights + held["kv"] + 2 * (held["ssm"] + held["conv"])
    write_result(
        "gpu_decode",
        {
            "batch": BATCH,
            "context": CONTEXT,
            "ms_a_step": seconds * 1e3,
            "tokens_per_second": BATCH / seconds,
            "gigabytes_a_step": moved / 1e9,
            "copy_gigabytes_per_second": bandwidth / 1e9,
            "share_of_bound": moved / bandwidth / seconds,
        },
    )


if __name__ == "__main__":
    main()
