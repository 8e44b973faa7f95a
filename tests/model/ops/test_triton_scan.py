"""Triton's scan: in Triton's interpreter it is the reference; its kernels compile for absent GPUs.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own.
"""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model.ops import reference
from tests.model.ops import test_selective_scan as scans
from tests.model.ops.cases import DTYPES, assert_same_results, offsets, results

pytest.importorskip("triton", reason="triton is not installed: the dev extra brings it")

IN_THE_INTERPRETER = """
import math, torch
from hymba_tune.model.ops import gpu, triton_scan, use_backend, selective_scan
from tests.model.ops.cases import offsets
from tests.model.ops import test_selective_scan as scans
from tests.model.ops.test_triton_scan import check_with_meta

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
torch.manual_seed(0)
# Chunks and tiles as short as can be, so that few tokens cross many of them; {more}
triton_scan.TILE, triton_scan.SHORTEST_CHUNK, triton_scan.CHUNKS, triton_scan.BLOCK = 2, 4, 8, 8
triton_scan.GRADIENT_BLOCK, triton_scan.GROUP = 4, 2
assert triton_scan.chunk_length(21) == 4
op = triton_scan.selective_scan
for lengths in {lengths}:
    for dtype, initial in {cases}:
        states = len(lengths) if initial == 2 else initial
        scans.check(op, lengths, scans.random_inputs(sum(lengths), 3, 5, dtype, states))
for num_meta, lengths in {metas}:
    for dtype in {{dtype for dtype, _ in {cases}}}:
        check_with_meta(op, num_meta, lengths, scans.random_inputs(num_meta + sum(lengths), 3, 5, dtype))
inputs = scans.random_inputs(6, 2, 3)
inputs["dt"][1] = math.nan
y, final = op(**inputs, cu_seqlens=offsets([2, 4]))
assert y[1].isnan().all() and y[2:].isfinite().all() and final[1].isfinite().all()
with use_backend("triton"):
    again, _ = selective_scan(**inputs, cu_seqlens=offsets([2, 4]))
assert torch.equal(again[2:], y[2:])
inputs["dt"][:2] = torch.tensor([0, math.nan])[:, None]
y, final = op(**inputs, cu_seqlens=offsets([2, 3]), num_meta=1)
assert y[1].isnan().all() and y[0].isfinite().all() and y[3:].isfinite().all() and final[1].isfinite().all()
print("all equal")
"""

COMPILED = """
import torch
from hymba_tune.model.ops import triton_scan
from tests.model.ops import absent_gpu

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)

tokens, channels, states, wide, ends = 300, 96, 16, torch.float32, torch.tensor([0, 300])
A, D, state = zeros(channels, states, dtype=wide), zeros(channels, dtype=wide), zeros(1, channels, states, dtype=wide)
x, gate, dt = zeros(tokens, channels), zeros(tokens, channels), zeros(tokens, channels, dtype=wide)
B, C = zeros(tokens, states), zeros(tokens, states)
for op, inputs in (
    (triton_scan.selective_scan, (x, dt, A, B, C, D, gate, ends, state)),
    (triton_scan.selective_scan, (x, dt, A, B, C, D, gate, torch.tensor([0, 260]), None, 40)),
):
    y, final = op(*inputs)
    torch.autograd.backward([y, final], [torch.ones_like(y), torch.ones_like(final)])
"""
STEPS = ("chunk_ends", "carry", "outputs", "tile_starts", "chunk_gradients", "gradients")
KERNELS = {f"scan_{step}" for step in STEPS}


