"""Selective scan on a GPU: autograd around the Triton kernels of triton_scan_kernels.py.

Signature, shapes and semantics: reference.py. Every document is cut into chunks. One program scans a block of channels
token by token over a chunk, so every (token, channel, state) costs one exp2, which bounds the time, and no state leaves
the registers. Blocks of channels alone are too few programs for one long document on a large GPU (50 at 3,200
channels), so the scan has two levels: the state that each chunk adds, a short serial pass that carries them over, then
the outputs. The first level skips what no carry needs, so that documents shorter than a chunk pay nothing for it. The
backward pass has the same two levels from the right. Only the states that enter the chunks are kept for it; the others
are computed again, in two steps: those before every tile of TILE tokens, into a buffer that lives during the call, and
those between, in registers.

Deterministic: no atomics. Sums over channels (gradients of B and C) and over tokens (of A and D) are written as one
partial sum a program and added up by torch.sum, in an order that depends on the shapes only.
"""

from __future__ import annotations

import math
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
# Tokens that are loaded together. The backward kernel holds their decays and states in registers: with 8 it spills.
TILE = 4
# Elements of a program that takes softplus; of one that carries a state over the chunks, loaded GROUP at a time.
STEPS, CARRIED, GROUP = 1024, 32, 8
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
) -> tuple[Tensor, Tensor]:
    """Triton; see reference.selective_scan."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rates = A.to(wide) * math.log2(math.e)
    state = None if initial_state is None else initial_state.to(wide)
    ends = segments.boundaries(cu_seqlens, x.device)
    chunks = chunks_of(ends, len(x))
    return _SelectiveScan.apply(rows_of(x), dt.to(wide), rates, B, C, D.to(wide), rows_of(gate), state, *chunks)


def rows_of(t: Tensor) -> Tensor:
    """Rows without gaps inside; between rows there may be some."""
    return t if t.stride(-1) == 1 else t.contiguous()


class Chunks(NamedTuple):
    """How documents are cut; how many chunks there are is bounded on the CPU, since asking the GPU would take time."""

    table: Tensor
    """(chunks, 6) int64: first token, token behind the last, those of the document, document, first tile."""
    begins: Tensor
    """(documents + 1,) int64: the first chunk of each document, and how many there are in all."""
    tiles: int
    """No more tiles than this."""
    several: bool
    """May a document have more than one chunk?"""


def chunks_of(cu_seqlens: Tensor, tokens: int) -> Chunks:
    size = chunk_length(tokens)
    return segments.kept(cu_seqlens, ("chunks", tokens, size, TILE), lambda: _cut(cu_seqlens, tokens, size))


def _cut(cu_seqlens: Tensor, tokens: int, size: int) -> Chunks:
    lengths = cu_seqlens.diff()
    documents = len(lengths)
    begins = F.pad((-(-lengths // size)).cumsum(0), (1, 0))
    chunk = torch.arange((tokens + documents * (size - 1)) // size, device=lengths.device)
    document = torch.bucketize(chunk, begins[1:], right=True).clamp(max=max(documents - 1, 0))
    begin, end = cu_seqlens[document], cu_seqlens[document + 1]
    # Chunks that there are not start and stop at the document's end.
    start = torch.minimum(begin + (chunk - begins[document]) * size, end)
    stop = torch.minimum(start + size, end)
    tiles = -(-(stop - start) // TILE)
    table = torch.stack([start, stop, begin, end, document, tiles.cumsum(0) - tiles], 1)
    return Chunks(table, begins, (tokens + documents * (TILE - 1)) // TILE, tokens > size)


def chunk_length(tokens: int) -> int:
    """Tokens of a chunk: a power of two and a multiple of TILE."""
    return max(SHORTEST_CHUNK, min(LONGEST_CHUNK, triton.next_power_of_2(triton.cdiv(tokens, CHUNKS))))


class _SelectiveScan(torch.autograd.Function):
    """Rates are A * log2(e), (Dn, N); the rest as in reference.selective_scan, rows may be strided.

    The kernels have channels last: states (.., N, Dn).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        rates: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        gate: Tensor,
        initial: Tensor | None,
        *cut: Any,
    ) -> tuple[Tensor, Tensor]:
        chunks = Chunks(*cut)
        rates, initial = channels_last(rates), None if initial is None else channels_last(initial)
        delta = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
        if dt.numel():
            kernels.time_steps[(triton.cdiv(dt.numel(), STEPS),)](
                dt=dt.contiguous(), delta=delta, elements=dt.numel(), TERMS=TERMS[dt.dtype], SIZE=STEPS
            )
        launch = _Launch(x, delta, rates, B, C, chunks)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # The kernel writes the final states of documents with tokens; an empty one hands on its initial state.
        final = rates.new_zeros(len(chunks.begins) - 1, *rates.shape)
        if initial is not None:
            final.copy_(initial.expand_as(final))
        ends, steps = launch.buffers()
        D = D.contiguous()
        if chunks.several:
            launch(kernels.chunk_ends, **launch.driven, ends=ends, steps=steps)
        launch.carry(ends, steps, initial, reverse=False)
        launch(kernels.outputs, **launch.driven, **launch.gated(gate), D=D, ends=ends, y=y, final=final)
        ctx.save_for_backward(x, delta, rates, B, C, D, gate, initial, chunks.table, chunks.begins, ends)
        ctx.bounds = (chunks.tiles, chunks.several)
        return y, final.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, rates, B, C, D, gate, initial, table, begins, ends = ctx.saved_tensors
        chunks = Chunks(table, begins, *ctx.bounds)
        dy, dfinal = upstream[0].contiguous(), channels_last(upstream[1])
        launch = _Launch(x, delta, rates, B, C, chunks)
        kept = rates.new_empty(chunks.tiles, *rates.shape)
        launch(kernels.tile_starts, **launch.driven, ends=ends, kept=kept)
        entering, steps = launch.buffers()
        if chunks.several:
            launch(kernels.chunk_gradients, **launch.timed, **launch.gated(gate), dy=dy, entering=entering, steps=steps)
        launch.carry(entering, steps, dfinal, reverse=True)
        dx, ddt, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, delta, gate))
        # An empty document's initial state is its final one; the kernel writes the others'.
        dinitial = dfinal.clone()
        blocks = triton.cdiv(launch.channels, GRADIENT_BLOCK)
        dB, dC = (rates.new_empty(blocks, *B.shape) for _ in range(2))
        drates, dD = torch.empty_like(ends), torch.empty_like(steps)
        wanted: dict[str, Any] = {
            "dx": dx,
            "ddt": ddt,
            "dgate": dgate,
            "dinitial": dinitial,
            "dB": dB,
            "dC": dC,
            "drates": drates,
        }
        launch(kernels.gradients, **launch.driven, **launch.gated(gate), **launch.summed(), **wanted, D=D, dD=dD, dy=dy,
               kept=kept, entering=entering, tokens=len(x), TERMS=DERIVATIVE_TERMS[rates.dtype],
               block=GRADIENT_BLOCK)  # fmt: skip
        of_initial = None if initial is None else dinitial.sum_to_size(initial.shape).mT
        # The kernel's is the gradient of A, and rates are A * log2(e).
        of_rates = drates.sum(0).mT / math.log2(math.e)
        of_bc = (dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype))
        return dx, ddt, of_rates, *of_bc, dD.sum(0), dgate, of_initial, *(None for _ in chunks)


