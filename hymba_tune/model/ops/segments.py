"""What is derived from a tensor of document boundaries, made once and kept as long as that tensor lives.

Every layer of a forward pass asks for the same, and on a GPU each small launch costs as much as a useful one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Derived = TypeVar("Derived")

_kept = WeakTensorKeyDictionary()
"""cu_seqlens -> {kind: what is derived}."""


class Owners(NamedTuple):
    """The segment of each token, by its number and by its first token; both (T,) int64."""

    segments: Tensor
    firsts: Tensor


def kept(cu_seqlens: Tensor, kind: Hashable, derive: Callable[[], Derived]) -> Derived:
    """What `derive` makes for this tensor, made at the first call with that kind.

    It must hold neither the tensor nor a view of it, which would keep both for ever, and the tensor's values must stay.
    """
    derived: dict[Hashable, Derived] = _kept.setdefault(cu_seqlens, {})
    if kind not in derived:
        # Training may ask for what evaluation made, and autograd saves no tensor that was made in inference mode.
        with torch.inference_mode(False):
            derived[kind] = derive()
    return derived[kind]


def boundaries(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """cu_seqlens as int64 without gaps on a device: the tensor itself, or one copy for all layers."""
    if cu_seqlens.device == device and cu_seqlens.dtype == torch.long and cu_seqlens.is_contiguous():
        return cu_seqlens
    # A copy even where a view would do: see kept.
    return kept(cu_seqlens, ("boundaries", device), lambda: cu_seqlens.to(device, torch.long, copy=True).contiguous())


def refuse_two_beginnings(num_meta: int, initial_state: Tensor | None) -> None:
    """Raises ValueError for an initial state of documents that continue meta tokens."""
    if num_meta and initial_state is not None:
        raise ValueError("initial_state is what the num_meta tokens leave: it can't be given with them")


def owners(cu_seqlens: Tensor, tokens: int) -> Owners:
    """Of tokens 0 to T - 1; cu_seqlens is int64 and contiguous."""
    return kept(cu_seqlens, ("owners", tokens), lambda: _owners(cu_seqlens, tokens))


def _owners(cu_seqlens: Tensor, tokens: int) -> Owners:
    position = torch.arange(tokens, device=cu_seqlens.device)
    segments = torch.bucketize(position, cu_seqlens[1:], right=True)
    return Owners(segments, cu_seqlens[segments])
