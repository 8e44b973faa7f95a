"""Our training step at the one shape at which the official code was measured on an equal machine.

    python -m benchmarks.official_shape [--rounds 3]

For the record, not a claim: 46.7M parameters, 4 x 512 tokens, float32, 2 threads. The official code, a plain scan in
place of its CUDA kernel, gave 931 tokens/s forward and 296 tokens/s forward + backward at best.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.record import write_result
from benchmarks.training_step import step, timed
from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from hymba_tune.model.precision import choose_matmul_precision

OFFICIAL = {"forward": 931.0, "forward + backward": 296.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    precision = choose_matmul_precision()
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=2, v_head_dim=128, sliding_window=128, num_memory_tokens=32, global_attn_idx=[0, 4, 8],
        kv_reuse_group=[[1, 2], [5, 6]],
    )  # fmt: skip
    model = HymbaForCausalLM(config)
    ids = torch.randint(5, 16384, (4, 512))

    @torch.no_grad()
    def forward() -> None:
        model.eval()(input_ids=ids, use_cache=False)

    sides = {"forward": forward, "forward + backward": lambda: step(model.train(), ids)}
    speed = {}
    for name, run in sides.items():
        run()
        walls, cpus = zip(*(timed(run) for _ in range(arguments.rounds)), strict=True)
        speed[name] = {
            "tokens_per_second": ids.numel() / statistics.median(walls),
            "best_tokens_per_second": ids.numel() / min(walls),
            "tokens_per_cpu_second": ids.numel() / statistics.median(cpus),
            "official_best_tokens_per_second": OFFICIAL[name],
        }
    parameters = sum(p.numel() for p in model.parameters())
    write_result("official_shape", {"parameters": parameters, "matmul_precision": precision, "sides": speed})


if __name__ == "__main__":
    main()
