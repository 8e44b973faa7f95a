"""Blocked attention on the CPU equals the reference: outputs, every gradient, and no value of another segment."""

from __future__ import annotations

from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import ops
from hymba_tune.model.ops import cpu_attention, cpu_library, reference
from tests.model.ops.cases import needs_compiler

ATOL = {torch.float64: 1e-12, torch.float32: 2e-5}
AWKWARD = ([1], [63], [500], [1, 0, 63, 1, 130, 0, 305], [3] * 60)


def operands(
    tokens: int, prefix: int | None, dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2, dv: int = 16
) -> dict[str, Any]:
    """q, k, v and prefix_k, prefix_v (None without a prefix), 8 wide, to be differentiated."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    given = {"q": draw(tokens, heads, 8), "k": draw(tokens, kv_heads, 8), "v": draw(tokens, kv_heads, dv)}
    if prefix is None:
        return {**given, "prefix_k": None, "prefix_v": None}
    return {**given, "prefix_k": draw(prefix, kv_heads, 8), "prefix_v": draw(prefix, kv_heads, dv)}


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def results(module: ModuleType, given: dict[str, Any], lengths: list[int], window: int | None) -> list[Tensor]:
    """The output, then the gradient of every operand."""
    out = module.segment_attention(**given, cu_seqlens=boundaries(lengths), window=window)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    wanted = [t for t in given.values() if t is not None]
    return [out, *torch.autograd.grad(out, wanted, weights)]


@pytest.fixture(autouse=True, params=[pytest.param("compiled", marks=needs_compiler), "matrix products"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the forward pass is computed by."""
    if request.param == "matrix products":
        monkeypatch.setattr(cpu_library, "problem", lambda: "none is wanted")
    return str(request.param)


only_compiled = pytest.mark.parametrize("forward", ["compiled"], indirect=True)


