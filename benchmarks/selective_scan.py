"""Selective scan, forward and backward: the CPU backends against a fair sequential loop, and time against length.

    python -m benchmarks.selective_scan

Claims: compiled, at least 12 times the fair loop, 30 is the mark; linear in the length from 512 to 16,384 tokens.
The fair loop computes decays and drives of all steps at once and goes through them with `unbind` (reference.py on four
sequences of equal length does that); a loop that indexes each step instead would make autograd's backward quadratic.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

# The loops meet at thousands of barriers, where by default threads wait actively: on a machine with other work that
# makes two threads ten times slower than one, and would flatter the kernels.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from benchmarks.record import write_result
from hymba_tune.model.ops import cpu_scan, portable, reference

CHANNELS, STATES = 1024, 16
ROUNDS = 5
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


class Times(NamedTuple):
    """Seconds; cpu is user and system together."""

    wall: float
    cpu: float
    user: float


Scan = Callable[..., tuple[Tensor, Tensor]]
BACKENDS: dict[str, Scan] = {
    "compiled": cpu_scan.selective_scan,
    "torch alone": portable.selective_scan,
    "fair loop": reference.selective_scan,
}


def main() -> None:
    threads = torch.get_num_threads()
    figures: dict[str, Any] = {f"on {n} threads": against_the_loop(n) for n in sorted({1, threads})}
    torch.set_num_threads(1)
    figures["CPU microseconds a token"] = {dtype: by_length(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    torch.set_num_threads(threads)
    write_result("selective_scan", {"shape": f"4 x 512 tokens, {CHANNELS} channels, {STATES} states", **figures})


def against_the_loop(threads: int) -> dict[str, object]:
    """Medians over rounds in which all backends take turns; each ratio is to the loop of its own round."""
    torch.set_num_threads(threads)
    inputs = random_inputs(4, 512)
    rounds = [
        {name: timed(scan, inputs, repeats=1 if name == "fair loop" else 5) for name, scan in BACKENDS.items()}
        for _ in range(ROUNDS)
    ]

    return {
        name: {
            "wall seconds": statistics.median(times[name].wall for times in rounds),
            "CPU seconds": statistics.median(times[name].cpu for times in rounds),
            "times faster by the wall": statistics.median(t["fair loop"].wall / t[name].wall for t in rounds),
            "times faster in CPU time": statistics.median(t["fair loop"].cpu / t[name].cpu for t in rounds),
        }
        for name in BACKENDS
    }


def by_length(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Forward and backward of one sequence, the best of several rounds.

    `computing` is time in user mode; `with fresh memory` adds the system's, which is linear only in pieces: allocations
    of more than 32 MB, from 8,192 float32 tokens on, come from the system anew each time.
    """
    best: dict[int, Times] = {}
    for _ in range(ROUNDS):
        for length in LENGTHS:
            times = timed(cpu_scan.selective_scan, random_inputs(1, length, dtype), repeats=16384 // length)
            best[length] = min(times, best.get(length, times), key=lambda t: t.user)
    return {
        str(length): {"computing": t.user / length * 1e6, "with fresh memory": t.cpu / length * 1e6}
        for length, t in best.items()
    }


def random_inputs(sequences: int, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tokens = sequences * length
    shapes = {"x": CHANNELS, "dt": CHANNELS, "B": STATES, "C": STATES, "gate": CHANNELS}
    inputs = {name: torch.randn(tokens, width).to(dtype) for name, width in shapes.items()}
    inputs["dt"] = inputs["dt"].float() - 3
    inputs["A"] = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    inputs["D"] = torch.ones(CHANNELS)
    inputs["initial_state"] = torch.randn(1, CHANNELS, STATES)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    return leaves | {"cu_seqlens": torch.arange(0, tokens + 1, length)}


def timed(scan: Scan, inputs: dict[str, Tensor], repeats: int) -> Times:
    """Mean seconds of a forward and backward."""
    leaves, upstream = [t for t in inputs.values() if t.requires_grad], torch.ones_like(inputs["x"])
    before = os.times()
    for _ in range(repeats):
        y, _ = scan(**inputs)
        torch.autograd.grad(y, leaves, upstream)
    after = os.times()
    user, system = after.user - before.user, after.system - before.system
    return Times(*(seconds / repeats for seconds in (after.elapsed - before.elapsed, user + system, user)))


if __name__ == "__main__":
    main()
