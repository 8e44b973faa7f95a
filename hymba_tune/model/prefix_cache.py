"""A beginning that many rows share: one row's cache, which every row of a batch continues and none changes.

The keys and values of a benchmark's shots are held once. A global layer scores them as it scores the meta tokens: all
rows' queries together, whatever each row's length.

Shapes: as in cache.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hymba_tune.model import ops
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.stream import Stream


class PrefixCache(HymbaCache):
    """The cache of one row, for rows that are computed to their end in one forward: what they add is not kept."""

    @classmethod
    def of(cls, filled: HymbaCache, rows: int) -> PrefixCache:
        """A cache that `rows` rows continue; it shares its tensors with `filled`.

        Raises:
            ValueError: `filled` does not hold exactly one row without padding.
        """
        if filled.lengths is None or filled.lengths.tolist() != [filled.slots] or filled.shared:
            raise ValueError("PrefixCache takes the cache of one row without padding")
        new = cls(filled.config)
        new.layers, new.slots = filled.layers, filled.slots
        new.lengths = filled.lengths.expand(rows)
        return new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None) -> Tensor:
        """As HymbaCache.attend: (T, H, dv)."""
        if window is not None:
            return super().attend(layer, q, k, v, stream, window)
        held = self.layers[layer]
        assert held.k is not None
        assert held.v is not None
        assert held.meta_k is not None
        assert held.meta_v is not None
        prefix_k = torch.cat([held.meta_k, held.k[0, :, : self.slots].transpose(0, 1)])
        prefix_v = torch.cat([held.meta_v, held.v[0, :, : self.slots].transpose(0, 1)])
        return ops.segment_attention(q, k, v, stream.cu_seqlens, prefix_k, prefix_v)

    def steps_in_place(self, stream: Stream) -> bool:
        """No: all rows share one."""
        return False

    def states(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The row's conv inputs and scan state, for each of the B rows."""
        held = super().states(layer)
        if held is None:
            return None
        conv, ssm = held
        return conv.expand(self.batch_size, -1, -1).contiguous(), ssm.expand(self.batch_size, -1, -1).contiguous()

    def append(self, stream: Stream, produced: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Nothing: the rows end here."""

    def set_states(self, layer: int, conv: Tensor, ssm: Tensor) -> None:
        """Nothing: the rows end here."""
