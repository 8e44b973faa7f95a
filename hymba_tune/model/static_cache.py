"""Decoding in fixed buffers: a step that reads and writes the same memory each time, so that a CUDA graph can hold it.

A step of a batch launches hundreds of kernels that take less time than their launches; a graph launches them as one.
That needs every tensor at a fixed place and no question to the GPU in between: positions are tensors, one token a row
is written where the row's length says, conv inputs and scan states are changed in place.

Shapes: as in cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hymba_tune.model import ops
from hymba_tune.model.beside import second_stream
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.stream import Stream


class StaticHymbaCache(HymbaCache):
    """A filled HymbaCache, copied into buffers that stay in place; takes one token a row at a time.

    Rows that have ended may stay in it: each row is computed apart from the others.
    """

    @classmethod
    def of(cls, filled: HymbaCache, rows: Tensor | None = None) -> StaticHymbaCache:
        """A copy of some rows (default: all) of a cache.

        Raises:
            ValueError: the cache is empty, was not planned for a length, or has rows that share their beginning.
        """
        if filled.lengths is None or filled.max_length is None or filled.shared:
            raise ValueError("StaticHymbaCache takes a filled HymbaCache with max_length whose rows share nothing")
        rows = torch.arange(filled.batch_size, device=filled.lengths.device) if rows is None else rows
        new = cls(filled.config, filled.max_length)
        new.slots = filled.slots
        new.lengths = filled.lengths.index_select(0, rows)
        for layer, (held, to) in enumerate(zip(filled.layers, new.layers, strict=True)):
            for name, value in held.tensors().items():
                setattr(to, name, value.clone() if name.startswith("meta") else value.index_select(0, rows))
            if to.k is not None and to.v is not None:
                to.k, to.v = new._at_full_length(layer, to.k), new._at_full_length(layer, to.v)
        return new

    def _at_full_length(self, layer: int, held: Tensor) -> Tensor:
        """`held` (B, Hkv, capacity, d) with as many slots as the layer will ever use."""
        slots = self._capacity(0, self.max_length or 0, self.config.cache_window(layer))
        if held.shape[2] >= slots:
            return held
        grown = held.new_zeros(*held.shape[:2], slots, held.shape[3])
        grown[:, :, : held.shape[2]] = held
        return grown

    def steps_in_place(self, stream: Stream) -> bool:
        """True.

        Raises:
            ValueError: the stream is not one token a row.
        """
        if stream.shape[1] != 1 or stream.real is not None:
            raise ValueError("StaticHymbaCache takes one token a row at a time")
        return True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None) -> Tensor:
        """As HymbaCache.attend, for one token a row."""
        self.steps_in_place(stream)
        return self._attend_step(layer, q, k, v, window)

    def append(self, stream: Stream, produced: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Take in the K/V of one token a row, (B, Hkv, d) and (B, Hkv, dv)."""
        self.steps_in_place(stream)
        assert self.lengths is not None
        step = ops.steps(self.lengths.device).append_step
        for layer, (k, v) in produced.items():
            held = self.layers[layer]
            assert held.k is not None
            assert held.v is not None
            step(k, v, held.k, held.v, self.lengths)
        self.lengths += 1


class StaticDecoder:
    """Greedy decoding of a prefilled batch in a StaticHymbaCache; on a GPU the step becomes a CUDA graph.

    Rows that have ended are computed on until half of the batch has: new buffers need a new graph.

    Args:
        model: a HymbaForCausalLM.
        cache: filled by the prompts and planned for their answers.
    """

    # Steps that run before one is captured: kernels are compiled and chosen in them.
    WARM_UP = 2

    def __init__(self, model: Any, cache: HymbaCache) -> None:
        self._model = model
        self._start(StaticHymbaCache.of(cache))

    def _start(self, cache: StaticHymbaCache) -> None:
        assert cache.lengths is not None
        self._cache = cache
        self._ids = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=cache.lengths.device)
        self._rows = torch.arange(cache.batch_size, device=self._ids.device)
        self._next = self._rows
        self._replay: Callable[[], None] | None = None
        self._steps = 0

    @torch.inference_mode()
    def step(self, chosen: Tensor) -> Tensor:
        """The tokens (B,) of the rows that are kept -> the next ones (B,)."""
        self._ids[self._rows, 0] = chosen
        if self._replay is None and self._ids.is_cuda and self._steps >= self.WARM_UP:
            self._replay = self._captured()
        (self._replay or self._compute)()
        self._steps += 1
        return self._next[self._rows]

    @torch.inference_mode()
    def keep(self, kept: Tensor) -> None:
        """Go on with these (n,) of the B rows."""
        self._rows = self._rows[kept]
        if 2 * len(self._rows) <= len(self._ids):
            self._start(StaticHymbaCache.of(self._cache, self._rows))

    def _compute(self) -> None:
        logits = self._model(self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._next = logits[:, -1].argmax(-1)

    def _captured(self) -> Callable[[], None]:
        """The step as a graph. Capturing computes nothing, so the cache stays as it is."""
        graph = torch.cuda.CUDAGraph()
        second_stream(self._ids.device)  # made before the capture
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self._compute()
        return graph.replay
