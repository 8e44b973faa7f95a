"""Bytes of one GPU where DeepSpeed shares a training's states out over processes (ZeRO, arXiv 1910.02054).

With bfloat16 DeepSpeed holds, for each parameter, the weight (2 bytes), and for each trained one its gradient in
bfloat16 (2) and float32 (4), a float32 master (4) and Adam's two moments (8). A stage divides some of it by processes:

    stage        weights               gradients    optimizer    sum, all trained
    0            2                     6            12           20
    1            2                     2 + 4/N      12/N         4 + 16/N
    2            2                     6/N          12/N         2 + 18/N
    3            2/N + gathered        4/N          12/N         18/N + gathered
    3, offload   gathered              -            -            18/N in the machine's memory

gathered: 4 bytes for each parameter of the largest layer. Stages 2 and 3 are the sums of DeepSpeed's own estimator.
"""

from __future__ import annotations

from dataclasses import dataclass

from hymba_tune.geometry import Geometry


@dataclass(frozen=True)
class States:
    """Bytes of one process on its GPU, and in the machine's memory."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0


def zero_states(total: int, trained: int, largest: int, processes: int) -> dict[str, States]:
    """The states under every stage, by name.

    Args:
        total, trained, largest: parameters in all, those that learn, and those of the largest layer.
    """
    n, gathered = processes, 4 * largest
    return {
        "ZeRO-0 (DDP)": States(2 * total, 6 * trained, 12 * trained),
        "ZeRO-1": States(2 * total, 2 * trained + 4 * trained // n, 12 * trained // n),
        "ZeRO-2": States(2 * total, 6 * trained // n, 12 * trained // n),
        "ZeRO-3": States(2 * total // n + gathered, 4 * trained // n, 12 * trained // n),
        "ZeRO-3, offload": States(gathered, 0, 0, (2 * total + 16 * trained) // n),
    }


def largest_layer(geometry: Geometry) -> int:
    """Parameters of the largest module: what ZeRO-3 gathers at a time."""
    layers = range(len(geometry.letters))
    projections = [wide * tall for layer in layers for wide, tall in geometry.projections(layer).values()]
    return max(geometry.vocab * geometry.hidden, *projections)
