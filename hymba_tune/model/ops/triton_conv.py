"""Causal conv on a GPU: autograd around the Triton kernels of triton_conv_kernels.py.

Signature, shapes and semantics: reference.py, and `num_meta`. Launches cost as much as kernels here: forward is one,
backward one and a sum. Deterministic: sums over tokens are partial sums, one a run of tokens, that torch.sum adds up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import segments
from hymba_tune.model.ops import triton_conv_kernels as kernels
from hymba_tune.model.ops.triton_scan import rows_of

# Channels of a program of one warp: two neighbours a thread.
BLOCK, WARPS = 64, 1
# Tokens of a run, and those that are loaded together: forward, and backward, where there are two rows of each.
RUN, GROUP, GRADIENT_GROUP = 128, 16, 8


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """Triton; see reference.causal_conv1d.

    The first `num_meta` tokens of x (num_meta + T, Dn) are a segment of their own, which begins with zeros; cu_seqlens
    counts over the T others, and each of their segments begins with the state that the first ones leave. Then there is
    no initial state to give. The final states are those of the others.
    """
    segments.refuse_two_beginnings(num_meta, initial_state)
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    ends = segments.boundaries(cu_seqlens, x.device)
    runs = runs_of(ends, len(x), num_meta)
    return _CausalConv1d.apply(rows_of(x), weight.contiguous(), bias.contiguous(), state, ends, runs, num_meta)


def runs_of(cu_seqlens: Tensor, tokens: int, num_meta: int) -> Tensor:
    """How documents are cut: the kernels' table. There is room for all runs there may be: to count them takes time."""
    return segments.kept(cu_seqlens, ("runs", tokens, num_meta, RUN), lambda: _cut(cu_seqlens, tokens, num_meta))


def _cut(cu_seqlens: Tensor, tokens: int, num_meta: int) -> Tensor:
    # The meta tokens are one more document, in front; without them it is empty.
    ends = F.pad(cu_seqlens + num_meta, (1, 0))
    counts = -(-ends.diff() // RUN)
    behind = counts.cumsum(0)
    run = torch.arange((tokens + len(counts) * (RUN - 1)) // RUN, device=ends.device)
    document = torch.bucketize(run, behind, right=True).clamp(max=len(counts) - 1)
    begin, end = ends[document], ends[document + 1]
    # Runs that there are not start and stop at the document's end.
    start = torch.minimum(begin + (run - (behind - counts)[document]) * RUN, end)
    stop = torch.minimum(start + RUN, end)
    return torch.stack([start, stop, begin, end, document - 1], 1)


class _CausalConv1d(torch.autograd.Function):
    """As causal_conv1d; `table` is of runs_of, rows of x may be strided."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor,
        table: Tensor,
        num_meta: int,
    ) -> tuple[Tensor, Tensor]:
        runs, documents = len(table), len(cu_seqlens) - 1
        y, final = _like(x), x.new_empty(documents, *weight.shape)
        launch = _Launch(x, weight, bias, initial, table, num_meta)
        launch(kernels.conv_forward, runs + documents, cu_seqlens=cu_seqlens, y=y, final=final, runs=runs, GROUP=GROUP)
        ctx.save_for_backward(x, weight, bias, initial, cu_seqlens, table)
        ctx.num_meta = num_meta
        # Seldom does a loss read the final states; where none does, their gradients cost nothing.
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial, cu_seqlens, table = ctx.saved_tensors
        channels, taps = weight.shape
        meta, learned = ctx.num_meta > 0, any(ctx.needs_input_grad[1:3])
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        wide = torch.promote_types(x.dtype, torch.float32)
        sizes = [channels * taps * learned, channels * learned, channels * taps * meta]
        dx, parts = _like(x), x.new_empty(len(table), sum(sizes), dtype=wide)
        # Of a document without tokens no program writes it.
        dinitial = None if initial is None else x.new_zeros(len(cu_seqlens) - 1, channels, taps, dtype=wide)
        launch = _Launch(x, weight, bias, initial, table, ctx.num_meta)
        launch(kernels.conv_gradients, len(table), dy=dy, dfinal=dfinal, dx=dx, parts=parts, dinitial=dinitial,
               FINAL=dfinal is not None, LEARNED=learned, GROUP=GRADIENT_GROUP)  # fmt: skip
        dweight, dbias, of_state = parts.sum(0).split(sizes)
        held = None if dfinal is None or not (meta or initial is not None) else _held(dfinal, cu_seqlens)
        if meta:
            of_state = of_state.view(taps, channels)
            _add_last(dx[: ctx.num_meta], of_state if held is None else of_state + held.sum(0).t())
        if initial is not None and dinitial is not None:
            dinitial = dinitial if held is None else dinitial + held
            dinitial = dinitial.sum_to_size(initial.shape).to(initial.dtype)
        of_parameters = (dweight.view(weight.shape).to(weight.dtype), dbias.to(bias.dtype)) if learned else (None, None)
        return dx, *of_parameters, dinitial, None, None, None


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, table: Tensor, num_meta: int
    ) -> None:
        self.blocks = triton.cdiv(len(weight), BLOCK)
        row = int(initial is not None and len(initial) > 1)
        self.shared = {"x": x, "weight": weight, "bias": bias, "initial": initial, "table": table, "meta": num_meta,
                       "channels": len(weight), "x_row": x.stride(0), "initial_row": row, "K": weight.shape[1],
                       "META": num_meta > 0, "GIVEN": initial is not None, "BLOCK": BLOCK,
                       "num_warps": WARPS}  # fmt: skip

    def __call__(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """So many programs for every block of channels."""
        if programs:
            kernel[(programs * self.blocks,)](**self.shared, **arguments)


def _like(x: Tensor) -> Tensor:
    """Memory for a tensor of x's shape and type, without gaps."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _held(dfinal: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(S, Dn, K): gradient of what each document begins with, as the final states of those shorter than K hold it."""
    slot = torch.arange(dfinal.shape[2], device=dfinal.device) - cu_seqlens.diff().unsqueeze(1)
    held = dfinal.gather(2, slot.clamp(min=0).unsqueeze(1).expand_as(dfinal))
    return held.where((slot >= 0).unsqueeze(1), 0)


def _add_last(dx: Tensor, of_state: Tensor) -> None:
    """To the last of dx (M, Dn), the gradient (K, Dn) of the state that these tokens leave."""
    last = min(len(dx), len(of_state))
    dx[len(dx) - last :].add_(of_state[len(of_state) - last :])
