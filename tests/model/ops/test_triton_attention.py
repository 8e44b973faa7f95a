"""Triton's attention: in Triton's interpreter it is the reference; its kernels compile for GPUs that are not there.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model.ops import meta_first, reference
from tests.model.ops.cases import offsets

pytest.importorskip("triton", reason="triton is not installed: the dev extra brings it")

# bfloat16 products of float32 sums, rounded once more on the way to each gradient.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}

IN_THE_INTERPRETER = """
import torch
from hymba_tune.model.ops import triton_attention as t
from tests.model.ops.cases import offsets
from tests.model.ops.test_triton_attention import check, check_prefix, operands

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
# Blocks as small as can be, so that few tokens cross many of them.
t.FORWARD = t.QUERY_GRADIENT = t.KEY_GRADIENTS = t.WIDE_SHAPE = t.Shape(16, 16, 4, 1)
t.PARTS = 3
for lengths, meta, window, dtype in {cases}:
    check(t.segment_attention, lengths, meta, window, operands(meta + sum(lengths), dtype))
check_prefix(t.segment_attention, [1, 0, 20, 3], 18, 5)
given = operands(60, torch.float64)
one = t.segment_attention(*given, offsets([25, 30]), num_meta=5)
two = t.segment_attention(*(torch.cat([x[:5], x[5:30].flip(0), x[30:]]) for x in given), offsets([25, 30]), num_meta=5)
assert torch.equal(one[30:], two[30:]) and not torch.equal(one[5:30], two[5:30])
assert t.segment_attention(*operands(0, torch.float64), offsets([0])).shape == (0, 4, 40)
print("all equal")
"""

SOME = """[
    ([1, 0, 40, 1, 30], 20, 3, torch.float64), ([1, 0, 40, 1, 30], 5, None, torch.float64),
    ([70], 0, 20, torch.float64), ([50], 33, 17, torch.float32),
    ([30, 9], 16, None, torch.bfloat16), ([1], 1, 0, torch.float64),
]"""
ALL = """[
    (lengths, meta, window, dtype)
    for lengths in ([1], [63], [1, 0, 40, 1, 30], [3] * 20, [100])
    for meta in (0, 1, 16, 20, 33)
    for window in (None, 0, 3, 40)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if dtype == torch.float64 or (meta in (0, 20) and window in (None, 40))
]"""

COMPILED = """
import torch
from hymba_tune.model.ops import triton_attention
from tests.model.ops import absent_gpu

# Hymba-1.5B: 25 query heads on 5 key/value heads, 128 meta tokens.
sizes = ((25, 64), (5, 64), (5, 128))
q, k, v = (torch.zeros(128 + 1000, *size, dtype=torch.bfloat16, requires_grad=True) for size in sizes)
out = triton_attention.segment_attention(q, k, v, torch.tensor([0, 1000]), window=1024, num_meta=128)
out.backward(out.detach())
"""


def run(code: str, interpret: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def operands(tokens: int, dtype: torch.dtype, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (24, 40)) -> Any:
    """q, k, v; (query, key/value) heads; (d, dv)."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    return [torch.randn(tokens, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def results(op: Any, given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradient of each of `given`."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    out = op(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Off by no more than a part of the largest number; where a query sees one key alone its gradients are zero."""
    for ours, truth in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        error = float((ours.double() - truth).abs().max())
        assert error <= TOLERANCE[dtype] * max(1.0, float(truth.abs().max())), error


def check(op: Any, lengths: list[int], meta: int, window: int | None, given: list[Tensor]) -> None:
    """The truth is computed in float64 from the same numbers."""
    ends = offsets(lengths).to(given[0].device)

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not meta:
            return reference.segment_attention(q, k, v, ends, window=window)
        return meta_first.segment_attention(reference.segment_attention, q, k, v, ends, window, meta)

    found = results(lambda q, k, v: op(q, k, v, ends, window=window, num_meta=meta), given)
    assert_close(found, results(truth, [t.double() for t in given]), given[0].dtype)


def check_prefix(op: Any, lengths: list[int], prefix: int, window: int | None) -> None:
    """Keys and values in front that belong to no query of these."""
    ends, total = offsets(lengths), sum(lengths)
    q, k, v = operands(prefix + total, torch.float64)
    given = [q[prefix:], k[prefix:], v[prefix:], k[:prefix], v[:prefix]]
    found, expected = (
        results(lambda q, k, v, pk, pv, f=f: f(q, k, v, ends, pk, pv, window), given)
        for f in (op, reference.segment_attention)
    )
    assert_close(found, expected, torch.float64)


def test_outputs_and_gradients_are_the_reference_s() -> None:
    """With meta tokens in front and without, across blocks and documents, and a document does not see its neighbour."""
    assert "all equal" in run(IN_THE_INTERPRETER.format(cases=SOME), interpret=True)


@pytest.mark.full
def test_long_and_awkward_documents_too() -> None:
    assert "all equal" in run(IN_THE_INTERPRETER.format(cases=ALL), interpret=True)


@pytest.mark.full
def test_every_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code of compute capability 9.0 for the heads of Hymba-1.5B in bfloat16."""
    said = run(COMPILED, interpret=False).splitlines()
    kernels = {line.partition(":")[0] for line in said}
    assert kernels == {f"attention_{step}" for step in ("forward", "query_gradient", "key_gradients", "parts")}
    # The kernel of the keys' gradients is fastest with blocks that fill its registers.
    assert all(line.endswith(" 0 bytes spilled") for line in said if "key_gradients" not in line), said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 200])
def test_on_a_gpu_they_are_the_reference_s(window: int | None, dtype: torch.dtype) -> None:
    """Heads of Hymba-1.5B; with meta tokens that fill a block and that do not, and without."""
    from hymba_tune.model.ops import triton_attention

    for lengths, meta in (([300, 1, 211], 128), ([1, 0, 640, 130], 20), ([700], 0)):
        given = [t.cuda() for t in operands(meta + sum(lengths), dtype, heads=(25, 5), dims=(64, 128))]
        check(triton_attention.segment_attention, lengths, meta, window, given)
