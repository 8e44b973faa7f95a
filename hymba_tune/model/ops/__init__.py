"""The one place that decides which backend computes selective scan, causal conv, segment attention and norms.

`auto` takes the first backend for the tensors' device that can run and logs that once; a backend that the user names
either runs or raises. Signatures, shapes and semantics of the three sequence operations: reference.py. `elementwise`
(norms, RoPE, SwiGLU) is plain torch in the model; a backend may have a module of kernels for it. `steps` is what the
three do to one more token a row in decoding: reference_steps.py.
"""

import functools
import importlib
import logging
import os
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from hymba_tune.errors import UserError
from hymba_tune.model.ops import meta_first

__all__ = [
    "BACKENDS",
    "OpChoice",
    "causal_conv1d",
    "chosen_backends",
    "elementwise",
    "explain",
    "keep_backends",
    "segment_attention",
    "selective_scan",
    "steps",
    "use_backend",
]

logger = logging.getLogger(__name__)

OPS = ("selective_scan", "causal_conv1d", "segment_attention", "elementwise", "steps")
BACKENDS = ("auto", "reference", "cpu", "triton", "packages")
ENVIRONMENT_VARIABLE = "HYMBA_TUNE_BACKEND"

# A backend is a module with the operations as functions, DEVICES that it runs on, META_FIRST, the operations that take
# meta tokens in front of the segments, `takes_queries(dtype)`, whether its attention may be asked by some tokens only,
# and `available(op) -> (ok, reason)`.
_MODULES = {
    "triton": "hymba_tune.model.ops.gpu",
    "cpu": "hymba_tune.model.ops.cpu",
    "reference": "hymba_tune.model.ops.reference",
    "packages": "hymba_tune.model.ops.packages",
}
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton",)}


class OpChoice(NamedTuple):
    """One line of `doctor`: what a backend can do for an operation here, and why."""

    op: str
    backend: str
    available: bool
    reason: str


class use_backend:
    """Choose the backend for every operation from now on, or for a `with` block: `with use_backend("reference"):`."""

    def __init__(self, name: str) -> None:
        global _chosen
        self._previous = _chosen
        _chosen = _checked(name, "model.backend")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gated selective scan over segments -> (y, final_state); see reference.selective_scan.

    `num_meta` meta tokens in front of them: see meta_first.selective_scan; then there is no initial state.
    """
    backend = _backend("selective_scan", x.device.type)
    if num_meta and "selective_scan" not in backend.META_FIRST:
        return meta_first.selective_scan(backend.selective_scan, x, dt, A, B, C, D, gate, cu_seqlens, num_meta)
    native = {"num_meta": num_meta} if num_meta else {}
    return backend.selective_scan(x, dt, A, B, C, D, gate, cu_seqlens, initial_state, **native)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal conv + bias + silu over segments -> (y, final_state); see reference.causal_conv1d.

    `num_meta` meta tokens in front of them: see meta_first.causal_conv1d; then there is no initial state.
    """
    backend = _backend("causal_conv1d", x.device.type)
    if num_meta and "causal_conv1d" not in backend.META_FIRST:
        return meta_first.causal_conv1d(backend.causal_conv1d, x, weight, bias, cu_seqlens, num_meta)
    native = {"num_meta": num_meta} if num_meta else {}
    return backend.causal_conv1d(x, weight, bias, cu_seqlens, initial_state, **native)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
    num_meta: int = 0,
    queries: Tensor | None = None,
) -> Tensor:
    """Windowed causal attention over segments with a shared prefix -> (T, H, dv); see reference.segment_attention.

    `num_meta` meta tokens in front of them are that prefix: see meta_first.segment_attention. `queries` do not count
    them.
    """
    backend = _backend("segment_attention", q.device.type)
    if queries is not None and not backend.takes_queries(q.dtype):
        at = queries + num_meta
        every = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, at, q)
        return segment_attention(every, k, v, cu_seqlens, prefix_k, prefix_v, window, num_meta)[at]
    asked = {} if queries is None else {"queries": queries}
    if num_meta and "segment_attention" not in backend.META_FIRST:
        return meta_first.segment_attention(backend.segment_attention, q, k, v, cu_seqlens, window, num_meta, **asked)
    native = {"num_meta": num_meta} if num_meta else {}
    return backend.segment_attention(q, k, v, cu_seqlens, prefix_k, prefix_v, window, **native, **asked)


def elementwise(device: torch.device) -> ModuleType | None:
    """The kernels rms_norm, mean_of_norms, rotate and swiglu for a device; None where the model's formulas compute."""
    kernels: ModuleType | None = _backend("elementwise", device.type).elementwise()
    return kernels


def steps(device: torch.device) -> ModuleType:
    """The module with attention_step, conv_step and scan_step for a device; see reference_steps."""
    module: ModuleType = _backend("steps", device.type).steps()
    return module


def explain() -> list[OpChoice]:
    """Every operation in every backend: whether it can run here, and why. Last comes what `auto` never takes."""
    return [OpChoice(op, name, *_load(name).available(op)) for op in OPS for name in _MODULES]


def chosen_backends(device: str) -> dict[str, str]:
    """{operation: the backend that computes it on a device ("cpu", "cuda")}, as things are set now."""
    return {op: _backend(op, device).__name__.rpartition(".")[2] for op in OPS}


def keep_backends(backends: Mapping[str, str], device: str) -> list[str]:
    """Have `auto` take these backends from now on, as a run began with them; {} frees it again.

    Returns what can't be had here, a sentence each; `auto` goes on choosing there. A backend named by the user stays.
    """
    _kept.clear()
    missing = []
    for op, name in backends.items():
        chosen = chosen_backends(device).get(op)
        if chosen == name:
            continue
        ok, reason = _load(name).available(op) if name in _MODULES else (False, "it is not part of this version")
        if ok and _chosen == "auto" and device in _load(name).DEVICES:
            _kept[op] = name
        else:
            missing.append(f"{op} by backend {name}, here it is {chosen} ({reason})")
    return missing


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"{source}: {name!r} is no backend; choose one of {', '.join(BACKENDS)}")
    return name


def _from_environment() -> str:
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


_chosen = _from_environment()
_kept: dict[str, str] = {}


def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def _backend(op: str, device: str) -> ModuleType:
    name = _kept.get(op, "auto") if _chosen == "auto" else _chosen
    return _automatic(op, device) if name == "auto" else _named(name, op, device)


@functools.cache
def _automatic(op: str, device: str) -> ModuleType:
    for name in (*_PREFERENCE.get(device, ()), "reference"):
        ok, reason = _load(name).available(op)
        if ok:
            logger.info("%s on %s: backend %s (%s)", op, device, name, reason)
            return _load(name)
    raise AssertionError("the reference backend is always available")


@functools.cache
def _named(name: str, op: str, device: str) -> ModuleType:
    module = _load(name)
    ok, reason = module.available(op)
    if device not in module.DEVICES:
        ok, reason = False, f"it runs on {' or '.join(module.DEVICES)}, the tensors are on {device}"
    if not ok:
        raise UserError(f"model.backend: {name} can't run {op}: {reason}; use auto or reference")
    return module