def composed(num_meta: int, *, cu_seqlens: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The reference's scan of the meta tokens, then of the documents from the state that they left."""
    names = ("x", "dt", "B", "C", "gate")
    meta, others = ({**inputs, **{name: inputs[name][part] for name in names}}
                    for part in (slice(num_meta), slice(num_meta, None)))  # fmt: skip
    y_meta, state = reference.selective_scan(**meta, cu_seqlens=offsets([num_meta]).to(cu_seqlens.device))
    y, final = reference.selective_scan(**others | {"initial_state": state}, cu_seqlens=cu_seqlens)
    return torch.cat([y_meta, y]), final


def results_with_meta(
    op: Any, num_meta: int, cu_seqlens: Tensor, inputs: scans.Inputs, upstream: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an op and the composed reference make of num_meta meta tokens before the documents."""
    found = results(partial(op, num_meta=num_meta), inputs, cu_seqlens, upstream)
    return found, results(partial(composed, num_meta), inputs, cu_seqlens, upstream)


def check_with_meta(op: Any, num_meta: int, lengths: list[int], inputs: scans.Inputs) -> None:
    upstream = scans.upstream_of(inputs, len(lengths))
    assert_same_results(*results_with_meta(op, num_meta, offsets(lengths), inputs, upstream))


# Types and initial states (none, shared, one a document): each once, and all with all.
FEW = "[(torch.float64, 2), (torch.float32, None), (torch.bfloat16, 1)]"
ALL = "[(dtype, n) for dtype in (torch.float64, torch.float32, torch.bfloat16) for n in (None, 1, 2)]"


def run(code: str, interpret: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_outputs_states_and_gradients_are_the_reference_s() -> None:
    code = IN_THE_INTERPRETER.format(
        lengths="([5, 0, 1, 3],)", metas="((5, [5, 0, 1, 2]),)", more="a full run has more", cases=FEW
    )
    assert "all equal" in run(code, interpret=True)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[2000], [1] * 70, [3, 0, 700, 1, 500, 0]], ids=["one", "ones", "ragged"])
def test_on_a_gpu_they_are_the_reference_s(lengths: list[int], dtype: torch.dtype) -> None:
    from hymba_tune.model.ops import triton_scan

    torch.manual_seed(0)
    drawn = scans.random_inputs(sum(lengths), dtype=dtype, initial=1)
    inputs = {name: t if t is None else t.cuda() for name, t in drawn.items()}
    upstream = [t.cuda() for t in scans.upstream_of(drawn, len(lengths))]
    ends = offsets(lengths).cuda()
    ops = (triton_scan.selective_scan, reference.selective_scan)
    assert_close_on_a_gpu(*(results(op, inputs, ends, upstream) for op in ops))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_meta", "lengths"),
    [(128, [2000]), (1, [1] * 70), (300, [3, 0, 700, 1, 500, 0])],
    ids=["one", "ones", "ragged"],
)
def test_on_a_gpu_meta_tokens_come_before_every_document(num_meta: int, lengths: list[int], dtype: torch.dtype) -> None:
    from hymba_tune.model.ops import triton_scan

    torch.manual_seed(0)
    drawn = scans.random_inputs(num_meta + sum(lengths), dtype=dtype)
    inputs = {name: t if t is None else t.cuda() for name, t in drawn.items()}
    upstream = [t.cuda() for t in scans.upstream_of(drawn, len(lengths))]
    ends = offsets(lengths).cuda()
    found, expected = results_with_meta(triton_scan.selective_scan, num_meta, ends, inputs, upstream)
    assert_close_on_a_gpu(found, expected)
    again, _ = results_with_meta(triton_scan.selective_scan, num_meta, ends, inputs, upstream)
    assert all(torch.equal(again[name], t) for name, t in found.items())


def assert_close_on_a_gpu(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums over up to 2,000 tokens, and exp2 and division at the GPU's approximate precision in float32."""
    for name, wanted in expected.items():
        error = float((found[name] - wanted).norm() / wanted.norm().clamp(min=1e-30))
        assert error < {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7}[wanted.dtype], name


@pytest.mark.full
def test_long_and_awkward_documents_too() -> None:
    code = IN_THE_INTERPRETER.format(
        lengths="([1], [63], [1] * 4, [40, 25], [3, 0, 1, 30, 17, 0], [0, 0])",
        metas="((1, [1]), (1, [7, 0]), (5, [0, 1, 2, 20]), (40, [2, 9]), (70, [33, 0, 1]), (3, [0, 0]), (3, []))",
        more="these are they",
        cases=ALL,
    )
    assert "all equal" in run(code, interpret=True)


@pytest.mark.full
def test_every_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code of compute capability 9.0, bf16 in and out: what a type or a shape would break is found here."""
    said = [line.split(":", 1) for line in run(COMPILED, interpret=False).splitlines()]
    assert {name for name, _ in said} == KERNELS
    # The kernel of all gradients fills its registers to the last.
    assert all(text.endswith(" 0 bytes spilled") for name, text in said if name != "scan_gradients"), said
