"""Every backend of the causal conv against the reference, and the reference against the formula."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba_tune.model.ops import cpu_scan, portable, reference
from tests.model.ops.cases import (
    DTYPES,
    SEGMENTS,
    assert_same_results,
    needs_compiler,
    offsets,
    results,
    results_with_meta,
)

BACKENDS = [pytest.param(cpu_scan.causal_conv1d, marks=needs_compiler, id="cpu"), portable.causal_conv1d]

Inputs = dict[str, Tensor | None]


def random_inputs(
    tokens: int, taps: int = 4, channels: int = 37, dtype: torch.dtype = torch.float32, initial: int | None = None
) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "x": normal(tokens, channels),
        "weight": normal(channels, taps),
        "bias": normal(channels),
        "initial_state": None if initial is None else normal(initial, channels, taps),
    }


def upstream_of(inputs: Inputs, segments: int) -> list[Tensor]:
    x, weight = inputs["x"], inputs["weight"]
    assert x is not None
    assert weight is not None
    return [torch.randn(x.shape, dtype=x.dtype), torch.randn(segments, *weight.shape, dtype=x.dtype)]


def check(op: Callable[..., tuple[Tensor, ...]], lengths: list[int], inputs: Inputs) -> None:
    upstream = upstream_of(inputs, len(lengths))
    expected = results(reference.causal_conv1d, inputs, offsets(lengths), upstream)
    assert_same_results(results(op, inputs, offsets(lengths), upstream), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("op", BACKENDS)
def test_outputs_and_gradients_are_the_reference_s(
    op: Callable[..., tuple[Tensor, ...]], lengths: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for initial in (None, 1, len(lengths)):
        check(op, lengths, random_inputs(sum(lengths), dtype=dtype, initial=initial))


@pytest.mark.parametrize(("channels", "taps"), [(1, 4), (16, 4), (300, 4), (20, 1), (20, 7)])
@pytest.mark.parametrize("op", BACKENDS)
def test_any_number_of_channels_and_taps(op: Callable[..., tuple[Tensor, ...]], channels: int, taps: int) -> None:
    torch.manual_seed(1)
    check(op, [33, 2, 20], random_inputs(55, taps, channels, initial=3))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("num_meta", [1, 2, 20])
def test_with_meta_tokens_in_front_every_segment_continues_them(
    num_meta: int, lengths: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(6)
    inputs, ends = random_inputs(num_meta + sum(lengths), dtype=dtype), offsets(lengths)
    upstream = upstream_of(inputs, len(lengths))
    assert_same_results(*results_with_meta(cpu_scan.causal_conv1d, "causal_conv1d", num_meta, ends, inputs, upstream))


@pytest.mark.parametrize("op", BACKENDS)
def test_inputs_may_be_slices_and_transposes(op: Callable[..., tuple[Tensor, ...]]) -> None:
    torch.manual_seed(2)
    inputs = random_inputs(40, initial=2)
    strided = {name: None if t is None else torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}
    strided["x"] = torch.cat([torch.randn(40, 3), inputs["x"], torch.randn(40, 5)], -1)[:, 3:40]  # type: ignore[list-item]
    upstream = [t.mT.contiguous().mT for t in upstream_of(inputs, 2)]
    expected = results(reference.causal_conv1d, inputs, offsets([25, 15]), upstream)
    assert_same_results(results(op, strided, offsets([25, 15]), upstream), expected)


@pytest.mark.parametrize("op", [*BACKENDS, reference.causal_conv1d])
def test_a_segment_does_not_see_its_neighbours(op: Callable[..., tuple[Tensor, ...]]) -> None:
    """Other tokens in the first segment, equal bits in the second."""
    torch.manual_seed(3)
    inputs = random_inputs(30, initial=1)
    assert inputs["x"] is not None
    other = inputs | {"x": torch.cat([torch.randn(17, 37), inputs["x"][17:]])}
    upstream = upstream_of(inputs, 2)
    one, two = (results(op, i, offsets([17, 13]), upstream) for i in (inputs, other))
    for name in ("output 0", "d x"):
        assert torch.equal(one[name][17:], two[name][17:]), name
        assert not torch.equal(one[name][:17], two[name][:17]), name
    assert torch.equal(one["output 1"][1], two["output 1"][1])


@pytest.mark.parametrize("op", [*BACKENDS, reference.causal_conv1d])
@pytest.mark.parametrize("cut", [1, 2, 11])
def test_a_sequence_can_be_cut_anywhere(op: Callable[..., tuple[Tensor, ...]], cut: int) -> None:
    """The final state handed on as the initial state continues the convolution, also after fewer tokens than taps."""
    torch.manual_seed(4)
    inputs = random_inputs(12, dtype=torch.float64, initial=1)
    x = inputs["x"]
    assert x is not None
    y, final = op(**inputs, cu_seqlens=offsets([12]))
    first, state = op(**inputs | {"x": x[:cut]}, cu_seqlens=offsets([cut]))
    second, last = op(**inputs | {"x": x[cut:], "initial_state": state}, cu_seqlens=offsets([12 - cut]))
    torch.testing.assert_close(torch.cat([first, second]), y, rtol=0, atol=1e-14)
    assert torch.equal(last, final)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(5)
    inputs = random_inputs(97, channels=300, initial=1)
    upstream = upstream_of(inputs, 2)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(results(cpu_scan.causal_conv1d, inputs, offsets([90, 7]), upstream))
    torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(again[name], t) for name, t in found[0].items())


def test_the_reference_is_the_formula() -> None:
    """Two taps by hand; of the initial state only the newest input is read."""
    weight, bias = torch.tensor([[2.0, 3.0]]), torch.tensor([0.5])
    state = torch.tensor([[[100.0, 7.0]]])
    y, final = reference.causal_conv1d(torch.tensor([[1.0], [-4.0]]), weight, bias, offsets([2]), state)
    z = torch.tensor([[2 * 7.0 + 3 * 1.0 + 0.5], [2 * 1.0 + 3 * -4.0 + 0.5]])
    torch.testing.assert_close(y, z * z.sigmoid())
    assert final.tolist() == [[[1.0, -4.0]]]


def test_the_reference_s_gradients_are_its_derivatives() -> None:
    torch.manual_seed(6)
    inputs = random_inputs(7, taps=3, channels=2, dtype=torch.float64, initial=1)
    leaves = [t.requires_grad_() for t in inputs.values() if t is not None]
    assert torch.autograd.gradcheck(
        lambda *t: reference.causal_conv1d(**dict(zip(inputs, t, strict=True)), cu_seqlens=offsets([2, 0, 5])), leaves
    )
