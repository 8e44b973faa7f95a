"""The backend of mamba-ssm, causal-conv1d and flash-attn hands each the calls that it computes, and no other.

The packages need a GPU: what stands in for them here takes what their releases take (types, layouts, arguments),
refuses what those refuse, and computes what they document.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_tune.model import ops
from hymba_tune.model.ops import gpu, meta_first, packages, reference
from tests.model.models import random_ids, random_model, tiny_config

NAMES = ("selective_scan", "causal_conv1d", "segment_attention")
META = 3


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_softplus: bool,
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """u, delta, z (1, D, L), B, C (1, N, L) of one type -> (1, D, L) and the last state (1, D, N)."""
    assert delta_softplus
    assert return_last_state
    assert {t.dtype for t in (u, delta, B, C, z)} == {u.dtype}
    assert A.dtype == D.dtype == torch.float32
    state, outputs, step = u.new_zeros(1, *A.shape), [], F.softplus(delta)
    for t in range(u.shape[2]):
        decay, drive = torch.exp(step[:, :, t, None] * A), (step * u)[:, :, t, None] * B[:, None, :, t]
        state = decay * state + drive
        outputs.append((state * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(outputs, 2) * F.silu(z), state


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor, *, initial_states: Tensor | None, activation: str
) -> Tensor:
    """x (1, D, L), channels next to each other, weight (D, K), initial_states (1, D, K - 1) -> (1, D, L)."""
    assert activation == "silu"
    assert weight.dtype == bias.dtype
    assert x.stride(1) == 1
    assert x.shape[1] % 8 == x.stride(2) % 8 == 0
    if initial_states is None:
        initial_states = x.new_zeros(1, x.shape[1], weight.shape[1] - 1)
    else:
        assert initial_states.dtype == x.dtype
        assert initial_states.stride(1) == 1
    history = torch.cat([initial_states, x], 2).float()
    return F.silu(F.conv1d(history, weight[:, None].float(), bias.float(), groups=len(weight))).to(x.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> Tensor:
    """Heads of one width; the causal mask lies at the lower right corner."""
    assert causal
    assert deterministic
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert q.shape[2] % 8 == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    assert ends[-1] == (len(q), len(k))
    outputs = []
    for (q0, k0), (q1, k1) in pairwise(ends):
        assert q1 - q0 <= max_seqlen_q
        assert k1 - k0 <= max_seqlen_k
        group = q.shape[1] // k.shape[1]
        queries, keys, values = q[q0:q1], *(t[k0:k1].repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries.float(), keys.float()) * softmax_scale
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values.float()))
    return torch.cat(outputs).to(q.dtype)


def truth(op: str, *inputs: Any, num_meta: int = 0, **named: Any) -> Any:
    """What reference.py computes, with meta tokens in front."""
    computed = getattr(reference, op)
    if not num_meta:
        return computed(*inputs, **named)
    if op == "segment_attention":
        q, k, v, boundaries, *rest = inputs
        window = named["window"] if "window" in named else rest[2]
        return meta_first.segment_attention(computed, q, k, v, boundaries, window, num_meta)
    return getattr(meta_first, op)(computed, *inputs[: 8 if op == "selective_scan" else 4], num_meta)


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the packages and for the Triton kernels; which of them were called, in order."""
    calls: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*inputs: Any, **named: Any) -> Any:
            calls.append(name)
            return function(*inputs, **named)

        return call

    def install(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function, stands_in in functions.items():
            setattr(module, function, noted(name.split(".")[0], stands_in))
        monkeypatch.setitem(sys.modules, name, module)

    install("mamba_ssm")
    install("mamba_ssm.ops")
    install("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    install("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    install("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    for op in NAMES:
        monkeypatch.setattr(gpu, op, noted("triton", partial(truth, op)))
    return calls


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def scan_inputs(
    tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, gate = draw(tokens, 8, dtype=dtype), draw(tokens, 8, dtype=dtype, seed=1)
    dt, a = draw(tokens, 8, seed=2), (-draw(8, 4).detach().exp()).requires_grad_()
    return x, dt, a, draw(tokens, 4, dtype=dtype), draw(tokens, 4, dtype=dtype, seed=1), draw(8), gate


def agree(ours: Any, theirs: Any, inputs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """The first output with every gradient, and what else there is."""
    ours, theirs = (out if isinstance(out, tuple) else (out,) for out in (ours, theirs))
    weights = torch.linspace(-1, 1, theirs[0].numel()).reshape(theirs[0].shape).to(theirs[0].dtype)
    gradients = [
        torch.autograd.grad((out[0] * weights).sum(), inputs, materialize_grads=True) for out in (ours, theirs)
    ]
    for one, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_meta", [0, META])
def test_mamba_ssm_scans_one_document(used: list[str], num_meta: int) -> None:
    inputs = scan_inputs(num_meta + 9)
    agree(
        packages.selective_scan(*inputs, ends(9), num_meta=num_meta),
        truth("selective_scan", *inputs, ends(9), num_meta=num_meta),
        inputs,
    )
    assert used == ["mamba_ssm"]


@pytest.mark.parametrize("what", ["two documents", "a state before", "bfloat16", "nothing"])
def test_other_scans_are_left_to_triton(used: list[str], what: str) -> None:
    tokens = 0 if what == "nothing" else 9
    inputs = scan_inputs(tokens, torch.bfloat16 if what == "bfloat16" else torch.float32)
    lengths = (4, 5) if what == "two documents" else (tokens,)
    state = draw(1, 8, 4).detach() if what == "a state before" else None
    ours = packages.selective_scan(*inputs, ends(*lengths), state)
    agree(ours, reference.selective_scan(*inputs, ends(*lengths), state), inputs)
    assert used == ["triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("begins", ["at zero", "behind meta tokens", "in a state"])
def test_causal_conv1d_takes_one_document(used: list[str], begins: str, length: int, dtype: torch.dtype) -> None:
    num_meta = META if begins == "behind meta tokens" else 0
    wide = draw(num_meta + length, 24, dtype=dtype)  # a part of a projection, as in the model
    weight, bias = draw(8, 4), draw(8)
    state = draw(1, 8, 4, dtype=dtype) if begins == "in a state" else None
    x = wide[:, 8:16]
    inputs = [wide, weight, bias, *([] if state is None else [state])]
    ours = packages.causal_conv1d(x, weight, bias, ends(length), state, num_meta)
    agree(ours, truth("causal_conv1d", x, weight, bias, ends(length), state, num_meta=num_meta), inputs, 1e-2)
    assert used == ["causal_conv1d"]


@pytest.mark.parametrize(("channels", "lengths"), [(8, (4, 5)), (12, (9,)), (8, (0,))])
def test_other_convs_are_left_to_triton(used: list[str], channels: int, lengths: tuple[int, ...]) -> None:
    inputs = draw(sum(lengths), channels), draw(channels, 4), draw(channels)
    agree(packages.causal_conv1d(*inputs, ends(*lengths)), reference.causal_conv1d(*inputs, ends(*lengths)), inputs)
    assert used == ["triton"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("lengths", [(9,), (4, 0, 1, 9, 2)])
@pytest.mark.parametrize("front", ["nothing", "meta tokens", "a prefix"])
def test_flash_attn_takes_documents_within_the_window(
    used: list[str], front: str, lengths: tuple[int, ...], window: int | None, dtype: torch.dtype
) -> None:
    num_meta = META if front == "meta tokens" else 0
    tokens = num_meta + sum(lengths)
    q, k, v = (draw(tokens, *shape, dtype=dtype) for shape in ((4, 8), (2, 8), (2, 16)))
    before = [draw(META, 2, 8, dtype=dtype), draw(META, 2, 16, dtype=dtype)] if front == "a prefix" else []
    given = dict(zip(("prefix_k", "prefix_v"), before, strict=False))
    ours = packages.segment_attention(q, k, v, ends(*lengths), window=window, num_meta=num_meta, **given)
    theirs = truth("segment_attention", q, k, v, ends(*lengths), window=window, num_meta=num_meta, **given)
    agree(ours, theirs, [q, k, v, *before], 4e-2)
    assert used == ["flash_attn"]


@pytest.mark.parametrize(
    ("dtype", "window", "size", "tokens"),
    [
        (torch.float32, None, 8, 9),
        (torch.bfloat16, 7, 8, 9),
        (torch.bfloat16, None, 12, 9),
        (torch.bfloat16, None, 8, 0),
    ],
)
def test_other_attention_is_left_to_triton(
    used: list[str], dtype: torch.dtype, window: int | None, size: int, tokens: int
) -> None:
    q, k, v = (draw(tokens, heads, size, dtype=dtype) for heads in (4, 2, 2))
    ours = packages.segment_attention(q, k, v, ends(tokens), window=window)
    agree(ours, reference.segment_attention(q, k, v, ends(tokens), window=window), [q, k, v], 4e-2)
    assert used == ["triton"]


def test_a_package_that_is_missing_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda op: (True, "Triton kernels"))
    assert packages.available("segment_attention")[0]
    assert packages.available("steps") == (True, "Triton kernels")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert packages.available("selective_scan") == (
        False,
        "mamba-ssm is not installed: pip install --no-build-isolation -e '.[cuda]'",
    )
    monkeypatch.setattr(gpu, "available", lambda op: (False, "torch sees no CUDA GPU"))
    assert packages.available("causal_conv1d") == (False, "torch sees no CUDA GPU")


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "computes"),
    [(torch.float32, {"mamba_ssm", "causal_conv1d"}), (torch.bfloat16, {"flash_attn", "causal_conv1d"})],
)
def test_a_model_on_the_packages_is_as_near_to_float64_as_on_the_reference(
    used: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, computes: set[str]
) -> None:
    model, ids = random_model(tiny_config("first_layer_windowed_two_groups")).eval(), random_ids(1, 9)
    monkeypatch.setattr(packages, "DEVICES", ("cpu",))
    monkeypatch.setattr(gpu, "available", lambda op: (True, "Triton kernels"))
    monkeypatch.setattr(packages, "elementwise", reference.elementwise)
    ops._named.cache_clear()
    with ops.use_backend("reference"):
        exact = model(ids).logits
        model.to(dtype)
        of_reference = (model(ids).logits - exact).norm()
    with ops.use_backend("packages"):
        of_packages = (model(ids).logits - exact).norm()
    ops._named.cache_clear()
    assert of_packages < 1.5 * of_reference
    assert set(used) - {"triton"} == computes
