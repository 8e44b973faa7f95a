"""Cross-entropy over the vocabulary, forward and backward: memory and time of the loss that training uses.

    python -m benchmarks.cross_entropy [--rounds 5] [--threads 2]

Claim (CPU, float32, 2,048 tokens, 32,001 words, hidden size 512): chunked_cross_entropy needs at most a third of the
memory of the plain loss, at no time cost. `fused` is torch's own chunked loss, where torch has it (2.13 and later).
Each variant runs in processes of its own, in turns. Its memory is the highest resident size of the process over the
size just before the step, when operands, gradients and libraries were already there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import write_result
from hymba_tune.model.loss import chunked_cross_entropy
from hymba_tune.model.precision import choose_matmul_precision

TOKENS, HIDDEN, VOCABULARY = 2048, 512, 32_001


def plain(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), labels)


def fused(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, labels, options=options)


VARIANTS: dict[str, Callable[[Tensor, nn.Linear, Tensor], Tensor]] = {
    "plain": plain,
    "chunked": chunked_cross_entropy,
    "fused": fused,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one and print it (what a round starts)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.variant:
        print(json.dumps(measure(arguments.variant)))
        return
    names = [name for name in VARIANTS if name != "fused" or hasattr(F, "linear_cross_entropy")]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            samples[name].append(in_own_process(name, arguments.threads))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in samples.items()
    }
    ratios = {
        f"{name} / plain": {key: medians[name][key] / medians["plain"][key] for key in ("peak_bytes", "cpu_seconds")}
        for name in names[1:]
    }
    shape = {"tokens": TOKENS, "hidden": HIDDEN, "vocabulary": VOCABULARY}
    write_result("cross_entropy", {**shape, "sides": medians, "ratios": ratios})


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def in_own_process(variant: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cross_entropy", "--variant", variant, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(variant: str) -> dict[str, float]:
    """The first step's memory, then the time of a second one."""
    from benchmarks.training_step import timed

    choose_matmul_precision()
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    few = slice(0, 8)
    VARIANTS[variant](hidden[few], head, labels[few]).backward()
    assert head.weight.grad is not None
    head.weight.grad.zero_()
    before = resident_bytes()
    VARIANTS[variant](hidden, head, labels).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    wall, cpu = timed(lambda: VARIANTS[variant](hidden, head, labels).backward())
    return {"peak_bytes": peak, "wall_seconds": wall, "cpu_seconds": cpu}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
