"""What decides the last bits of every sum, kept with a run so that it goes on as it began.

Threads, the precision of float32 products and the backend of each operation are set again. What a machine can't give
(other hardware, other packages, a backend that does not run here) is said: the run goes on, but not bit for bit.
"""

from __future__ import annotations

from typing import Any

from hymba_tune.provenance import hardware, version

DECISIVE_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy")

Numerics = dict[str, Any]


def fix_numerics(began: Numerics | None) -> tuple[Numerics, list[str]]:
    """Compute as a run began (None: it begins now) -> what to keep with it, and what is different here, in words."""
    import torch

    from hymba_tune.model import ops
    from hymba_tune.model.precision import choose_matmul_precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops.keep_backends({}, device)
    here: Numerics = {
        "matmul_precision": choose_matmul_precision(),
        "threads": torch.get_num_threads(),
        "backends": ops.chosen_backends(device),
        "device": torch.cuda.get_device_name() if device == "cuda" else hardware()["cpu"],
        "packages": {name: version(name) for name in DECISIVE_PACKAGES},
    }
    began = {**here, **(began or {})}
    torch.set_num_threads(began["threads"])
    differences = _differences(began, here)
    if began["matmul_precision"] == "highest" or here["matmul_precision"] == began["matmul_precision"]:
        torch.set_float32_matmul_precision(began["matmul_precision"])
    else:
        differences.append(f"float32 products in precision {began['matmul_precision']}, which is inexact here")
    differences += ops.keep_backends(began["backends"], device)
    return began, differences


def _differences(began: Numerics, here: Numerics) -> list[str]:
    found = [] if began["device"] == here["device"] else [f"on {began['device']}, this is {here['device']}"]
    for name, wanted in began["packages"].items():
        installed = here["packages"].get(name)
        if installed != wanted:
            found.append(f"with {name} {wanted}, this is {installed}")
    return found
