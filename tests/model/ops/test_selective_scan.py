"""Every backend of the selective scan against the reference, and the reference against the formula."""

import math
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
    wide,
)

BACKENDS = [pytest.param(cpu_scan.selective_scan, marks=needs_compiler, id="cpu"), portable.selective_scan]

Inputs = dict[str, Tensor | None]


def random_inputs(
    tokens: int, states: int = 16, channels: int = 37, dtype: torch.dtype = torch.float32, initial: int | None = None
) -> Inputs:
    """Inputs of a scan whose memories last from one token to hundreds; `initial` states, or none."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "x": normal(tokens, channels),
        "dt": normal(tokens, channels, dtype=wide(dtype)) - 2,
        "A": -torch.rand(channels, states, dtype=torch.float64).to(wide(dtype)) * 4,
        "B": normal(tokens, states),
        "C": normal(tokens, states),
        "D": normal(channels, dtype=wide(dtype)),
        "gate": normal(tokens, channels),
        "initial_state": None if initial is None else normal(initial, channels, states, dtype=wide(dtype)),
    }


def upstream_of(inputs: Inputs, segments: int) -> list[Tensor]:
    x, rates = inputs["x"], inputs["A"]
    assert x is not None
    assert rates is not None
    return [torch.randn(x.shape, dtype=x.dtype), torch.randn(segments, *rates.shape, dtype=rates.dtype)]


def check(op: Callable[..., tuple[Tensor, ...]], lengths: list[int], inputs: Inputs) -> None:
    upstream = upstream_of(inputs, len(lengths))
    expected = results(reference.selective_scan, inputs, offsets(lengths), upstream)
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


@pytest.mark.parametrize(("channels", "states"), [(1, 16), (16, 16), (300, 16), (20, 5), (5, 1)])
@pytest.mark.parametrize("op", BACKENDS)
def test_any_number_of_channels_and_states(op: Callable[..., tuple[Tensor, ...]], channels: int, states: int) -> None:
    torch.manual_seed(1)
    check(op, [33, 20], random_inputs(53, states, channels, initial=2))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("num_meta", [1, 20])
def test_with_meta_tokens_in_front_every_segment_continues_them(
    num_meta: int, lengths: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(6)
    inputs, ends = random_inputs(num_meta + sum(lengths), dtype=dtype), offsets(lengths)
    upstream = upstream_of(inputs, len(lengths))
    assert_same_results(*results_with_meta(cpu_scan.selective_scan, "selective_scan", num_meta, ends, inputs, upstream))


@needs_compiler
def test_meta_tokens_and_an_initial_state_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="initial_state is what the num_meta tokens leave"):
        cpu_scan.selective_scan(**random_inputs(5, initial=1), cu_seqlens=offsets([3]), num_meta=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", BACKENDS)
def test_inputs_may_be_slices_and_transposes(op: Callable[..., tuple[Tensor, ...]]) -> None:
    torch.manual_seed(2)
    inputs = random_inputs(40, initial=2)
    strided = {name: None if t is None else torch.stack([t, t], -1)[..., 0] for name, t in inputs.items()}
    sliced = torch.cat([torch.randn(40, 3), inputs["x"], inputs["gate"], inputs["dt"]], -1)  # type: ignore[list-item]
    strided |= {"x": sliced[:, 3:40], "gate": sliced[:, 40:77], "dt": sliced[:, 77:]}
    upstream = [t.mT.contiguous().mT for t in upstream_of(inputs, 2)]
    expected = results(reference.selective_scan, inputs, offsets([25, 15]), upstream)
    assert_same_results(results(op, strided, offsets([25, 15]), upstream), expected)


@pytest.mark.parametrize("op", BACKENDS)
def test_large_and_tiny_arguments(op: Callable[..., tuple[Tensor, ...]]) -> None:
    """Decays that underflow, steps that vanish, gates that saturate: no overflow on the way to a finite result."""
    torch.manual_seed(3)
    inputs = random_inputs(60, dtype=torch.float64, initial=1)
    assert inputs["dt"] is not None
    assert inputs["gate"] is not None
    inputs["dt"] = inputs["dt"] * 30
    inputs["gate"] = inputs["gate"] * 300
    for dtype in (torch.float32, torch.float64):
        check(op, [60], {name: None if t is None else t.to(dtype) for name, t in inputs.items()})


@pytest.mark.parametrize("op", [*BACKENDS, reference.selective_scan])
def test_nan_is_not_hidden(op: Callable[..., tuple[Tensor, ...]]) -> None:
    for name in ("x", "dt", "gate"):
        inputs = random_inputs(5)
        inputs[name][2] = math.nan  # type: ignore[index]
        y, _ = op(**inputs, cu_seqlens=offsets([5]))
        assert y[2].isnan().all()
        assert y[:2].isfinite().all()


@pytest.mark.parametrize("op", [*BACKENDS, reference.selective_scan])
def test_a_segment_does_not_see_its_neighbours(op: Callable[..., tuple[Tensor, ...]]) -> None:
    """Other tokens in the first segment, equal bits in the second: outputs, states and gradients."""
    torch.manual_seed(4)
    lengths = [70, 45]
    inputs = random_inputs(sum(lengths), initial=1)
    other = inputs | {name: inputs[name].clone() for name in ("x", "dt", "B", "C", "gate")}  # type: ignore[union-attr]
    for name in ("x", "dt", "B", "C", "gate"):
        other[name][:70] = torch.randn_like(other[name][:70])
    upstream = upstream_of(inputs, 2)
    one, two = (results(op, i, offsets(lengths), upstream) for i in (inputs, other))
    for name in ("output 0", "d x", "d dt", "d B", "d C", "d gate"):
        assert torch.equal(one[name][70:], two[name][70:]), name
        assert not torch.equal(one[name][:70], two[name][:70]), name
    assert torch.equal(one["output 1"][1], two["output 1"][1])


@pytest.mark.parametrize("op", [*BACKENDS, reference.selective_scan])
def test_a_scan_can_be_cut_anywhere(op: Callable[..., tuple[Tensor, ...]]) -> None:
    """The final state handed on as the initial state continues the scan."""
    torch.manual_seed(5)
    inputs = random_inputs(50, dtype=torch.float64)
    y, final = op(**inputs, cu_seqlens=offsets([50]))
    first, state = op(**_tokens(inputs, slice(0, 21)), cu_seqlens=offsets([21]))
    second, last = op(**_tokens(inputs, slice(21, 50)) | {"initial_state": state}, cu_seqlens=offsets([29]))
    torch.testing.assert_close(torch.cat([first, second]), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=0, atol=1e-12)


def _tokens(inputs: Inputs, tokens: slice) -> Inputs:
    return inputs | {name: inputs[name][tokens] for name in ("x", "dt", "B", "C", "gate")}  # type: ignore[index]


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(6)
    lengths = [90, 7]
    inputs = random_inputs(97, channels=300, initial=1)
    upstream = upstream_of(inputs, 2)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(results(cpu_scan.selective_scan, inputs, offsets(lengths), upstream))
    torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(again[name], t) for name, t in found[0].items())


def test_the_reference_is_the_formula() -> None:
    """One channel, one state, by hand."""
    x, dt, gate, b, c = ([0.5, -1.0, 2.0], [0.1, -0.3, 0.7], [1.0, -2.0, 0.5], [0.3, 0.9, -0.4], [1.5, -0.2, 0.8])
    rate, skip, state = -0.6, 0.25, 0.1
    expected = []
    for x_t, dt_t, gate_t, b_t, c_t in zip(x, dt, gate, b, c, strict=True):
        delta = math.log1p(math.exp(dt_t))
        state = math.exp(delta * rate) * state + delta * b_t * x_t
        expected.append((c_t * state + skip * x_t) * gate_t / (1 + math.exp(-gate_t)))

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).unsqueeze(1)

    one_channel = {"x": x, "dt": dt, "A": [rate], "B": b, "C": c, "gate": gate}
    inputs = {name: column(values) for name, values in one_channel.items()}
    initial = column([0.1]).unsqueeze(0)
    y, final = reference.selective_scan(
        **inputs, D=torch.tensor([skip], dtype=torch.float64), cu_seqlens=offsets([3]), initial_state=initial
    )
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    assert float(final) == pytest.approx(state, abs=1e-15)


def test_the_reference_s_gradients_are_its_derivatives() -> None:
    torch.manual_seed(7)
    inputs = random_inputs(7, states=2, channels=3, dtype=torch.float64, initial=1)
    leaves = [t.requires_grad_() for t in inputs.values() if t is not None]
    assert torch.autograd.gradcheck(
        lambda *t: reference.selective_scan(**dict(zip(inputs, t, strict=True)), cu_seqlens=offsets([3, 0, 4])), leaves
    )
