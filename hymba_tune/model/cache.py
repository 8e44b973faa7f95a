"""HymbaCache: what a batch of conversations leaves behind, and attention over it.

K/V live with their producers only: the meta tokens' once for the whole batch, a global layer's for every token, a
windowed layer's in a ring of W positions. Every layer with an SSM branch keeps the last K raw conv inputs and the state
of its scan in float32. Rows may have different lengths; padding is never stored. What rows share, `share`, lies behind
the meta tokens in global layers, and counts as such there.

Shapes: B rows, L slots a row in this call, H heads, G query heads a K/V head, P cached positions, M meta tokens, d/dv
features of a key/value head, Dn channels, N state size, K conv width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from hymba_tune.model import ops
from hymba_tune.model.config import HymbaConfig
from hymba_tune.model.precision import exact_products
from hymba_tune.model.stream import Stream

# Queries attended at a time when a long chunk continues a cache: bounds the scores at 256 x (M + P + L) a head.
_QUERY_BLOCK = 256
# A cache without a length to plan for grows by at least this many positions at a time.
_GROWTH = 256


@dataclass
class LayerCache:
    """One layer's share of the cache; None where the layer has no such branch or produces no K/V."""

    meta_k: Tensor | None = None
    """(M, Hkv, d), in a global layer (M + shared, Hkv, d)"""
    meta_v: Tensor | None = None
    k: Tensor | None = None
    """(B, Hkv, capacity, d); position p (behind what is shared) lies in slot p, modulo W in a windowed layer"""
    v: Tensor | None = None
    conv: Tensor | None = None
    """(B, Dn, K): the last K inputs of the conv, newest last"""
    ssm: Tensor | None = None
    """(B, Dn, N) float32"""

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def select_rows(self, rows: Tensor) -> None:
        def selected(held: Sequence[Tensor]) -> Tensor:
            return held[0].index_select(0, rows.to(held[0].device))

        for name in ("k", "v", "conv", "ssm"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _in_order([value], selected))


@dataclass
class _Turn:
    """Where the tokens of this call go: shared by all layers."""

    rows: Tensor
    """(T,) row of each token"""
    positions: Tensor
    """(T,) its place in the row's document"""
    lengths: Tensor
    """(B,) tokens of each row after this call"""


