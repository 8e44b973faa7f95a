"""One more token a row by the compiled kernels: the truth's numbers, from what a row sees and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hymba_tune.model.ops import cpu, cpu_steps, reference_steps
from tests.model.ops import test_causal_conv1d as convs
from tests.model.ops.test_steps import attention_inputs, check_append, check_in_place, given, scan_inputs

pytestmark = pytest.mark.skipif(cpu.steps() is not cpu_steps, reason="needs a C compiler")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}

# Rows that are empty, part of a ring, a full one, and around it; fewer keys than a vector holds, and several blocks.
CASES = [
    # lengths, slots, window, (query, K/V) heads, (d, dv), meta tokens
    ([0, 1, 40, 41, 97], 41, None, (5, 1), (4, 8), 3),
    ([37, 38, 90], 37, 37, (4, 2), (16, 32), 0),
    ([60, 3, 200, 59], 60, 21, (2, 2), (5, 17), 33),
    ([9, 0], 16, 0, (3, 1), (8, 4), 1),
    ([33, 35, 36, 0], 35, 50, (14, 2), (24, 48), 5),
    ([1, 0, 130], 130, 129, (10, 2), (64, 128), 70),
    ([2], 1, None, (1, 1), (1, 1), 0),
    ([0], 0, None, (2, 1), (19, 3), 2),
]


def compiled(inputs: dict[str, Tensor], window: int | None = None) -> Tensor:
    return cpu_steps.attention_step(**inputs, window=window)


def truth(inputs: dict[str, Tensor], window: int | None = None) -> Tensor:
    return reference_steps.attention_step(**inputs, window=window)


def poisoned(inputs: dict[str, Tensor], window: int | None) -> dict[str, Tensor]:
    """NaN in every slot that the row's next token does not see."""
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    slots = inputs["cached_k"].shape[2]
    for row, length in enumerate(inputs["lengths"].tolist()):
        seen = {p % slots for p in range(max(0, length - min(slots, slots if window is None else window)), length)}
        unseen = [slot for slot in range(slots) if slot not in seen]
        poisoned["cached_k"][row, :, unseen] = float("nan")
        poisoned["cached_v"][row, :, unseen] = float("nan")
    return poisoned


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_truth_s_whatever_lies_in_unseen_slots(
    case: tuple[list[int], int, int | None, tuple[int, int], tuple[int, int], int], dtype: torch.dtype
) -> None:
    lengths, slots, window, heads, sizes, meta = case
    torch.manual_seed(0)
    inputs = attention_inputs(lengths, slots, heads, sizes, meta, dtype)
    found = compiled(poisoned(inputs, window), window)
    expected = truth(inputs, window)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["q", "k", "v", "meta_k", "meta_v", "cached_k", "cached_v"])
def test_a_nan_that_is_seen_stays_one(name: str) -> None:
    inputs = attention_inputs([3, 8], 8, heads=(4, 2), dtype=torch.float32)
    inputs[name].view(-1)[0] = float("nan")
    found, expected = compiled(inputs), truth(inputs)
    assert found.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


def test_large_scores_do_not_overflow() -> None:
    inputs = attention_inputs([30], 30, dtype=torch.float32)
    inputs["q"] *= 1e4
    torch.testing.assert_close(compiled(inputs), truth(inputs))


def test_tensors_of_another_type_or_with_gaps_are_taken_too() -> None:
    inputs = attention_inputs([5, 11, 2], 8, heads=(4, 2), dtype=torch.float32)
    expected = truth(inputs)
    gaps = {name: t.repeat_interleave(2, -1)[..., ::2] if t.dim() > 1 else t.int() for name, t in inputs.items()}
    torch.testing.assert_close(compiled(gaps), expected)
    mixed = inputs | {"q": inputs["q"].half(), "k": inputs["k"].bfloat16()}
    found = compiled(mixed)
    assert found.dtype == torch.float16
    assert torch.equal(found, truth(mixed))


def test_threads_do_not_change_a_bit() -> None:
    inputs = attention_inputs([700, 3, 1024, 0, 2000], 1024, (10, 2), (24, 48), 8, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compiled(inputs, 1000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16], ids=str)
def test_new_keys_and_values_go_where_the_truth_writes_them(dtype: torch.dtype) -> None:
    for lengths, slots in (([0, 1, 40, 41, 97], 41), ([5], 8)):
        check_append(cpu_steps.append_step, attention_inputs(lengths, slots, (4, 2), (5, 17), 0, dtype))


@pytest.mark.parametrize("as_prefilled", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [(1, 4, 4, 4), (3, 37, 5, 3), (5, 9, 16, 2), (2, 600, 16, 4)], ids=str)
def test_conv_and_scan_are_the_truth_s_and_change_the_state_in_place(
    size: tuple[int, int, int, int], dtype: torch.dtype, as_prefilled: bool
) -> None:
    """Whatever the layout of the state's memory; x is a part of wider rows."""
    rows, channels, states, taps = size
    torch.manual_seed(0)
    scanned = scan_inputs(rows, channels, states, dtype)
    convolved = given(convs.random_inputs(rows, taps, channels, dtype, initial=rows))
    convolved["state"] = convolved.pop("initial_state")
    convolved["x"] = torch.cat([convolved["x"], convolved["x"]], 1)[:, :channels]
    for inputs in (scanned, convolved):
        if as_prefilled:
            inputs["state"] = inputs["state"].mT.contiguous().mT
    check_in_place(cpu_steps.scan_step, reference_steps.scan_step, scanned)
    check_in_place(cpu_steps.conv_step, reference_steps.conv_step, convolved)


def test_autograd_hears_of_what_was_changed_in_place() -> None:
    scanned = scan_inputs(2, 8, 4, torch.float32)
    held = attention_inputs([3], 4, dtype=torch.float32)
    for state in (scanned["state"], scanned["state"].mT.contiguous().mT):
        before = state._version
        cpu_steps.scan_step(**{**scanned, "state": state})
        assert state._version > before
    cpu_steps.append_step(held["k"], held["v"], held["cached_k"], held["cached_v"], held["lengths"])
    assert held["cached_k"]._version == held["cached_v"]._version == 1


def test_states_of_a_type_without_kernels_are_the_truth_s() -> None:
    scanned = scan_inputs(2, 8, 4, torch.float16)
    state, expected = scanned.pop("state"), scanned["x"].new_empty(0)
    found_state, expected_state = state.clone(), state.clone()
    found = cpu_steps.scan_step(**scanned, state=found_state)
    expected = reference_steps.scan_step(**scanned, state=expected_state)
    assert torch.equal(found, expected)
    assert torch.equal(found_state, expected_state)