@pytest.fixture
def nan_filled():
    """Uninitialised memory holds NaN, so that whoever reads it is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("prefix", [None, 0, 5])
@pytest.mark.parametrize("window", [None, 0, 3, 200])
@pytest.mark.parametrize("lengths", AWKWARD, ids=lambda lengths: f"{len(lengths)}_segments_of_{max(lengths)}")
def test_output_and_every_gradient_equal_the_reference(lengths, window, prefix):
    given = operands(sum(lengths), prefix)
    for ours, truth in zip(
        results(cpu_attention, given, lengths, window), results(reference, given, lengths, window), strict=True
    ):
        torch.testing.assert_close(ours, truth, atol=ATOL[torch.float64], rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads", "dv"), [(4, 4, 8), (5, 1, 16), (6, 2, 3)])
def test_any_grouping_and_any_value_width_equals_the_reference(heads, kv_heads, dv):
    lengths = [70, 100]
    given = operands(sum(lengths), 3, heads=heads, kv_heads=kv_heads, dv=dv)
    for ours, truth in zip(
        results(cpu_attention, given, lengths, 16), results(reference, given, lengths, 16), strict=True
    ):
        torch.testing.assert_close(ours, truth, atol=ATOL[torch.float64], rtol=0)


def test_float32_equals_the_reference_across_a_window_of_1024():
    lengths = [1030]
    given = operands(sum(lengths), 128, torch.float32)
    for ours, truth in zip(
        results(cpu_attention, given, lengths, 1024), results(reference, given, lengths, 1024), strict=True
    ):
        torch.testing.assert_close(ours, truth, atol=ATOL[torch.float32], rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float64_as_its_rounding(autocast):
    lengths = [200, 37, 150]
    given = operands(sum(lengths), 9, torch.bfloat16)
    exact = {name: t if t is None else t.detach().double().requires_grad_() for name, t in given.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = results(cpu_attention, given, lengths, 100)
    for ours, truth in zip(rounded, results(reference, exact, lengths, 100), strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < 2**-7


def test_autocast_leaves_float32_operands_in_float32():
    given = operands(100, 9, torch.float32)
    plain = results(cpu_attention, given, [100], None)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, truth in zip(results(cpu_attention, given, [100], None), plain, strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_segments_tokens_leave_a_segment_bit_equal(dtype):
    lengths = [50, 100, 300]
    given = operands(sum(lengths), 5, dtype)
    changed: dict[str, Any] = {
        name: t if t is None else t.detach().clone().requires_grad_() for name, t in given.items()
    }
    for name in ("q", "k", "v"):
        changed[name].data[:50] *= 30
    before, after = (results(cpu_attention, g, lengths, 64)[:4] for g in (given, changed))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[50:], other[50:])
        assert not torch.equal(one[:50], other[:50])


def test_no_tokens_give_an_empty_output_and_zero_gradients():
    out, *grads = results(cpu_attention, operands(0, 5), [0, 0], None)
    assert out.shape == (0, 4, 16)
    assert [g.abs().sum().item() for g in grads] == [0] * 5


def test_only_the_gradients_asked_for_are_returned():
    given = operands(20, 5)
    given["k"].requires_grad_(False)
    out = cpu_attention.segment_attention(**given, cu_seqlens=boundaries([20]))
    out.sum().backward()
    assert given["k"].grad is None
    assert given["prefix_k"].grad is not None


def test_keys_scored_grow_with_the_window_and_not_with_the_length():
    def scored(tokens: int) -> int:
        return sum(block.stop - block.first_key for block in cpu_attention.plan((0, tokens), 256))

    assert scored(16_384) < 2.1 * scored(8_192)
    short = tuple(range(0, 16_385, 64))
    assert max(block.stop - block.first_key for block in cpu_attention.plan(short, 256)) <= cpu_attention.QUERIES


@torch.no_grad()
@pytest.mark.parametrize("meta", [0, 5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_some_queries_get_what_they_get_among_all(dtype, window, meta):
    lengths = [1, 0, 63, 1, 130, 0, 305]
    given = operands(meta + sum(lengths), None, dtype)
    q, k, v = (given[name].detach() for name in "qkv")
    queries = torch.tensor([0, 1, 2, 60, 64, 65, 70, 194, 195, 499])
    whole = ops.segment_attention(q, k, v, boundaries(lengths), window=window, num_meta=meta)[meta + queries]
    some = ops.segment_attention(
        q[meta + queries], k, v, boundaries(lengths), window=window, num_meta=meta, queries=queries
    )
    torch.testing.assert_close(some, whole, atol=1e-12 if dtype == torch.float64 else 2**-7, rtol=0)
    none = ops.segment_attention(q[:0], k, v, boundaries(lengths), window=window, num_meta=meta, queries=queries[:0])
    assert none.shape == (0, *whole.shape[1:])


@needs_compiler
@only_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_gives_equal_bits_on_any_number_of_threads(dtype):
    given = operands(700, 9, dtype)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(cpu_attention.segment_attention(**given, cu_seqlens=boundaries([500, 200]), window=100))
    torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)


@needs_compiler
@only_compiled
def test_the_kernel_takes_large_scores_long_prefixes_and_the_widths_of_real_heads():
    """Scores of +-400, whose exponentials overflow; more keys than the kernel takes at a time, in prefix and stream."""
    given: dict[str, Any] = {
        name: t if t is None else (t.detach() * 12).requires_grad_() for name, t in operands(900, 300, dv=40).items()
    }
    wide = {
        name: torch.cat([t] * 8, -1).detach().requires_grad_() if name in ("q", "k", "prefix_k") else t
        for name, t in given.items()
    }
    for window in (None, 600):
        for ours, truth in zip(
            results(cpu_attention, wide, [900], window), results(reference, wide, [900], window), strict=True
        ):
            torch.testing.assert_close(ours, truth, atol=1e-9, rtol=1e-9)


@needs_compiler
@only_compiled
def test_nan_is_not_hidden_by_the_kernel():
    given: dict[str, Any] = {name: t if t is None else t.detach() for name, t in operands(60, 5).items()}
    given["k"][40] = float("nan")
    out = cpu_attention.segment_attention(**given, cu_seqlens=boundaries([60]))
    assert out[40:].isnan().all()
    assert out[:32].isfinite().all()
