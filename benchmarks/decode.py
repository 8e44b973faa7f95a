"""Decoding many sequences at once: tokens/s of batch 64 against batch 1, token for token equal.

    python -m benchmarks.decode [--rounds 3]

Claim (CPU, float32): batch 64 gives at least 9 x the tokens/s of batch 1. Both sides prefill the same prompts and
decode the same number of greedy tokens through `generate` and a HymbaCache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.record import write_result
from benchmarks.training_step import VOCABULARY, hymba
from hymba_tune.model.precision import choose_matmul_precision

PROMPT, NEW = 64, 64


@torch.no_grad()
def decode(model: Any, prompts: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Greedy tokens (B, NEW), and the tokens a second over prefill and decoding."""
    began = time.perf_counter()
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[:, PROMPT:], out[:, PROMPT:].numel() / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    choose_matmul_precision()
    torch.manual_seed(0)
    model = hymba().eval()
    prompts = torch.randint(5, VOCABULARY, (arguments.batch, PROMPT))
    decode(model, prompts[:2])
    alone: list[float] = []
    together: list[float] = []
    equal = 0
    for i in range(arguments.rounds):
        one, speed = decode(model, prompts[i : i + 1])
        alone.append(speed)
        many, speed = decode(model, prompts)
        together.append(speed)
        equal += int((many[i] == one[0]).all())
    write_result(
        "decode",
        {
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "batch": arguments.batch,
            "tokens_per_second_batch_1": statistics.median(alone),
            "tokens_per_second_batch": statistics.median(together),
            "ratio": statistics.median(together) / statistics.median(alone),
            "rows_compared": arguments.rounds,
            "rows_equal": equal,
        },
    )


if __name__ == "__main__":
    main()
