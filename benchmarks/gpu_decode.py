"""Decoding on a GPU: the 1.5B model, batch 128, 8K context, against the bandwidth that a step must use.

    python -m benchmarks.gpu_decode

Goal: at least 50 % of the bound. A step reads every weight once, and for each row its K/V, conv inputs and scan state
(which it also writes); the bound is those bytes over the copy bandwidth measured in the same run. Layers that share K/V
read them once each, which the bound does not count. The cache holds zeros: what the numbers are does not change the
time. That the same path computes the right numbers is checked first, on a small batch against plain torch, and a
profile of one step says where the time goes.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_training import official_shape
from benchmarks.record import gpu_seconds, kernel_milliseconds, require_gpu, write_result
from hymba_tune.model import HymbaCache, HymbaForCausalLM, ops
from hymba_tune.model.static_cache import StaticDecoder, StaticHymbaCache

BATCH, CONTEXT, STEPS = 128, 8192, 20
CHECKED_LENGTHS = (1500, 1, 700, 1024)
# Parts of a step by names of kernels; what fits none is the rest.
PARTS = {
    "attention": ("attend", "join", "append"),
    "conv_and_scan": ("conv", "scan"),
    "products": ("gemm", "nvjet", "cutlass", "splitK", "gemv"),
}


def copy_bytes_per_second() -> float:
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_seconds(lambda: target.copy_(source), STEPS)


def filled_cache(model: HymbaForCausalLM, lengths: torch.Tensor, room: int) -> HymbaCache:
    """Zeros for rows of these lengths (B,), and space for `room` tokens more."""
    longest = int(lengths.max())
    cache = HymbaCache(model.config, max_length=longest + room)
    cache.allocate(len(lengths), torch.bfloat16, "cuda")
    cache.lengths, cache.slots = lengths.cuda(), longest
    return cache


def largest_difference(model: Any) -> dict[str, float]:
    """Of a step's logits from plain torch in float32, for Triton and for plain torch in bfloat16, over their spread."""
    lengths = torch.tensor(CHECKED_LENGTHS)
    cache = filled_cache(model, lengths, room=2)
    generator = torch.Generator("cuda").manual_seed(0)
    for layer in cache.layers:
        for value in layer.tensors().values():
            value.normal_(generator=generator)
    ids = torch.arange(5, 5 + len(lengths), device="cuda")[:, None]

    def logits(backend: str) -> torch.Tensor:
        with ops.use_backend(backend):
            return model(ids, past_key_values=StaticHymbaCache.of(cache), use_cache=True).logits.double()

    rounded = {backend: logits(backend) for backend in ("triton", "reference")}
    model.float()
    for layer in cache.layers:
        vars(layer).update({name: value.float() for name, value in layer.tensors().items()})
    exact = logits("reference")
    model.to(torch.bfloat16)
    return {name: float((found - exact).abs().max() / exact.std()) for name, found in rounded.items()}


@torch.inference_mode()
def main() -> None:
    require_gpu()
    torch.manual_seed(0)
    bandwidth = copy_bytes_per_second()
    model: Any = official_shape()
    model = model.to(torch.bfloat16).eval()
    differences = largest_difference(model)
    # Both round at other places; neither may be further from the truth than rounding makes it.
    if not differences["triton"] <= 2 * differences["reference"]:
        raise SystemExit(f"Triton's logits are not those of plain torch: {differences}")
    cache = filled_cache(model, torch.full((BATCH,), CONTEXT), room=STEPS + 8)
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
            "kernels_ms_one_after_another": kernel_milliseconds(decoder._compute, PARTS),
            "largest_difference_of_logits_from_float32": differences,
        },
    )


if __name__ == "__main__":
    main()
