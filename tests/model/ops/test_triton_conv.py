"""Triton's conv: in Triton's interpreter it is the reference; its kernels compile for absent GPUs.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own.
"""

from typing import Any

import pytest
import torch

from hymba_tune.model.ops import reference
from tests.model.ops import test_causal_conv1d as convs
from tests.model.ops.cases import DTYPES, assert_same_results, offsets, results, results_with_meta
from tests.model.ops.test_triton_scan import GPU, assert_close_on_a_gpu, run

pytest.importorskip("triton", reason="triton is not installed: the dev extra brings it")

PREPARED = """
import torch
from hymba_tune.model.ops import causal_conv1d, triton_conv, use_backend
from tests.model.ops.cases import offsets
from tests.model.ops import test_causal_conv1d as convs
from tests.model.ops.test_triton_conv import check_with_meta

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
torch.manual_seed(0)
# Runs as short as can be, so that few tokens cross many of them.
triton_conv.RUN, triton_conv.GROUP, triton_conv.GRADIENT_GROUP, triton_conv.BLOCK = 8, 4, 2, 8
op = triton_conv.causal_conv1d
"""
SEGMENTS = """
for lengths in {lengths}:
    for dtype, initial in {cases}:
        states = len(lengths) if initial == 2 else initial
        convs.check(op, lengths, convs.random_inputs(sum(lengths), 4, 11, dtype, states))
print("all equal")
"""
WITH_META = """
for num_meta, lengths in {metas}:
    for dtype in {dtypes}:
        check_with_meta(op, num_meta, lengths, convs.random_inputs(num_meta + sum(lengths), {taps}, 5, dtype))
print("all equal")
"""
APART = """
inputs = convs.random_inputs(7, channels=5, initial=1)
with use_backend("triton"):
    y, _ = causal_conv1d(**inputs, cu_seqlens=offsets([4, 3]))
inputs["x"][3] = float("nan")
other, _ = op(**inputs, cu_seqlens=offsets([4, 3]))
assert torch.equal(other[4:], y[4:]) and other[3].isnan().all()

# Meta tokens, three documents: NaN in the second one reaches neither the meta tokens nor its neighbours, and its
# gradient only the meta tokens that it reads.
lengths, x = [4, 2, 3], convs.random_inputs(6 + 9, channels=5)["x"]
weight, bias = torch.randn(5, 4), torch.randn(5)
def results(x):
    leaf = x.clone().requires_grad_()
    y, final = op(leaf, weight, bias, offsets(lengths), num_meta=6)
    (y.sum() + final.sum()).backward()
    return y.detach(), leaf.grad, final.detach()
(y, dx, final), x[10] = results(x), float("nan")
other, of_other, held = results(x)
for rows in (slice(10), slice(12, None)):
    assert torch.equal(other[rows], y[rows])
for rows in (slice(3), slice(6, 10), slice(12, None)):
    assert torch.equal(of_other[rows], dx[rows])
assert other[10:12].isnan().all() and of_other[3:6].isnan().all() and of_other[10:12].isnan().all()
assert torch.equal(held[::2], final[::2])
print("all equal")
"""
PARTS = """
x, ends = convs.random_inputs(17, channels=5)["x"].requires_grad_(), offsets([9, 0, 3])
weight, bias = torch.randn(5, 4), torch.randn(5)
for wanted in (True, False):
    y, final = op(x, weight, bias.requires_grad_(wanted), ends, num_meta=5)
    of_y, = torch.autograd.grad(y.sum(), x, retain_graph=True)
    of_final, = torch.autograd.grad(final.sum(), x, retain_graph=True)
    of_both, = torch.autograd.grad(y.sum() + final.sum(), x)
    torch.testing.assert_close(of_y + of_final, of_both, rtol=0, atol=1e-6)
    assert of_final.sum() == 5 * 4 * 3
print("all equal")
"""
COMPILED = """
import torch
from hymba_tune.model.ops import triton_conv
from tests.model.ops import absent_gpu

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)

x, ends, behind_meta = zeros(304, 96), torch.tensor([0, 304]), torch.tensor([0, 264])
for parameters in ((zeros(96, 4), zeros(96)), (torch.zeros(96, 4), torch.zeros(96))):
    for more in ((ends, None), (ends, zeros(1, 96, 4)), (behind_meta, None, 40)):
        y, final = triton_conv.causal_conv1d(x, *parameters, *more)
        y.backward(torch.ones_like(y), retain_graph=True)
        torch.autograd.backward([y, final], [torch.ones_like(y), torch.ones_like(final)])
"""

# Types and initial states (none, shared, one a document): each once, and all with all.
FEW = "[(torch.float64, 2), (torch.float32, None), (torch.bfloat16, 1)]"
ALL = "[(dtype, n) for dtype in (torch.float64, torch.float32, torch.bfloat16) for n in (None, 1, 2)]"


def check_with_meta(op: Any, num_meta: int, lengths: list[int], inputs: convs.Inputs) -> None:
    upstream = convs.upstream_of(inputs, len(lengths))
    assert_same_results(*results_with_meta(op, "causal_conv1d", num_meta, offsets(lengths), inputs, upstream))


