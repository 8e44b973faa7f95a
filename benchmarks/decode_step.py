"""One decoding step of a batch on the CPU: the compiled steps, and a beginning that is held once, against plain torch.

    python -m benchmarks.decode_step [--rows 64] [--rounds 21]

The embedded model, every row behind the same shots and a question of its own. Three caches of the same rows take the
same token in turns: as where gradients are wanted (torch over masks), by the compiled steps with each row's own copy of
the shots, and by the compiled steps with the shots held once. Their logits agree; the ratios are of a round's times.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.record import write_result
from hymba_tune.model import HymbaCache, HymbaForCausalLM, load_model
from hymba_tune.model.precision import choose_matmul_precision
from hymba_tune.model.stream import Stream
from hymba_tune.tiny import tiny_path

SHOTS, QUESTION = 1500, 200


class TorchCache(HymbaCache):
    def steps_in_place(self, stream: Stream) -> bool:
        return False


def filled(model: HymbaForCausalLM, cache: HymbaCache, rows: int, share: bool) -> HymbaCache:
    """Behind the shots and the questions, which are the same for each cache."""
    random = torch.Generator().manual_seed(0)
    shots, questions = (
        torch.randint(5, model.config.vocab_size, (n, length), generator=random)
        for n, length in ((1, SHOTS), (rows, QUESTION))
    )
    model(shots, past_key_values=cache, use_cache=True, logits_to_keep=1)
    (cache.share if share else cache.batch_repeat_interleave)(rows)
    model(questions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    choose_matmul_precision()
    model = load_model(tiny_path()).eval()
    kinds = {"torch": TorchCache(model.config), "steps": HymbaCache(model.config), "shared": HymbaCache(model.config)}
    caches = {name: filled(model, cache, arguments.rows, name == "shared") for name, cache in kinds.items()}
    token = torch.full((arguments.rows, 1), 7)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    apart = 0.0
    for _ in range(arguments.rounds):
        logits = {}
        for name, cache in caches.items():
            began = time.perf_counter()
            logits[name] = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            seconds[name].append(time.perf_counter() - began)
        apart = max(apart, *(float((found - logits["torch"]).abs().max()) for found in logits.values()))
    write_result(
        "decode_step",
        {
            "rows": arguments.rows,
            "shared_tokens": SHOTS,
            "own_tokens": QUESTION,
            "milliseconds": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
            "torch_over_steps": _ratio(seconds["torch"], seconds["steps"]),
            "torch_over_shared": _ratio(seconds["torch"], seconds["shared"]),
            "kv_bytes": {name: cache.nbytes()["kv"] for name, cache in caches.items()},
            "largest_difference_of_logits": apart,
        },
    )


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()