@dataclass(eq=False)
class HymbaCache(Cache):
    """Cache of a HymbaForCausalLM for transformers' `generate` (its Cache API) and for calls by hand.

    Args:
        config: the model's.
        max_length: slots a row to plan for (prompt with padding + new tokens); None grows as needed.
    """

    config: HymbaConfig
    max_length: int | None = None
    layers: list[LayerCache] = field(init=False)  # type: ignore[assignment]
    lengths: Tensor | None = field(init=False, default=None)
    slots: int = field(init=False, default=0)
    shared: int = field(init=False, default=0)
    """Tokens that all rows begin with, which global layers hold once, behind the meta tokens: see `share`."""

    def __post_init__(self) -> None:
        self.offloading = False
        self.layers = [LayerCache() for _ in range(self.config.num_hidden_layers)]

    @classmethod
    def joined(cls, parts: Sequence[HymbaCache], slots: int) -> HymbaCache:
        """The rows of several filled caches of one model as one batch.

        Args:
            slots: of a row, padding included; what rows have more than their part's counts as padding on the left.

        Raises:
            ValueError: a part is empty, has more slots, or has rows that share their beginning.
        """
        if not parts or any(part.lengths is None or part.slots > slots or part.shared for part in parts):
            raise ValueError(f"HymbaCache.joined takes filled caches of at most {slots} slots that share nothing")
        new = cls(parts[0].config, parts[0].max_length)
        new.lengths, new.slots = torch.cat([part.lengths for part in parts if part.lengths is not None]), slots
        for layer, held in zip(new.layers, zip(*(part.layers for part in parts), strict=True), strict=True):
            layer.meta_k, layer.meta_v = held[0].meta_k, held[0].meta_v
            for name in ("k", "v", "conv", "ssm"):
                values = [value for one in held if (value := getattr(one, name)) is not None]
                setattr(layer, name, _in_order(values, _stacked) if values else None)
        return new

    def append(self, stream: Stream, produced: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Take in the K/V that each producer computed over the stream: (num_meta + T, Hkv, d) and (.., dv)."""
        if self.steps_in_place(stream):
            self._append_step(produced)
        else:
            self._append_rows(stream, produced)
        self.slots += stream.shape[1]

    def _append_step(self, produced: dict[int, tuple[Tensor, Tensor]]) -> None:
        """One token a row."""
        assert self.lengths is not None
        step, longest = ops.steps(self.lengths.device).append_step, int(self.lengths.max()) + 1
        for layer, (k, v) in produced.items():
            held_k, held_v = self._with_room(layer, k, v, len(self.lengths), longest)
            step(k, v, held_k, held_v, self.lengths - self._held_once(layer))
        self.lengths = self.lengths + 1

    def _append_rows(self, stream: Stream, produced: dict[int, tuple[Tensor, Tensor]]) -> None:
        turn = self._turn(stream)
        for layer, (k, v) in produced.items():
            cache, meta, k, v = self.layers[layer], stream.num_meta, k.detach(), v.detach()
            if meta or cache.meta_k is None:
                # Copies: a view would keep the whole prompt's projections alive.
                cache.meta_k, cache.meta_v = k[:meta].clone(), v[:meta].clone()
            self._write(layer, k[meta:], v[meta:], turn)
        self.lengths = turn.lengths

    def _turn(self, stream: Stream) -> _Turn:
        new = stream.row_lengths()
        past = torch.zeros_like(new) if self.lengths is None else self.lengths
        rows = torch.repeat_interleave(torch.arange(len(new), device=new.device), new)
        index = torch.arange(len(rows), device=new.device) - stream.cu_seqlens[:-1][rows]
        return _Turn(rows, past[rows] + index, past + new)

    def _write(self, layer: int, k: Tensor, v: Tensor, turn: _Turn) -> None:
        held_k, held_v = self._with_room(layer, k, v, len(turn.lengths), int(turn.lengths.max()))
        rows, positions, window = turn.rows, turn.positions, self.config.cache_window(layer)
        if window is not None:
            last = positions >= turn.lengths[rows] - window
            rows, positions, k, v = rows[last], positions[last] % window, k[last], v[last]
        positions = positions - self._held_once(layer)
        held_k[rows, :, positions] = k.to(held_k.dtype)
        held_v[rows, :, positions] = v.to(held_v.dtype)

    def _with_room(self, layer: int, k: Tensor, v: Tensor, rows: int, longest: int) -> tuple[Tensor, Tensor]:
        """The layer's K/V, grown where the longest row needs it."""
        cache = self.layers[layer]
        have = 0 if cache.k is None else cache.k.shape[2]
        capacity = self._capacity(have, longest - self._held_once(layer), self.config.cache_window(layer))
        cache.k, cache.v = _grown(cache.k, rows, capacity, k), _grown(cache.v, rows, capacity, v)
        return cache.k, cache.v

    def _capacity(self, have: int, needed: int, window: int | None) -> int:
        if needed > have:
            planned = self.max_length or 0
            have = planned if needed <= planned else max(needed, have + _GROWTH)
        return have if window is None else min(have, window)

    def allocate(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make every buffer of an empty cache for `rows` rows of max_length slots at once.

        Raises:
            ValueError: the cache has no max_length.
        """
        if self.max_length is None:
            raise ValueError("HymbaCache.allocate needs max_length; pass it to HymbaCache")
        config = self.config
        heads, meta = config.num_key_value_heads, config.num_memory_tokens
        for layer, cache in enumerate(self.layers):
            if config.is_kv_producer(layer):
                positions = self._capacity(0, self.max_length, config.cache_window(layer))
                for k_or_v, size in (("k", config.head_dim()), ("v", config.value_head_dim())):
                    new = torch.zeros(rows, heads, positions, size, dtype=dtype, device=device)
                    setattr(cache, k_or_v, new)
                    setattr(cache, f"meta_{k_or_v}", torch.zeros(meta, heads, size, dtype=dtype, device=device))
            if config.has_ssm(layer):
                channels = config.inner_size()
                cache.conv = torch.zeros(rows, channels, config.mamba_d_conv, dtype=dtype, device=device)
                state = torch.promote_types(dtype, torch.float32)
                cache.ssm = torch.zeros(rows, channels, config.mamba_d_state, dtype=state, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int | None) -> Tensor:
        """Attention of new tokens over the meta tokens, what `layer` (a producer) has cached, and themselves.

        Args:
            q: (T, H, d); k: (T, Hkv, d) and v: (T, Hkv, dv), the producer's for the same tokens.
            window: W, or None in a global layer.

        Returns:
            (T, H, dv)
        """
        assert self.lengths is not None
        if self.steps_in_place(stream):
            return self._attend_step(layer, q, k, v, window)
        if self.slots == self.shared and self._held_once(layer):
            return self._attend_shared(layer, q, k, v, stream)
        rows = _Rows.of(stream, self.lengths, self._cached_positions(layer))
        q_BLHd, k_BLHd, v_BLHd = stream.unflatten(q), stream.unflatten(k), stream.unflatten(v)
        with exact_products():
            blocks = [
                _attend_rows(
                    q_BLHd[:, i : i + _QUERY_BLOCK], k_BLHd, v_BLHd, self.layers[layer], rows.queries(i), window
                )
                for i in range(0, q_BLHd.shape[1], _QUERY_BLOCK)
            ]
        return stream.flatten(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1))

    def _attend_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """As attend, for one token a row."""
        held = self.layers[layer]
        assert self.lengths is not None
        own = self.lengths - self._held_once(layer) if self.shared else self.lengths
        tensors = (held.meta_k, held.meta_v, held.k, held.v, own)
        with exact_products():
            attended: Tensor = ops.steps(q.device).attention_step(q, k, v, *tensors, window)
        return attended

    def _attend_shared(self, layer: int, q: Tensor, k: Tensor, v: Tensor, stream: Stream) -> Tensor:
        """As attend, of a global layer where rows have nothing in the cache but what they share."""
        held = self.layers[layer]
        return ops.segment_attention(q, k, v, stream.cu_seqlens, held.meta_k, held.meta_v)

    def _cached_positions(self, layer: int) -> Tensor:
        """(B, P): the position that lies in each slot, -1 in an empty one."""
        assert self.lengths is not None
        k = self.layers[layer].k
        assert k is not None
        slot = torch.arange(min(k.shape[2], self.slots), device=k.device)
        newest = self.lengths[:, None] - 1
        window = self.config.cache_window(layer)
        if window is None:
            position = slot + self._held_once(layer)
            return torch.where(position <= newest, position, -1)
        return torch.clamp(newest - (newest - slot) % window, min=-1)

    def _held_once(self, layer: int) -> int:
        """How many of each row's first tokens the producer holds once for all rows."""
        return self.shared if self.shared and self.config.sees_all(layer) else 0

    def share(self, rows: int) -> None:
        """Make so many rows of the only one, of which global layers go on to hold one: all rows begin with it.

        Raises:
            ValueError: the cache does not hold exactly one row without padding.
        """
        if self.lengths is None or self.lengths.tolist() != [self.slots] or self.shared:
            raise ValueError("HymbaCache.share takes the cache of one row without padding")
        for layer, held in enumerate(self.layers):
            if held.k is None or held.v is None or not self.config.sees_all(layer):
                continue
            assert held.meta_k is not None
            assert held.meta_v is not None
            held.meta_k = torch.cat([held.meta_k, held.k[0, :, : self.slots].transpose(0, 1)])
            held.meta_v = torch.cat([held.meta_v, held.v[0, :, : self.slots].transpose(0, 1)])
            held.k, held.v = held.k[:, :, :0], held.v[:, :, :0]
        self.shared = self.slots
        self.batch_repeat_interleave(rows)

    def steps_in_place(self, stream: Stream) -> bool:
        """Whether these tokens, one a row, change the states in place: on a CPU, where no gradients are wanted."""
        once = self.is_initialized and stream.shape[1] == 1 and stream.real is None
        return once and stream.rope_ids.device.type == "cpu" and not torch.is_grad_enabled()

    def states(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The layer's conv inputs (B, Dn, K) and scan state (B, Dn, N), or None before the first call."""
        cache = self.layers[layer]
        return None if cache.conv is None or cache.ssm is None else (cache.conv, cache.ssm)

    def set_states(self, layer: int, conv: Tensor, ssm: Tensor) -> None:
        self.layers[layer].conv, self.layers[layer].ssm = conv.detach(), ssm.detach()

    def nbytes(self) -> dict[str, int]:
        """Bytes held: `kv`, `ssm` and `conv`."""
        total = {"kv": 0, "ssm": 0, "conv": 0}
        for cache in self.layers:
            for name, value in cache.tensors().items():
                total[name if name in total else "kv"] += value.numel() * value.element_size()
        return total

    # transformers' Cache API

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots a row so far, padding included and meta tokens not: `generate` slices its inputs by it."""
        return self.slots

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order (a row may be taken several times)."""
        if self.lengths is None:
            return
        self.lengths = self.lengths.index_select(0, indices.to(self.lengths.device))
        for cache in self.layers:
            cache.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.lengths is not None:
            self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.layers = [LayerCache() for _ in self.layers]
        self.lengths, self.slots, self.shared = None, 0, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises: a scan's state can't be taken back (assisted decoding needs that)."""
        if tokens_to_remove:
            raise ValueError(
                "HymbaCache can't be cropped: the SSM state does not run backwards; decode without an assistant"
            )

    @property
    def batch_size(self) -> int:
        return 0 if self.lengths is None else len(self.lengths)

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [not self.config.is_global(layer) for layer in range(len(self.layers))]


@dataclass
class _Rows:
    """Positions of queries, new keys and cached keys of a batch that continues its cache."""

    q_positions: Tensor
    """(B, L)"""
    k_positions: Tensor
    """(B, L), -1 at padding"""
    cached: Tensor
    """(B, P), -1 in an empty slot"""

    @staticmethod
    def of(stream: Stream, past_lengths: Tensor, cached: Tensor) -> _Rows:
        if stream.real is None:
            q = past_lengths[:, None] + torch.arange(stream.shape[1], device=past_lengths.device)
            return _Rows(q, q, cached)
        q = past_lengths[:, None] + stream.real.cumsum(1) - 1
        return _Rows(q, torch.where(stream.real, q, -1), cached)

    def queries(self, start: int) -> _Rows:
        return _Rows(self.q_positions[:, start : start + _QUERY_BLOCK], self.k_positions, self.cached)

    def visible(self, keys: Tensor, window: int | None) -> Tensor:
        """(B, 1, 1, L, keys): may the query see the key?"""
        distance = self.q_positions[:, :, None] - keys[:, None, :]
        mask = (distance >= 0) & (keys >= 0)[:, None, :]
        if window is not None:
            mask &= distance <= window
        return mask[:, None, None]


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, rows: _Rows, window: int | None) -> Tensor:
    """Rectangular rows: q (B, L, H, d), new k (B, L', Hkv, d), v (B, L', Hkv, dv) -> (B, L, H, dv).

    The three kinds of keys are scored apart and share one softmax, so that no cached tensor is copied.
    """
    assert cache.k is not None
    assert cache.v is not None
    assert cache.meta_k is not None
    assert cache.meta_v is not None
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q_heads = (q * dim**-0.5).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    slots = rows.cached.shape[1]
    past_k, past_v = cache.k[:, :, None, :slots], cache.v[:, :, None, :slots]
    new_k, new_v = k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]
    scores = torch.cat(
        [
            _against_shared(q_heads, cache.meta_k.permute(1, 2, 0)),
            _against(q_heads, past_k.transpose(-1, -2)).masked_fill(~rows.visible(rows.cached, window), -torch.inf),
            _against(q_heads, new_k.transpose(-1, -2)).masked_fill(~rows.visible(rows.k_positions, window), -torch.inf),
        ],
        dim=-1,
    )
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    meta, past, new = weights.split([cache.meta_k.shape[0], slots, k.shape[1]], dim=-1)
    out = _against_shared(meta, cache.meta_v.transpose(0, 1)) + _against(past, past_v) + _against(new, new_v)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _against(x: Tensor, y: Tensor) -> Tensor:
    """(B, Hkv, G, L, i) x (B, Hkv, 1, i, j) -> (B, Hkv, G, L, j), without repeating y for each of the G heads."""
    out = x.flatten(2, 3) @ y.squeeze(2)
    return out.unflatten(2, x.shape[2:4])


def _against_shared(x: Tensor, y: Tensor) -> Tensor:
    """(B, Hkv, G, L, i) x (Hkv, i, j) -> (B, Hkv, G, L, j), without repeating y for each row."""
    batch, _, group, length, _ = x.shape
    out = x.transpose(0, 1).flatten(1, 3) @ y
    return out.unflatten(1, (batch, group, length)).transpose(0, 1)


def _in_order(values: Sequence[Tensor], made: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """A tensor made of others, in the order of their memory: a CPU's states are (B, n, Dn) there."""
    if all(value.is_contiguous() for value in values):
        return made(values)
    return made([value.transpose(-1, -2) for value in values]).transpose(-1, -2)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """(B_i, .., p_i, m) -> (sum of B_i, .., largest p, m): zeros in the slots that a part had no need of."""
    most = max(value.shape[-2] for value in values)
    return torch.cat([F.pad(value, (0, 0, 0, most - value.shape[-2])) for value in values])


def _grown(held: Tensor | None, rows: int, capacity: int, new: Tensor) -> Tensor:
    """`held` (B, Hkv, have, d) with room for `capacity` positions; made like `new` (T, Hkv, d) the first time."""
    if held is not None and held.shape[2] >= capacity:
        return held
    grown = new.new_zeros(rows, new.shape[1], capacity, new.shape[2])
    if held is not None:
        grown[:, :, : held.shape[2]] = held
    return grown