def test_outputs_states_and_gradients_are_the_reference_s() -> None:
    code = PREPARED + SEGMENTS.format(lengths="([3, 0, 1, 10, 8, 0], [0, 0])", cases=FEW)
    assert "all equal" in run(code, interpret=True)


def test_with_meta_tokens_too() -> None:
    metas = "((2, [3, 0, 1, 17, 2]), (9, [5]))"
    code = PREPARED + WITH_META.format(metas=metas, dtypes="(torch.float64, torch.bfloat16)", taps=4)
    assert "all equal" in run(code, interpret=True)


def test_a_document_does_not_see_its_neighbours() -> None:
    assert "all equal" in run(PREPARED + APART, interpret=True)


def test_a_loss_may_read_outputs_or_final_states_and_weights_may_be_frozen() -> None:
    assert "all equal" in run(PREPARED + PARTS, interpret=True)


def test_meta_tokens_and_an_initial_state_exclude_each_other() -> None:
    from hymba_tune.model.ops import triton_conv

    inputs = convs.random_inputs(5, initial=1)
    with pytest.raises(ValueError, match="initial_state"):
        triton_conv.causal_conv1d(**inputs, cu_seqlens=offsets([3]), num_meta=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("num_meta", [0, 1, 128, 200])
def test_runs_cover_every_token_once_and_stay_in_their_document(num_meta: int, tokens: int) -> None:
    from hymba_tune.model.ops import triton_conv

    ends = offsets([0, tokens // 3, 0, tokens - tokens // 3, 0])
    table = triton_conv.runs_of(ends, num_meta + tokens, num_meta)
    rows = [0, *(num_meta + ends).tolist()]
    covered: list[int] = []
    for start, stop, begin, end, document in table.tolist():
        assert start <= stop <= start + triton_conv.RUN
        assert (begin, end) == (rows[document + 1], rows[document + 2])
        # A run that is not full ends its document.
        assert begin <= start
        assert stop == min(start + triton_conv.RUN, end)
        covered += range(start, stop)
    assert covered == list(range(num_meta + tokens))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("initial", [None, 1, "each"])
@pytest.mark.parametrize("lengths", [[2000], [1] * 70, [3, 0, 700, 1, 500, 0]], ids=["one", "ones", "ragged"])
def test_on_a_gpu_they_are_the_reference_s(lengths: list[int], initial: int | str | None, dtype: torch.dtype) -> None:
    from hymba_tune.model.ops import triton_conv

    torch.manual_seed(0)
    states = len(lengths) if isinstance(initial, str) else initial
    drawn = convs.random_inputs(sum(lengths), channels=200, dtype=dtype, initial=states)
    inputs = {name: t if t is None else t.cuda() for name, t in drawn.items()}
    upstream = [t.cuda() for t in convs.upstream_of(drawn, len(lengths))]
    ends = offsets(lengths).cuda()
    ops = (triton_conv.causal_conv1d, reference.causal_conv1d)
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
    from hymba_tune.model.ops import triton_conv

    torch.manual_seed(0)
    drawn = convs.random_inputs(num_meta + sum(lengths), channels=200, dtype=dtype)
    inputs = {name: t if t is None else t.cuda() for name, t in drawn.items()}
    upstream = [t.cuda() for t in convs.upstream_of(drawn, len(lengths))]
    ends = offsets(lengths).cuda()
    found, expected = results_with_meta(triton_conv.causal_conv1d, "causal_conv1d", num_meta, ends, inputs, upstream)
    assert_close_on_a_gpu(found, expected)
    again, _ = results_with_meta(triton_conv.causal_conv1d, "causal_conv1d", num_meta, ends, inputs, upstream)
    assert all(torch.equal(again[name], t) for name, t in found.items())


@pytest.mark.full
def test_long_and_awkward_documents_too() -> None:
    lengths = "([1], [2, 3, 1, 0], [40, 7, 25], [1] * 9, [3, 0, 1, 20, 17, 0])"
    metas = "((1, [1]), (1, [7, 0]), (2, [0, 1, 2, 3, 20]), (5, [0, 2]), (40, [2, 9, 31]), (3, [0, 0]), (3, []))"
    dtypes = "(torch.float64, torch.float32, torch.bfloat16)"
    code = PREPARED + SEGMENTS.format(lengths=lengths, cases=ALL) + WITH_META.format(metas=metas, dtypes=dtypes, taps=4)
    assert run(code, interpret=True).count("all equal") == 2


@pytest.mark.full
@pytest.mark.parametrize("taps", [1, 2, 3, 7])
def test_any_number_of_taps(taps: int) -> None:
    metas = "((2, [9, 0, 2]), (9, [1, 12]))"
    code = PREPARED + WITH_META.format(metas=metas, dtypes="(torch.float32,)", taps=taps)
    code += f"convs.check(op, [9, 0, 2], convs.random_inputs(11, {taps}, 5, initial=3))"
    assert "all equal" in run(code, interpret=True)


@pytest.mark.full
def test_every_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code of compute capability 9.0, bf16 in and out: what a type or a shape would break is found here."""
    said = [line.split(":", 1) for line in run(COMPILED, interpret=False).splitlines()]
    assert {name for name, _ in said} == {"conv_forward", "conv_gradients"}
    assert all(text.endswith(" 0 bytes spilled") for _, text in said), said
