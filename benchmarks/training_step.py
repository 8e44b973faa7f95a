"""One training step (forward + backward) of a ~50M-parameter Hymba against Llama and FalconH1 of equal size.

    python -m benchmarks.training_step [--rounds 5] [--fast]

Claims (CPU, float32, both sides at the same matmul precision): at least 0.85 x Llama's tokens/s at 4 x 512 tokens and
ahead of it at 1 x 4,096; bf16 autocast at least 1.4 x our own float32; at least 9 x FalconH1's slow path, with the SSM
settings that transformers gives it. FalconH1 with a state as small as ours and the plain reference path are reported,
not raced. The two sides alternate in one process; medians; wall and CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.falcon_h1 import FalconH1Config, FalconH1ForCausalLM

from benchmarks.record import write_result
from hymba_tune.model import HymbaConfig, HymbaForCausalLM, ops
from hymba_tune.model.precision import choose_matmul_precision

VOCABULARY = 32_001
# FalconH1's slow path takes 9 GB for two rows of 512 tokens.
FALCON_ROWS = 2
FALCONS: dict[str, dict[str, int]] = {
    "falcon_h1": {},
    "falcon_h1, our state": {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 16},
}
PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear",
    "mkldnn::_linear_pointwise",
)  # fmt: skip


def hymba() -> HymbaForCausalLM:
    """The shape of the paper's smaller models: global first, middle and last layers, K/V shared in pairs."""
    layers = 7
    config = HymbaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1664, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, v_head_dim=128, sliding_window=1024,
        global_attn_idx=[0, 3, 6], kv_reuse_group=[[1, 2], [4, 5]], num_memory_tokens=128, mamba_dt_rank=32,
    )  # fmt: skip
    return HymbaForCausalLM(config).train()


def llama() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1664, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def falcon_h1(**ssm: int) -> torch.nn.Module:
    """As wide and deep as ours; 1,024 channels in 128 heads with a state of 256, unless told otherwise."""
    keys: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1664, "num_hidden_layers": 7,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, **ssm,
    }  # fmt: skip
    return FalconH1ForCausalLM(FalconH1Config(**keys)).train()


def step(model: torch.nn.Module, ids: torch.Tensor, autocast: bool = False) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(sides: dict[str, Callable[[], None]], rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """A B A B ..: medians of wall and CPU seconds a step, tokens a wall second and a CPU second."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for function in sides.values():
        function()
    for _ in range(rounds):
        for name, function in sides.items():
            samples[name].append(timed(function))
    result = {}
    for name, values in samples.items():
        wall, cpu = (statistics.median(v[i] for v in values) for i in (0, 1))
        result[name] = {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "tokens_per_second": tokens / wall,
            "tokens_per_cpu_second": tokens / cpu,
        }
    return result


def profile(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Share of a step's CPU time in matrix products, attention, scan, conv, norms, RoPE and SwiGLU, and the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step(model, ids)
    groups = {"matrix products": 0.0, "attention": 0.0, "scan": 0.0, "conv": 0.0, "elementwise": 0.0, "rest": 0.0}
    for event in recorded.key_averages():
        groups[_group(event.key)] += event.self_cpu_time_total
    total = sum(groups.values())
    return {name: round(value / total, 4) for name, value in groups.items()}


def _group(key: str) -> str:
    lowered = key.lower()
    if "attention" in lowered:
        return "attention"
    if "selectivescan" in lowered or "selective_scan" in lowered:
        return "scan"
    if "conv" in lowered and "convert" not in lowered:
        return "conv"
    if any(name in lowered for name in ("norms", "rotate", "swiglu")):
        return "elementwise"
    if key in PRODUCTS:
        return "matrix products"
    return "rest"


def compare(shape: tuple[int, int], rounds: int, with_slow: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(5, VOCABULARY, shape)
    models = {"hymba": hymba(), "llama": llama()}
    sides: dict[str, Callable[[], None]] = {
        "hymba": lambda: step(models["hymba"], ids),
        "llama": lambda: step(models["llama"], ids),
        "hymba bf16": lambda: step(models["hymba"], ids, autocast=True),
    }
    result: dict[str, Any] = {"shape": list(shape), "sides": race(sides, rounds, ids.numel())}
    result["profile"] = profile(models["hymba"], ids)
    if with_slow:
        few = ids[:FALCON_ROWS]
        for name, ssm in FALCONS.items():
            models[name] = falcon_h1(**ssm)
            result["sides"] |= race({name: lambda model=models[name]: step(model, few)}, 1, few.numel())  # type: ignore[misc]
        with ops.use_backend("reference"):
            result["sides"] |= race({"hymba reference": lambda: step(models["hymba"], ids)}, 1, ids.numel())
    speed = {name: side["tokens_per_cpu_second"] for name, side in result["sides"].items()}
    result["ratios"] = {
        "hymba / llama": speed["hymba"] / speed["llama"],
        "hymba bf16 / hymba": speed["hymba bf16"] / speed["hymba"],
        **{f"hymba / {name}": speed["hymba"] / speed[name] for name in FALCONS if name in speed},
    }
    result["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="leave out FalconH1 and the reference path")
    arguments = parser.parse_args()
    precision = choose_matmul_precision()
    results = [
        compare((4, 512), arguments.rounds, with_slow=not arguments.fast),
        compare((1, 4096), arguments.rounds, with_slow=False),
    ]
    write_result("training_step", {"matmul_precision": precision, "runs": results})


if __name__ == "__main__":
    main()
