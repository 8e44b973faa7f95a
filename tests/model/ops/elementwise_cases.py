"""What the tests of norms, RoPE and SwiGLU share: a module of kernels against the model's formulas in float64.

The truth is rounded once to each result's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_tune.model import modeling, norm, ops
from tests.model.ops.cases import DTYPES, assert_same_results, wide

# So large that it counts, and that the gradient of a norm of one column is more than rounding.
EPS = 0.5
# Elements between the rows of an input, and before the first.
GAP = 3


class Case(NamedTuple):
    """An operation of a module of kernels and the model's formula, on the same inputs by name."""

    kernel: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    inputs: dict[str, Tensor]


def rows(tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of 1 to 20 in size, with gaps between."""
    return (torch.randn(tokens, size + GAP) * torch.linspace(1, 20, tokens)[:, None]).to(dtype)[:, GAP:]


def norms(kernels: ModuleType, tokens: int, size: int, dtype: torch.dtype, of_weight: torch.dtype) -> list[Case]:
    def one(x: Tensor, weight: Tensor) -> Tensor:
        return norm._RMSNorm.apply(x, weight, EPS)

    def two(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor) -> Tensor:
        return (one(a, weight_a) + one(b, weight_b)) / 2

    x, b = rows(tokens, size, dtype), rows(tokens, size, dtype)
    weight, weight_b = (1 + torch.rand(size)).to(of_weight), torch.randn(size).to(of_weight)
    return [
        Case(lambda **t: kernels.rms_norm(**t, eps=EPS), one, {"x": x, "weight": weight}),
        Case(
            lambda **t: kernels.mean_of_norms(**t, eps=EPS),
            two,
            {"a": x, "weight_a": weight, "b": b, "weight_b": weight_b},
        ),
    ]


def pointwise(kernels: ModuleType, tokens: int, heads: int, size: int, dtype: torch.dtype) -> list[Case]:
    angles = (torch.rand(tokens, 1, size // 2, dtype=wide(dtype)) * 100).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return modeling._rotate(x, (cos.to(x), sin.to(x)))

    x = rows(tokens, heads * size, dtype)
    gate, up = rows(tokens, heads * size, dtype), rows(tokens, heads * size, dtype)
    return [
        Case(
            lambda x: kernels.rotate(x, cos.to(x.device), sin.to(x.device)),
            rotate,
            {"x": x.unflatten(-1, (heads, size))},
        ),
        Case(kernels.swiglu, lambda gate, up: F.silu(gate) * up, {"gate": gate, "up": up}),
    ]


def check(case: Case, device: str = "cpu") -> None:
    """Values and every gradient; twice, which gives the same bits."""
    inputs = {name: t.to(device).detach().requires_grad_() for name, t in case.inputs.items()}
    y = case.kernel(**inputs)
    upstream = torch.randn(y.shape, device=device).to(y.dtype)
    found = computed(case.kernel, inputs, upstream)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = computed(case.formula, exact, upstream.double())
    assert_same_results(found, {name: t.to(found[name].dtype) for name, t in expected.items()})
    assert all(found[f"d {name}"].dtype == t.dtype for name, t in inputs.items())
    assert all(torch.equal(t, found[name]) for name, t in computed(case.kernel, inputs, upstream).items())


def computed(op: Callable[..., Tensor], inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    y = op(**inputs)
    gradients = torch.autograd.grad(y, list(inputs.values()), upstream)
    return {"output": y.detach()} | {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}


def check_all(kernels: ModuleType, tokens: int, size: int, device: str = "cpu") -> None:
    for dtype in DTYPES:
        cases = [case for of_weight in {dtype, wide(dtype)} for case in norms(kernels, tokens, size, dtype, of_weight)]
        for case in cases + pointwise(kernels, tokens, 3, 2 * size, dtype):
            check(case, device)
