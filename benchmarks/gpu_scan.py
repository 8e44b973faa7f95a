"""Selective scan on a GPU: the Triton kernels against mamba-ssm's, forward and backward.

    python -m benchmarks.gpu_scan

Claim: no slower than mamba-ssm's kernel on one document, though it also takes document starts and initial states.
8,192 tokens, 3,200 channels, 16 states, bfloat16 inputs; mamba-ssm's wants dt in the inputs' type and channels first,
and gets both for free. Without mamba-ssm only ours is timed.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import gpu_seconds, require_gpu, write_result

TOKENS, META, CHANNELS, STATES, ROUNDS = 8192, 128, 3200, 16, 20


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Any]:
    torch.manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=kind)

    wide = torch.float32
    drawn = {
        "x": normal(tokens, CHANNELS),
        "dt": normal(tokens, CHANNELS, kind=wide) - 2,
        "A": -torch.rand(CHANNELS, STATES, device="cuda") * 4,
        "B": normal(tokens, STATES),
        "C": normal(tokens, STATES),
        "D": normal(CHANNELS, kind=wide),
        "gate": normal(tokens, CHANNELS),
    }
    return {name: t.requires_grad_() for name, t in drawn.items()}


def ours(documents: int, num_meta: int = 0) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward, with this many documents of equal length."""
    from hymba_tune.model.ops.triton_scan import selective_scan

    given = inputs(torch.bfloat16, num_meta + TOKENS) | {"num_meta": num_meta}
    ends = torch.arange(documents + 1, device="cuda") * (TOKENS // documents)

    def both() -> None:
        selective_scan(**given, cu_seqlens=ends)[0].sum().backward()

    with torch.no_grad():
        forward = gpu_seconds(lambda: selective_scan(**given, cu_seqlens=ends), ROUNDS)
    return forward, gpu_seconds(both, ROUNDS)


def mamba_ssm() -> tuple[float, float]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    given = inputs(torch.bfloat16)
    leaves: dict[str, Any] = {
        name: given[name].detach().to(torch.bfloat16).t().unsqueeze(0).contiguous().requires_grad_()
        for name in ("x", "dt", "B", "C", "gate")
    }

    def scan() -> Tensor:
        return selective_scan_fn(
            leaves["x"], leaves["dt"], given["A"], leaves["B"], leaves["C"], given["D"], z=leaves["gate"],
            delta_softplus=True,
        )  # fmt: skip

    with torch.no_grad():
        forward = gpu_seconds(scan, ROUNDS)
    return forward, gpu_seconds(lambda: scan().sum().backward(), ROUNDS)


def main() -> None:
    require_gpu()
    scans = {f"ours, {n} documents": ours(n) for n in (1, 8, 64)}
    scans |= {f"ours, {META} meta tokens and {n} documents": ours(n, META) for n in (1, 64)}
    if importlib.util.find_spec("mamba_ssm") is not None:
        scans["mamba-ssm, 1 document"] = mamba_ssm()
    figures = {
        name: {"forward_ms": forward * 1e3, "forward_backward_ms": both * 1e3}
        for name, (forward, both) in scans.items()
    }
    write_result("gpu_scan", {"tokens": TOKENS, "channels": CHANNELS, "states": STATES, "scans": figures})


if __name__ == "__main__":
    main()
