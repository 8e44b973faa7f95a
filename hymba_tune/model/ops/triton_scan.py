"""Selective scan on a GPU: autograd around the Triton kernels of triton_scan_kernels.py.

Signature, shapes and semantics: reference.py. Every document is cut into chunks. One program scans a block of channels
token by token over a chunk, so every (token, channel, state) costs one exp2, which bounds the time, and no state leaves
the registers. Blocks of channels alone are too few programs for one long document on a large GPU (50 at 3,200
channels), so the scan has two levels: the state that each chunk adds, a short serial pass that carries them over, then
the outputs. The first level skips what no carry needs, so that documents shorter than a chunk pay nothing for it. The
backward pass has the same two levels from the right. Meta tokens before the documents are chunks like theirs: each
document's carry starts with them, and the gradients of the state that they left, summed over documents, enter them from
the right. Only the states that enter the chunks are kept for it; the others are computed again, in two steps: those
before every tile of TILE tokens, into a buffer that lives during the call, and those between, in registers.

Deterministic: no atomics. Sums over channels (gradients of B and C) and over tokens (of A and D) are written as one
partial sum a program and added up by torch.sum, in an order that depends on the shapes only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import segments
from hymba_tune.model.ops import triton_scan_kernels as kernels

# Channels of a program of one warp, so many a thread: all states of a channel lie in one thread's registers. The kernel
# that holds gradients too has no room for a second channel.
BLOCK, GRADIENT_BLOCK, WARPS = 64, 32, 1
# Tokens that are loaded together. The backward kernel holds their states in registers: with 8 it spills.
TILE = 4
# Registers of a thread, that 16 programs share a multiprocessor, and 10 of the backward kernel; hardly any are spilled.
REGISTERS, GRADIENT_REGISTERS = 128, 200
# Channels of a program that carries a state over the chunks, loaded GROUP at a time.
CARRIED, GROUP = 32, 8
# Enough chunks of a long document to fill the GPU, few enough for the serial pass over them.
CHUNKS, SHORTEST_CHUNK, LONGEST_CHUNK = 64, 16, 256
# Terms of the series in softplus, and of that in its derivative, that reach the precision of the type.
TERMS = {torch.float32: 8, torch.float64: 18}
DERIVATIVE_TERMS = {torch.float32: 7, torch.float64: 13}


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
    """Triton; see reference.selective_scan.

    Args:
        num_meta: so many tokens M before the T of the documents, a segment of its own from zeros, so that x, dt, B, C,
            gate and y are (M + T, ..); every document starts from the state that they left. No initial_state then.

    Returns:
        y (M + T, Dn) and the documents' final states (S, Dn, N), without that of the meta tokens.

    Raises:
        ValueError: an initial_state beside meta tokens.
    """
    segments.refuse_two_beginnings(num_meta, initial_state)
    wide = torch.promote_types(x.dtype, torch.float32)
    state = None if initial_state is None else initial_state.to(wide)
    columns = torch.promote_types(B.dtype, C.dtype)
    ends = segments.boundaries(cu_seqlens, x.device)
    return _SelectiveScan.apply(
        rows_of(x), rows_of(dt), A.to(wide).contiguous(), B.to(columns).contiguous(), C.to(columns).contiguous(),
        D.to(wide).contiguous(), rows_of(gate), state, torch.is_grad_enabled(), chunks_of(ends, len(x), num_meta),
    )  # fmt: skip


def rows_of(t: Tensor) -> Tensor:
    """Rows without gaps inside; between rows there may be some."""
    return t if t.stride(-1) == 1 else t.contiguous()


class Chunks(NamedTuple):
    """How segments are cut; how many chunks there are is bounded on the CPU, since asking the GPU would take time.

    Segments are the documents, behind the meta tokens if there are any.
    """

    table: Tensor
    """(chunks, 6) int64: first token, token behind the last, those of the segment, segment, first tile."""
    begins: Tensor
    """(segments + 1,) int64: the first chunk of each segment, and how many there are in all."""
    tiles: int
    """No more tiles than this."""
    several: bool
    """May a segment have more than one chunk?"""
    meta: int
    """Chunks of the meta tokens."""


def chunks_of(cu_seqlens: Tensor, tokens: int, num_meta: int = 0) -> Chunks:
    """Of all tokens, the documents' boundaries given; the meta tokens are a segment of their own before them."""
    size = chunk_length(tokens - num_meta)
    kind = ("chunks", tokens, num_meta, size, TILE)
    return segments.kept(cu_seqlens, kind, lambda: _cut(_with_meta(cu_seqlens, num_meta), tokens, size, num_meta))


