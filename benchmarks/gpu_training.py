"""Training on a GPU: a step of the 1.5B model at 8,192 tokens in bfloat16, against the matrix peak of the same GPU.

    python -m benchmarks.gpu_training

Goal: 45 % of the measured peak. Counted are 6 operations a parameter of a matrix and token, the head once and the
embedding not at all; attention, scan and recomputation count nothing, so the GPU did more than the share says.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.record import gpu_seconds, require_gpu, write_result
from hymba_tune.model import HymbaConfig, HymbaForCausalLM

TOKENS, ROUNDS = 8192, 5


def official_shape() -> HymbaForCausalLM:
    """Hymba-1.5B with random weights."""
    config = HymbaConfig(
        vocab_size=32_001, hidden_size=1600, intermediate_size=5504, num_hidden_layers=32, num_attention_heads=25,
        num_key_value_heads=5, v_head_dim=128, sliding_window=1024, num_memory_tokens=128, mamba_dt_rank=100,
        mamba_d_state=16, global_attn_idx=[0, 15, 31], max_position_embeddings=8192,
        kv_reuse_group=[[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [16, 17, 18], [19, 20], [21, 22],
                        [23, 24], [25, 26], [27, 28], [29, 30]],
    )  # fmt: skip
    return HymbaForCausalLM(config)


def matrix_peak() -> float:
    """Operations a second of one large bfloat16 product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / gpu_seconds(lambda: a @ b, 20)


def step_operations(model: HymbaForCausalLM) -> int:
    """6 a weight of every matrix and token; the head is the embedding's matrix, tied."""
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "memory_tokens" not in name)
    rates = sum(p.numel() for name, p in model.named_parameters() if "A_log" in name)
    return 6 * TOKENS * (weights - rates)


def main() -> None:
    require_gpu()
    peak = matrix_peak()
    model: Any = official_shape()
    model = model.to("cuda").train()
    ids = torch.randint(5, model.config.vocab_size, (1, TOKENS), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    seconds = gpu_seconds(step, ROUNDS)
    write_result(
        "gpu_training",
        {
            "tokens": TOKENS,
            "seconds_a_step": seconds,
            "tokens_per_second": TOKENS / seconds,
            "peak_teraflops": peak / 1e12,
            "share_of_peak": step_operations(model) / seconds / peak,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        },
    )


if __name__ == "__main__":
    main()