def channels_last(states: Tensor) -> Tensor:
    """(.., Dn, N) -> (.., N, Dn), contiguous."""
    return states.mT.contiguous()


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(self, x: Tensor, delta: Tensor, rates: Tensor, B: Tensor, C: Tensor, chunks: Chunks) -> None:
        self.states, self.channels = rates.shape
        self.rates, self.chunks = rates, chunks
        columns = triton.next_power_of_2(2 * self.states) - 2 * self.states
        bc = F.pad(torch.cat([B, C], 1).to(rates.dtype), (0, columns))
        self.timed: dict[str, Any] = {"delta": delta, "bc": bc}
        self.driven: dict[str, Any] = {**self.timed, "x": x, "x_row": x.stride(0)}

    def gated(self, gate: Tensor) -> dict[str, Any]:
        return {"gate": gate, "gate_row": gate.stride(0)}

    def buffers(self) -> tuple[Tensor, Tensor]:
        """For a state of each chunk, and for the sum of its time steps."""
        chunks = len(self.chunks.table)
        return self.rates.new_empty(chunks, *self.rates.shape), self.rates.new_empty(chunks, self.channels)

    def summed(self) -> dict[str, int]:
        """How the sums over a program's channels are laid out over its threads; see kernels.store_sums."""
        width = min(GRADIENT_BLOCK, triton.next_power_of_2(self.states))
        return {
            "WIDTH": width,
            "HALVINGS": width.bit_length() - 1,
            "EXCHANGES": (GRADIENT_BLOCK // width).bit_length() - 1,
        }

    def __call__(self, kernel: Any, block: int | None = None, **arguments: Any) -> None:
        """Over blocks of channels and chunks."""
        block, chunks = block or BLOCK, len(self.chunks.table)
        if chunks:
            grid = (triton.cdiv(self.channels, block), chunks)
            kernel[grid](**arguments, **self._common(), table=self.chunks.table, TILE=TILE, BLOCK=block)

    def carry(self, ends: Tensor, steps: Tensor, first: Tensor | None, reverse: bool) -> None:
        documents = len(self.chunks.begins) - 1
        if documents:
            row = int(first is not None and len(first) > 1)
            grid = (triton.cdiv(self.channels, CARRIED), self.states, documents)
            kernels.carry[grid](
                ends=ends, steps=steps, begins=self.chunks.begins, first=first, first_row=row, GIVEN=first is not None,
                GROUP=GROUP, BLOCK=CARRIED, REVERSE=reverse, **self._common(),
            )  # fmt: skip

    def _common(self) -> dict[str, Any]:
        return {"rates": self.rates, "channels": self.channels, "STATES": self.states, "num_warps": WARPS}
