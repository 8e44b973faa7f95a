"""The stream: every document of a batch laid end to end in one flat sequence, the meta tokens once in front.

    padded batch            stream
    [ . a a a ]             [ m m | a a a | b b b b | c ]
    [ b b b b ]      ->       ^meta  ^documents, cu_seqlens = 0 3 7 8
    [ c . . . ]

Padded batches (on any side), packed rows and single prompts all become a stream, so no operation ever sees padding and
every document is computed exactly as if it were alone. A batch that continues a cache becomes a stream without meta
tokens: the cache already holds what they left behind.

Shapes: B rows, L slots a row, T real tokens, M meta tokens, S documents, C any trailing sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """How a batch of (B, L) slots lies in a flat sequence of num_meta + T tokens."""

    shape: tuple[int, int]
    """(B, L)"""
    num_meta: int
    """Meta tokens in front: M, or 0 where a cache holds them."""
    cu_seqlens: Tensor
    """(S + 1,) int64: document s is tokens cu_seqlens[s] to cu_seqlens[s + 1] of the T real ones."""
    real: Tensor | None
    """(B, L) bool, True where the slot holds a token; None where every slot does."""
    slots: Tensor | None
    """(T,) int64: the slot (row * L + column) of each real token; None where every slot is real."""
    rope_ids: Tensor
    """(num_meta + T,) int64: meta tokens 0 to M - 1, then M + the token's position id."""

    def flatten(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) -> (T, C): the real tokens in stream order."""
        flat = x_BLC.reshape(-1, *x_BLC.shape[2:])
        return flat if self.slots is None else flat[self.slots]

    def unflatten(self, x_TC: Tensor) -> Tensor:
        """(T, C) -> (B, L, C): zeros at padding."""
        if self.slots is None:
            return x_TC.reshape(*self.shape, *x_TC.shape[1:])
        rows, columns = self.shape
        blank = x_TC.new_zeros(rows * columns, *x_TC.shape[1:])
        return blank.index_copy(0, self.slots, x_TC).reshape(rows, columns, *x_TC.shape[1:])

    def last(self, count: int) -> tuple[Stream, Tensor]:
        """The last `count` slots of each row, as a stream, and where in this one their tokens lie, (tokens,)."""
        (rows, columns), device = self.shape, self.rope_ids.device
        count = min(count, columns)
        kept = slice(columns - count, None)
        if self.real is None:
            real = slots = None
            tokens = torch.arange(rows * columns, device=device).reshape(rows, columns)[:, kept].flatten()
            lengths = torch.full((rows,), count, device=device)
        else:
            real = self.real[:, kept]
            number = self.real.flatten().cumsum(0).reshape(rows, columns) - 1
            tokens, slots, lengths = number[:, kept][real], real.flatten().nonzero().squeeze(1), real.sum(1)
        places = self.num_meta + tokens
        return Stream((rows, count), 0, _offsets(lengths), real, slots, self.rope_ids[places]), places

    def row_lengths(self) -> Tensor:
        """(B,) int64: real tokens in each row."""
        if self.real is None:
            return torch.full((self.shape[0],), self.shape[1], device=self.rope_ids.device)
        return self.real.sum(1)


def rows_to_stream(
    shape: tuple[int, int],
    num_meta: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_lengths: Tensor | None,
    past_slots: int = 0,
    device: torch.device | str = "cpu",
) -> Stream:
    """A stream whose documents are the rows of the batch; the only layout that can fill or continue a cache.

    Args:
        attention_mask: (B, past_slots + L), nonzero at tokens; the last L columns describe these slots.
        position_ids: (B, L) or (1, L), meta tokens not counted; default: a token's place in its row's document.
        past_lengths: (B,) tokens that a cache already holds for each row, or None when there is no past.

    Raises:
        ValueError: the mask's or the position ids' shape does not fit, or the mask denies what the cache holds.
    """
    rows, columns = shape
    real = _real_slots(attention_mask, shape, past_slots)
    if past_lengths is not None:
        _check_past(past_lengths, rows, attention_mask, past_slots)
    if real is None:
        index = torch.arange(columns, device=device).expand(rows, columns)
        lengths = torch.full((rows,), columns, device=device)
        slots = None
    else:
        index = real.cumsum(1) - 1
        lengths = real.sum(1)
        slots = real.flatten().nonzero().squeeze(1)
    if past_lengths is not None:
        index = index + past_lengths[:, None]
    ids = index if position_ids is None else _position_ids(position_ids, shape)
    continues = past_lengths is not None
    return Stream(
        shape=shape,
        num_meta=0 if continues else num_meta,
        cu_seqlens=_offsets(lengths),
        real=real,
        slots=slots,
        rope_ids=_rope_ids(ids, slots, num_meta, with_meta=not continues),
    )


def packed_to_stream(
    shape: tuple[int, int],
    num_meta: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Stream:
    """A stream out of rows that may hold several documents each (no cache).

    Documents are marked by `seq_idx` (B, L), `cu_seq_lens_q` or `_k` (documents + 1,) over the B * L slots, or, where
    there is no attention mask, by `position_ids` (B, L) that do not go up. A row always starts a document.

    Raises:
        ValueError: a shape does not fit, or two of the inputs mark different documents.
    """
    starts: dict[str, Tensor] = {}
    if seq_idx is not None:
        starts["seq_idx"] = _changes(_position_ids(seq_idx, shape, "seq_idx"))
    for name, offsets in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if offsets is not None:
            starts[name] = _starts_at(name, offsets, shape)
    if position_ids is not None and attention_mask is None:
        starts["position_ids"] = restarts(position_ids, shape)
    if not starts:
        return rows_to_stream(shape, num_meta, attention_mask, position_ids, None, device=device)
    (first, marked), *others = starts.items()
    for other, also in others:
        if not torch.equal(marked, also):
            raise ValueError(f"{first} and {other} mark different documents; pass one of them, or make them agree")
    real = _real_slots(attention_mask, shape)
    if real is not None and (cu_seq_lens_q is not None or cu_seq_lens_k is not None):
        raise ValueError("cu_seq_lens counts every slot, but attention_mask has padding; pass one of them")
    return _marked_stream(shape, num_meta, marked, real, position_ids)


def _marked_stream(
    shape: tuple[int, int], num_meta: int, starts: Tensor, real: Tensor | None, position_ids: Tensor | None
) -> Stream:
    """`starts` (B, L): True at slots that begin a document; padding may lie anywhere between."""
    document = starts.flatten().cumsum(0) - 1
    slots = None
    if real is not None:
        slots = real.flatten().nonzero().squeeze(1)
        document = document[slots]
    _, lengths = torch.unique_consecutive(document, return_counts=True)
    cu_seqlens = _offsets(lengths)
    if position_ids is None:
        flat = torch.arange(len(document), device=starts.device)
        ids = flat - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    else:
        ids = _position_ids(position_ids, shape).flatten()
        ids = ids if slots is None else ids[slots]
    return Stream(shape, num_meta, cu_seqlens, real, slots, _rope_ids(ids, None, num_meta, with_meta=True))


def _check_past(past_lengths: Tensor, rows: int, attention_mask: Tensor | None, past_slots: int) -> None:
    if len(past_lengths) != rows:
        raise ValueError(f"the cache holds {len(past_lengths)} rows, the batch has {rows}")
    if attention_mask is None:
        return
    masked = attention_mask[:, :past_slots].bool().sum(1)
    if not torch.equal(masked, past_lengths):
        raise ValueError(
            f"attention_mask has {masked.tolist()} tokens in the cached slots, but the cache holds "
            f"{past_lengths.tolist()}: what was computed as a token can't become padding later"
        )


def _real_slots(attention_mask: Tensor | None, shape: tuple[int, int], past_slots: int = 0) -> Tensor | None:
    if attention_mask is None:
        return None
    expected = (shape[0], past_slots + shape[1])
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {expected}: one column a token, "
            "those already in the cache included"
        )
    real = attention_mask[:, past_slots:].bool()
    return None if bool(real.all()) else real


def _position_ids(ids: Tensor, shape: tuple[int, int], name: str = "position_ids") -> Tensor:
    if ids.dim() != 2 or ids.shape[1] != shape[1] or ids.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected {shape} or (1, {shape[1]})")
    return ids.expand(shape)


def _rope_ids(ids: Tensor, slots: Tensor | None, num_meta: int, with_meta: bool) -> Tensor:
    flat = ids.flatten() if slots is None else ids.flatten()[slots]
    if not with_meta:
        return flat + num_meta
    return torch.cat([torch.arange(num_meta, device=flat.device), flat + num_meta])


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _changes(ids: Tensor) -> Tensor:
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts


def restarts(position_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L): True where a document starts, that is where the position ids do not go up."""
    ids = _position_ids(position_ids, shape)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] <= ids[:, :-1]
    return starts


def _starts_at(name: str, cu_seq_lens: Tensor, shape: tuple[int, int]) -> Tensor:
    slots = shape[0] * shape[1]
    offsets = cu_seq_lens.long()
    ends = (int(offsets.flatten()[0]), int(offsets.flatten()[-1])) if offsets.numel() else ()
    if offsets.dim() != 1 or ends != (0, slots) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name} must rise from 0 to the {slots} slots of the batch, got {offsets.tolist()}")
    starts = torch.zeros(slots + 1, dtype=torch.bool, device=offsets.device)
    starts[offsets] = True
    starts = starts[:-1].reshape(shape)
    if not bool(starts[:, 0].all()):
        raise ValueError(f"{name} holds a document that crosses from one row of the batch to the next")
    return starts