def _with_meta(cu_seqlens: Tensor, num_meta: int) -> Tensor:
    return F.pad(cu_seqlens + num_meta, (1, 0)) if num_meta else cu_seqlens


def _cut(ends: Tensor, tokens: int, size: int, num_meta: int) -> Chunks:
    lengths = ends.diff()
    count = len(lengths)
    begins = F.pad((-(-lengths // size)).cumsum(0), (1, 0))
    chunk = torch.arange((tokens + count * (size - 1)) // size, device=lengths.device)
    segment = torch.bucketize(chunk, begins[1:], right=True).clamp(max=max(count - 1, 0))
    begin, end = ends[segment], ends[segment + 1]
    # Chunks that there are not start and stop at the segment's end.
    start = torch.minimum(begin + (chunk - begins[segment]) * size, end)
    stop = torch.minimum(start + size, end)
    tiles = -(-(stop - start) // TILE)
    table = torch.stack([start, stop, begin, end, segment, tiles.cumsum(0) - tiles], 1)
    return Chunks(table, begins, (tokens + count * (TILE - 1)) // TILE, tokens > size, triton.cdiv(num_meta, size))


def chunk_length(tokens: int) -> int:
    """Tokens of a chunk: a power of two and a multiple of TILE."""
    return max(SHORTEST_CHUNK, min(LONGEST_CHUNK, triton.next_power_of_2(triton.cdiv(tokens, CHUNKS))))


class _SelectiveScan(torch.autograd.Function):
    """As selective_scan; rows of x, dt and gate may be strided. The kernels have channels last: states (.., N, Dn)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        gate: Tensor,
        initial: Tensor | None,
        differentiable: bool,
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor]:
        launch = _Launch(x, A, B, C, chunks)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        delta = A.new_empty(x.shape) if differentiable else None
        final = A.new_empty(launch.documents, *launch.state)
        ends, steps = launch.buffers()
        stepped: dict[str, Any] = {"dt": dt, "dt_row": dt.stride(0), "TERMS": TERMS[A.dtype], "META": launch.meta}
        if chunks.several or launch.meta:
            launch(kernels.scan_chunk_ends, **launch.driven, **stepped, ends=ends, steps=steps)
        entering = torch.empty_like(ends)
        launch.carry(ends, steps, None if initial is None else channels_last(initial), entering, final)
        launch(kernels.scan_outputs, **launch.driven, **stepped, **launch.gated(gate), D=D, entering=entering, y=y,
               final=final, delta=delta)  # fmt: skip
        ctx.save_for_backward(x, delta, A, B, C, D, gate, entering)
        ctx.chunks, ctx.dt_type, ctx.initial_shape = chunks, dt.dtype, None if initial is None else initial.mT.shape
        ctx.set_materialize_grads(False)
        return y, final.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, D, gate, ends = ctx.saved_tensors
        launch = _Launch(x, A, B, C, ctx.chunks)
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        kept = A.new_empty(launch.chunks.tiles, *launch.state)
        launch(kernels.scan_tile_starts, **launch.driven, delta=delta, ends=ends, kept=kept)
        has_initial = ctx.initial_shape is not None
        entering, dinitial = _from_the_right(launch, delta, gate, dy, dfinal, has_initial)
        dx, ddt, dgate = (torch.empty(x.shape, dtype=t, device=x.device) for t in (x.dtype, ctx.dt_type, gate.dtype))
        dBC = A.new_empty(triton.cdiv(launch.channels, GRADIENT_BLOCK), 2, *B.shape)
        dAD = A.new_empty(len(ends), launch.states + 1, launch.channels)
        wanted: dict[str, Any] = {"dx": dx, "ddt": ddt, "dgate": dgate, "dBC": dBC, "dAD": dAD}
        launch(kernels.scan_gradients, **launch.driven, **launch.gated(gate), **launch.summed(), **wanted, delta=delta,
               D=D, dy=dy, kept=kept, entering=entering, tokens=len(x), TERMS=DERIVATIVE_TERMS[A.dtype],
               block=GRADIENT_BLOCK, registers=GRADIENT_REGISTERS)  # fmt: skip
        dB, dC = dBC.sum(0).to(B.dtype)
        of_parameters = dAD.sum(0)
        dA, dD = of_parameters[:-1].mT, of_parameters[-1]
        of_initial = dinitial.sum_to_size(ctx.initial_shape).mT if has_initial and dinitial is not None else None
        return dx, ddt, dA, dB, dC, dD, dgate, of_initial, None, None


def _from_the_right(
    launch: _Launch, delta: Tensor, gate: Tensor, dy: Tensor, dfinal: Tensor | None, has_initial: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients that enter the chunks, (chunks, N, Dn), and those of the states that documents started from.

    The latter, (S, N, Dn), only where that was not zeros.
    """
    added, steps = launch.buffers()
    entering = torch.empty_like(added)
    firsts = has_initial or bool(launch.meta)
    if launch.chunks.several or firsts:
        launch(kernels.scan_chunk_gradients, **launch.steered, **launch.gated(gate), delta=delta, dy=dy, added=added,
               steps=steps, FIRSTS=firsts)  # fmt: skip
    dinitial = launch.A.new_empty(launch.documents, *launch.state) if firsts else None
    first = None if dfinal is None else channels_last(dfinal)
    launch.carry(added, steps, first, entering, dinitial, range(launch.meta, launch.meta + launch.documents))
    if launch.meta and dinitial is not None:
        launch.carry(added, steps, dinitial.sum(0, keepdim=True), entering, None, range(1))
    return entering, dinitial


def channels_last(states: Tensor) -> Tensor:
    """(.., Dn, N) -> (.., N, Dn), contiguous."""
    return states.mT.contiguous()


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(self, x: Tensor, A: Tensor, B: Tensor, C: Tensor, chunks: Chunks) -> None:
        self.channels, self.states = A.shape
        self.state = (self.states, self.channels)
        self.A, self.chunks = A, chunks
        # Segments before the documents, and documents.
        self.meta = int(chunks.meta > 0)
        self.documents = len(chunks.begins) - 1 - self.meta
        self.steered: dict[str, Any] = {"B": B, "C": C}
        self.driven: dict[str, Any] = {**self.steered, "x": x, "x_row": x.stride(0)}

    def gated(self, gate: Tensor) -> dict[str, Any]:
        return {"gate": gate, "gate_row": gate.stride(0)}

    def buffers(self) -> tuple[Tensor, Tensor]:
        """For a state of each chunk, and for the sum of its time steps."""
        chunks = len(self.chunks.table)
        return self.A.new_empty(chunks, *self.state), self.A.new_empty(chunks, self.channels)

    def summed(self) -> dict[str, int]:
        """How the sums over a program's channels are laid out over its threads; see kernels.store_sums."""
        width = min(GRADIENT_BLOCK, triton.next_power_of_2(self.states))
        return {
            "WIDTH": width,
            "HALVINGS": width.bit_length() - 1,
            "EXCHANGES": (GRADIENT_BLOCK // width).bit_length() - 1,
        }

    def __call__(self, kernel: Any, block: int | None = None, registers: int | None = None, **arguments: Any) -> None:
        """Over blocks of channels and chunks."""
        block, chunks = block or BLOCK, len(self.chunks.table)
        if chunks:
            grid = (triton.cdiv(self.channels, block), chunks)
            shape = {"TILE": TILE, "BLOCK": block, "maxnreg": registers or REGISTERS}
            kernel[grid](**arguments, **self._common(), **shape, table=self.chunks.table)

    def carry(
        self,
        added: Tensor,
        steps: Tensor,
        first: Tensor | None,
        entering: Tensor,
        left: Tensor | None,
        from_the_right: range | None = None,
    ) -> None:
        """From the left through all segments, or from the right through some."""
        reverse = from_the_right is not None
        through = range(self.meta + self.documents) if from_the_right is None else from_the_right
        if through:
            grid = (triton.cdiv(self.channels, CARRIED), self.states, len(through))
            kernels.scan_carry[grid](
                added=added, steps=steps, begins=self.chunks.begins, first=first, entering=entering, left=left,
                before=through.start, meta_chunks=0 if reverse else self.chunks.meta,
                first_row=int(first is not None and len(first) > 1), META=self.meta, GROUP=GROUP, BLOCK=CARRIED,
                REVERSE=reverse, **self._common(),
            )  # fmt: skip

    def _common(self) -> dict[str, Any]:
        return {"A": self.A, "channels": self.channels, "STATES": self.states, "num_warps": WARPS}
