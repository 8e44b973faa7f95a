"""The CPU backend: compiled kernels; torch alone without a compiler, and for attention's backward pass."""

from __future__ import annotations

from types import ModuleType

from hymba_tune.model.ops import cpu_elementwise, cpu_library, cpu_scan, cpu_steps, portable, reference_steps
from hymba_tune.model.ops.cpu_attention import segment_attention, takes_queries

__all__ = [
    "DEVICES",
    "available",
    "causal_conv1d",
    "elementwise",
    "segment_attention",
    "selective_scan",
    "steps",
    "takes_queries",
]

DEVICES = ("cpu",)


_PROBLEM = cpu_library.problem()
selective_scan = cpu_scan.selective_scan if _PROBLEM is None else portable.selective_scan
causal_conv1d = cpu_scan.causal_conv1d if _PROBLEM is None else portable.causal_conv1d
META_FIRST = frozenset({"causal_conv1d", "selective_scan"} if _PROBLEM is None else ())


def steps() -> ModuleType:
    """See ops.steps."""
    return cpu_steps if _PROBLEM is None else reference_steps


def elementwise() -> ModuleType | None:
    """See ops.elementwise."""
    return cpu_elementwise if _PROBLEM is None else None


def available(op: str) -> tuple[bool, str]:
    """Always; the reason names the technique."""
    if op == "segment_attention":
        blocks = "matrix products over blocks of queries and the keys that they may see"
        return True, blocks if _PROBLEM else f"a C kernel forward in float32 and float64; else {blocks}"
    if _PROBLEM is None:
        return True, f"C kernels compiled by {cpu_library.find_compiler()}"
    if op == "elementwise":
        return True, f"torch, one operation after the other: {_PROBLEM}"
    if op == "steps":
        return True, f"plain torch, one token a row: {_PROBLEM}"
    return True, f"torch in chunks, several times slower than the C kernels: {_PROBLEM}"
