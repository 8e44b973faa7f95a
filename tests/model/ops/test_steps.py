"""Decoding steps: one more token a row is the last token of the whole sequence, in plain torch and in Triton.

Triton's interpreter is chosen when Triton is imported, so its tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model.ops import reference, reference_steps
from tests.model.ops import test_causal_conv1d as convs
from tests.model.ops import test_selective_scan as scans
from tests.model.ops.cases import offsets

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Of the same type, and apart by no more than rounding, measured against the largest number."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        assert float(error) <= TOLERANCE[dtype], float(error)


def given(drawn: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Without the arguments that are left out."""
    return {name: t for name, t in drawn.items() if t is not None}


def attention_inputs(
    lengths: list[int],
    slots: int,
    heads: tuple[int, int] = (5, 1),
    sizes: tuple[int, int] = (4, 8),
    meta: int = 3,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random arguments; (query, K/V) heads; (d, dv). What lies in empty slots is random too, as after other rows."""
    (query_heads, kv_heads), (dim, value_dim), rows = heads, sizes, len(lengths)
    shapes: dict[str, tuple[int, ...]] = {"q": (rows, query_heads, dim)}
    for name, size in (("k", dim), ("v", value_dim)):
        shapes |= {name: (rows, kv_heads, size), f"meta_{name}": (meta, kv_heads, size)}
        shapes |= {f"cached_{name}": (rows, kv_heads, slots, size)}
    inputs = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    return {**inputs, "lengths": torch.tensor(lengths)}


def scan_inputs(rows: int, channels: int, states: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random arguments of scan_step; x, B and C are parts of wider rows, as projections give them."""
    drawn = given(scans.random_inputs(rows, states, channels, dtype, initial=rows))
    parts = [drawn.pop(name) for name in ("x", "B", "C")]
    x, b, c = torch.cat(parts, 1).split([p.shape[1] for p in parts], 1)
    drawn["A_log"] = torch.log(-drawn.pop("A"))
    drawn["state"] = drawn.pop("initial_state").contiguous()
    return {**drawn, "x": x, "B": b, "C": c}


def check_attention(step: Any, inputs: dict[str, Tensor], window: int | None) -> None:
    close(step(**inputs, window=window), reference_steps.attention_step(**inputs, window=window), inputs["q"].dtype)


def check_append(step: Any, inputs: dict[str, Tensor]) -> None:
    """Into the slots that the truth writes, and no other."""
    found, expected = ([inputs["cached_k"].clone(), inputs["cached_v"].clone()] for _ in range(2))
    step(inputs["k"], inputs["v"], *found, inputs["lengths"])
    reference_steps.append_step(inputs["k"], inputs["v"], expected[0], expected[1], inputs["lengths"])
    assert all(torch.equal(ours, truth) for ours, truth in zip(found, expected, strict=True))
    assert not torch.equal(found[0], inputs["cached_k"])


def check_in_place(step: Any, truth: Any, inputs: dict[str, Tensor]) -> None:
    """The output and the state, which is changed where it lies."""
    state, place = inputs.pop("state"), inputs["x"].dtype
    expected_state, found_state = state.clone(), state.clone()
    expected = truth(**inputs, state=expected_state)
    close(step(**inputs, state=found_state), expected, place)
    assert not torch.equal(found_state, state)
    close(found_state, expected_state, place)


@pytest.mark.parametrize("window", [None, 0, 2, 9])
@pytest.mark.parametrize("length", [0, 1, 6])
def test_attention_to_one_more_token_is_the_last_row_of_attention(length: int, window: int | None) -> None:
    """In a buffer that holds everything, and in a ring of as many slots as the window."""
    held = attention_inputs([length], length + 2)
    positions = torch.arange(length)
    keys, values = (
        torch.cat([held[f"cached_{name}"][0, :, :length].transpose(0, 1), held[name]]) for name in ("k", "v")
    )
    queries = torch.randn(length + 1, *held["q"].shape[1:], dtype=torch.float64)
    queries[-1] = held["q"][0]
    whole = reference.segment_attention(
        queries, keys, values, offsets([length + 1]), held["meta_k"], held["meta_v"], window
    )
    torch.testing.assert_close(reference_steps.attention_step(**held, window=window), whole[-1:])
    if window:
        ring = {
            name: held[name].new_full((1, 1, window, held[name].shape[-1]), 7.0) for name in ("cached_k", "cached_v")
        }
        for name, slots in ring.items():
            last = positions[-window:]
            slots[:, :, last % window] = held[name][:, :, last]
        torch.testing.assert_close(reference_steps.attention_step(**{**held, **ring}, window=window), whole[-1:])


def test_conv_and_scan_of_one_more_token_are_the_sequences_last() -> None:
    drawn = given(convs.random_inputs(6, 4, 5, torch.float64, initial=3))
    ends, once = offsets([2, 2, 2]), offsets([1, 1, 1])
    y, final = reference.causal_conv1d(**drawn, cu_seqlens=ends)
    first = {**drawn, "x": drawn["x"][::2]}
    _, state = reference.causal_conv1d(**first, cu_seqlens=once)
    step = reference_steps.conv_step(drawn["x"][1::2], drawn["weight"], drawn["bias"], state)
    torch.testing.assert_close((step, state), (y[1::2], final))

    inputs = given(scans.random_inputs(6, 5, 4, torch.float64, initial=3))
    y, final = reference.selective_scan(**inputs, cu_seqlens=ends)
    halves = [{n: t[i::2] if len(t) == 6 else t for n, t in inputs.items()} for i in range(2)]
    _, state = reference.selective_scan(**halves[0], cu_seqlens=once)
    last = {name: t for name, t in halves[1].items() if name not in ("A", "initial_state")}
    step = reference_steps.scan_step(**last, A_log=torch.log(-inputs["A"]), state=state)
    torch.testing.assert_close((step, state), (y[1::2], final))


IN_THE_INTERPRETER = """
import torch
from hymba_tune.model.ops import reference_steps, triton_steps
from tests.model.ops import test_steps as cases
from tests.model.ops import test_causal_conv1d as convs

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
torch.manual_seed(0)
triton_steps.KEYS, triton_steps.CONV_BLOCK, triton_steps.SCAN_ROWS, triton_steps.SCAN_BLOCK = 16, 4, 2, 4
triton_steps.JOINED = 2
exact, single, rounded = torch.float64, torch.float32, torch.bfloat16
"""
ATTENTION = """
# Rows that are empty, part of a ring, a full one, and around it; one part, several, and more than there are tokens.
for programs, longest in ((1, 1000), (40, 16)):
    triton_steps.PROGRAMS, triton_steps.LONGEST_PART = programs, longest
    for lengths, slots, window, heads, sizes, meta, dtype in (
        ([0, 1, 40, 41, 97], 41, None, (5, 1), (4, 8), 3, exact),
        ([37, 38, 90], 37, 37, (4, 2), (16, 8), 0, exact),
        ([60, 3], 60, 21, (2, 2), (5, 17), 33, exact),
        ([9, 0], 16, 0, (3, 1), (8, 4), 1, exact),
        ([33], 35, 35, (5, 1), (12, 16), 5, single),
        ([70], 35, 20, (5, 1), (64, 128), 20, rounded),
    ):
        inputs = cases.attention_inputs(lengths, slots, heads, sizes, meta, dtype)
        cases.check_attention(triton_steps.attention_step, inputs, window)
        cases.check_append(triton_steps.append_step, inputs)
print("all equal")
"""
STATES = """
for rows, channels, states, taps in ((1, 4, 4, 4), (3, 7, 5, 3), (5, 9, 16, 2)):
    for dtype in (exact, single, rounded):
        inputs = cases.scan_inputs(rows, channels, states, dtype)
        cases.check_in_place(triton_steps.scan_step, reference_steps.scan_step, inputs)
        drawn = convs.random_inputs(rows, taps, channels, dtype, initial=rows)
        drawn["state"] = drawn.pop("initial_state")
        drawn["x"] = torch.cat([drawn["x"], drawn["x"]], 1)[:, :channels]
        cases.check_in_place(triton_steps.conv_step, reference_steps.conv_step, drawn)
print("all equal")
"""


def run(code: str, interpret: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the dev extra brings it"
)


@TRITON
@pytest.mark.parametrize("cases", [ATTENTION, STATES], ids=["attention", "conv and scan"])
def test_triton_s_steps_are_the_reference_s(cases: str) -> None:
    assert "all equal" in run(IN_THE_INTERPRETER + cases, interpret=True)


WHOLE_MODEL = """
from hymba_tune.model import ops
from hymba_tune.model.static_cache import StaticDecoder, StaticHymbaCache
from tests.model.models import EXACT, random_ids, random_model, tiny_config
from tests.model.test_static_cache import prefilled

torch.set_grad_enabled(False)
for name in NAMES:
    model = random_model(tiny_config(name))
    torch_s, triton_s = (StaticHymbaCache.of(prefilled(model)) for _ in range(2))
    for step in range(STEPS):
        ids = random_ids(3, 1, seed=step)
        expected = model(ids, past_key_values=torch_s, use_cache=True).logits
        with ops.use_backend("triton"):
            found = model(ids, past_key_values=triton_s, use_cache=True).logits
        torch.testing.assert_close(found, expected, **EXACT)
print("all equal")
"""


@TRITON
@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["attention_and_ssm_only_layers"], 2),
        pytest.param(["odd_heads_ntk", "first_layer_windowed_two_groups", "no_meta_tokens"], 9, marks=pytest.mark.full),
    ],
    ids=["two steps", "three windows"],
)
def test_a_model_decodes_the_same_in_triton(names: list[str], steps: int) -> None:
    code = f"NAMES, STEPS = {names}, {steps}\n{WHOLE_MODEL}"
    assert "all equal" in run(IN_THE_INTERPRETER + code, interpret=True)


