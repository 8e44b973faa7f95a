"""Training on a GPU: a step of the 1.5B model at 8,192 tokens in bfloat16, against the matrix peak of the same GPU.

    python -m benchmarks.gpu_training

Goal: 45 % of the measured peak. A step is forward and backward of one document; with float32 weights under autocast,
and with bfloat16 weights, which is how DeepSpeed holds them. Counted are 6 operations a weight of a matrix and token,
the head once and the embedding not at all, and three times attention's two products over the pairs of tokens that see
each other. The scan, the norms and what the backward pass computes again count nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.record import gpu_seconds, kernel_milliseconds, require_gpu, write_result
from hymba_tune.model import HymbaConfig, HymbaForCausalLM

TOKENS, ROUNDS = 8192, 10

# Parts of a kernel's name -> the part of the model that it computes; the first that fits.
PARTS = {
    "attention": ("attention_",),
    "scan": ("scan_",),
    "conv": ("conv_",),
    "norms, RoPE, SwiGLU": ("norm", "rotate", "swiglu"),
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas"),
}


def official_shape() -> HymbaForCausalLM:
    """Hymba-1.5B with random weights, made on the GPU."""
    config = HymbaConfig(
        vocab_size=32_001, hidden_size=1600, intermediate_size=5504, num_hidden_layers=32, num_attention_heads=25,
        num_key_value_heads=5, v_head_dim=128, sliding_window=1024, num_memory_tokens=128, mamba_dt_rank=100,
        mamba_d_state=16, global_attn_idx=[0, 15, 31], max_position_embeddings=8192,
        kv_reuse_group=[[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [16, 17, 18], [19, 20], [21, 22],
                        [23, 24], [25, 26], [27, 28], [29, 30]],
    )  # fmt: skip
    with torch.device("cuda"):
        return HymbaForCausalLM(config)


def matrix_peak() -> float:
    """Operations a second of one large bfloat16 product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / gpu_seconds(lambda: a @ b, 20)


def weight_operations(model: HymbaForCausalLM) -> int:
    """6 a weight of every matrix and token; the head is the embedding's matrix, tied."""
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "memory_tokens" not in name)
    rates = sum(p.numel() for name, p in model.named_parameters() if "A_log" in name)
    return 6 * TOKENS * (weights - rates)


def attention_operations(config: HymbaConfig) -> int:
    """Scores and weighted sums over visible pairs, 2 operations a feature, once forward and twice backward."""
    meta, place = config.num_memory_tokens, torch.arange(TOKENS)
    total = 0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer)
        seen = place if window is None else place.clamp(max=window)
        pairs = int((seen + 1 + meta).sum()) + meta * (meta + 1) // 2
        total += 3 * 2 * pairs * config.num_attention_heads * (config.head_dim() + config.value_head_dim())
    return total


def measured(model: Any, autocast: bool) -> dict[str, Any]:
    ids = torch.randint(5, model.config.vocab_size, (1, TOKENS), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    seconds = gpu_seconds(step, ROUNDS)
    return {
        "seconds_a_step": seconds,
        "tokens_per_second": TOKENS / seconds,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "kernel_ms": kernel_milliseconds(step, PARTS),
    }


def main() -> None:
    require_gpu()
    peak = matrix_peak()
    model: Any = official_shape().train()
    by_weights, by_attention = weight_operations(model), attention_operations(model.config)
    steps = {"float32 weights, autocast": measured(model, autocast=True)}
    steps["bfloat16 weights"] = measured(model.to(torch.bfloat16), autocast=False)
    for step in steps.values():
        step["share_of_peak"] = (by_weights + by_attention) / step["seconds_a_step"] / peak
        step["share_of_peak_without_attention"] = by_weights / step["seconds_a_step"] / peak
    write_result("gpu_training", {"tokens": TOKENS, "peak_teraflops": peak / 1e12, "steps": steps})


if __name__ == "__main__":
    main()