COMPILED = """
import torch
from hymba_tune.model.ops import triton_steps
from tests.model.ops import absent_gpu

def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, device="meta")

# Hymba-1.5B, batch 128.
q, k, v, meta = (zeros(128, *size) for size in ((25, 64), (5, 64), (5, 128), (5, 64)))
lengths = zeros(128, dtype=torch.int64)
for slots, window in ((8220, None), (1024, 1024), (256, 1024)):
    caches = zeros(128, 5, slots, 64), zeros(128, 5, slots, 128)
    triton_steps.attention_step(q, k, v, meta, zeros(128, 5, 128), *caches, lengths, window)
    triton_steps.append_step(k, v, *caches, lengths)
projected, selected, wide = zeros(128, 8960), zeros(128, 132), torch.float32
x, gate = projected[:, 2560:5760], projected[:, 5760:]
triton_steps.conv_step(x, zeros(3200, 4), zeros(3200), zeros(128, 3200, 4))
triton_steps.scan_step(zeros(128, 3200), zeros(128, 3200, dtype=wide), zeros(3200, 16), selected[:, 100:116],
                       selected[:, 116:], zeros(3200), gate, zeros(128, 3200, 16, dtype=wide))
"""


@pytest.mark.full
@TRITON
def test_every_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code of compute capability 9.0 for the shapes of Hymba-1.5B in bf16."""
    said = run(COMPILED, interpret=False).splitlines()
    assert {line.partition(":")[0] for line in said} == {"attend", "join", "append", "conv", "scan"}
    assert all(line.endswith(" 0 bytes spilled") for line in said), said


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_a_gpu_triton_s_steps_are_the_reference_s(dtype: torch.dtype) -> None:
    """Shapes of Hymba-1.5B, rows of all kinds; no attention in float64, which has no such product."""
    from hymba_tune.model.ops import triton_steps

    torch.manual_seed(0)
    if dtype != torch.float64:
        for lengths, slots, window in (([0, 1, 700, 3000], 3000, None), ([0, 30, 1024, 2900], 1024, 1024)):
            inputs = attention_inputs(lengths, slots, (25, 5), (64, 128), 128, dtype)
            there = {n: t.cuda() for n, t in inputs.items()}
            check_attention(triton_steps.attention_step, there, window)
            check_append(triton_steps.append_step, there)
    scanned = {n: t.cuda() for n, t in scan_inputs(5, 3200, 16, dtype).items()}
    check_in_place(triton_steps.scan_step, reference_steps.scan_step, scanned)
    drawn = given(convs.random_inputs(5, 4, 3200, dtype, initial=5))
    convolved = {n.replace("initial_", ""): t.cuda() for n, t in drawn.items()}
    check_in_place(triton_steps.conv_step, reference_steps.conv_step, convolved)
