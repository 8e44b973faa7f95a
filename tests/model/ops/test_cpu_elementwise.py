"""The compiled norms, RoPE and SwiGLU are the model's formulas: values, gradients, dtypes, at any width and threads."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import modeling, norm, ops
from hymba_tune.model.ops import cpu, cpu_elementwise
from tests.model.models import EXACT, gradients, random_ids, random_model, tiny_config
from tests.model.ops.cases import TOLERANCE, needs_compiler
from tests.model.ops.elementwise_cases import EPS, check_all, computed, norms, pointwise, rows

pytestmark = needs_compiler
# More rows than one sum of a weight's gradient takes, and more than 64 sums of the shortest length take.
SEVERAL_SUMS, LONG_SUMS = 150, 4200
# float16 rounds to 11 bits.
ONE_IN_FLOAT16 = 2**-10
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture
def any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small inputs are computed by all threads."""
    monkeypatch.setattr(cpu_elementwise, "_ELEMENTS_OF_A_THREAD", 0)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the model's own formulas compute from then on."""
    return lambda: monkeypatch.setattr(cpu, "elementwise", lambda: None)


@pytest.mark.parametrize("size", [1, 15, 17, 64, 1600, 3200])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_values_and_gradients_are_the_model_s_formulas(tokens: int, size: int) -> None:
    torch.manual_seed(0)
    check_all(cpu_elementwise, tokens, size)


@pytest.mark.parametrize(("tokens", "size"), [(SEVERAL_SUMS, 100), (LONG_SUMS, 3)])
def test_gradients_of_weights_are_sums_over_all_rows(tokens: int, size: int, any_threads: None) -> None:
    torch.manual_seed(0)
    check_all(cpu_elementwise, tokens, size)


def test_one_and_two_threads_give_the_same_bits(any_threads: None) -> None:
    torch.manual_seed(0)
    size, kernels = (SEVERAL_SUMS, 100), cpu_elementwise
    for case in norms(kernels, *size, torch.float32, torch.float32) + pointwise(kernels, *size, 2, torch.float32):
        inputs = {name: t.requires_grad_() for name, t in case.inputs.items()}
        upstream = torch.randn(case.kernel(**inputs).shape)
        with threads(1):
            alone = computed(case.kernel, inputs, upstream)
        with threads(2):
            together = computed(case.kernel, inputs, upstream)
        assert all(torch.equal(alone[name], together[name]) for name in alone)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def test_gradients_may_come_with_gaps_or_expanded() -> None:
    torch.manual_seed(0)
    for case in norms(cpu_elementwise, 7, 20, torch.float64, torch.float64) + pointwise(
        cpu_elementwise, 7, 3, 10, torch.float64
    ):
        inputs = {name: t.requires_grad_() for name, t in case.inputs.items()}
        shape = case.kernel(**inputs).shape
        for upstream in (torch.randn(*shape, 2)[..., 0], rows(7, shape[1:].numel(), torch.float64).view(shape)):
            assert_close(case.kernel, case.formula, inputs, upstream.double())
        assert_close(case.kernel, case.formula, inputs, torch.ones((), dtype=torch.float64).expand(shape))


def test_heads_and_tokens_may_lie_in_any_order() -> None:
    torch.manual_seed(0)
    kernel, formula, _ = pointwise(cpu_elementwise, 7, 3, 10, torch.float64)[0]
    x = torch.randn(3, 7, 10, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert_close(kernel, formula, {"x": x}, torch.randn(3, 7, 10, dtype=torch.float64).transpose(0, 1))


def assert_close(
    kernel: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: dict[str, Tensor], upstream: Tensor
) -> None:
    found, expected = computed(kernel, inputs, upstream), computed(formula, inputs, upstream)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, **EXACT)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FLOATS, FLOATS)))
def test_mixed_dtypes_give_the_dtypes_of_the_formulas(
    first: torch.dtype, second: torch.dtype, plain: Callable[[], None]
) -> None:
    torch.manual_seed(0)
    norms = [norm.RMSNorm(20, EPS).to(dtype) for dtype in (first, second)]
    a, b = (torch.randn(4, 20).to(dtype).requires_grad_() for dtype in (first, second))
    table = torch.rand(4, 1, 10).repeat(1, 1, 2).to(torch.promote_types(second, torch.float32))
    mlp = modeling.MLP(tiny_config()).to(first)
    x = torch.randn(3, tiny_config().hidden_size).to(first)

    def compute() -> list[Tensor]:
        outputs = [
            norms[0](b),
            norm.mean_of_norms(norms[0], a, norms[1], b),
            modeling._rotate(a[:, None], (table, table)),
            mlp(x),
        ]
        leaves = [a, b, norms[0].weight, norms[1].weight]
        return outputs + list(torch.autograd.grad([t.double().square().sum() for t in outputs], leaves))

    found = compute()
    plain()
    rounding = max(TOLERANCE.get(dtype, ONE_IN_FLOAT16) for dtype in (first, second, torch.float32))
    for t, expected in zip(found, compute(), strict=True):
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(t, expected, rtol=0, atol=4 * rounding * largest)


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(3, 20)
    x[1, 18] = torch.nan
    weight, angles = torch.ones(20), torch.zeros(3, 1, 20)
    assert cpu_elementwise.rms_norm(x, weight, EPS)[1].isnan().all()
    for mean in (
        cpu_elementwise.mean_of_norms(x, weight, torch.ones(3, 20), weight, EPS),
        cpu_elementwise.mean_of_norms(torch.ones(3, 20), weight, x, weight, EPS),
    ):
        assert mean.isnan().all(-1).tolist() == [False, True, False]
    turned = cpu_elementwise.rotate(x[:, None], angles.cos(), angles.sin()).squeeze(1)
    assert turned.isnan().nonzero().tolist() == [[1, 8], [1, 18]]
    for product in (cpu_elementwise.swiglu(x, torch.ones(3, 20)), cpu_elementwise.swiglu(torch.ones(3, 20), x)):
        assert product.isnan().nonzero().tolist() == [[1, 18]]


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    x, weight = torch.randn(3, 20), torch.ones(20, requires_grad=True)
    assert cpu_elementwise.rms_norm(x, weight, EPS).requires_grad
    assert not cpu_elementwise.rms_norm(x, weight.detach(), EPS).requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert cpu_elementwise.rms_norm(x, weight, EPS).grad_fn is None


def test_a_frozen_weight_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, trained, frozen = torch.randn(3, 20, requires_grad=True), torch.randn(20, requires_grad=True), torch.randn(20)
    y = cpu_elementwise.mean_of_norms(x, trained, x, frozen, EPS)
    call, asked = cpu_elementwise._call, []

    def watched(*arguments: Any) -> None:
        asked.append([pointer is not None for pointer in arguments[-4:]])
        call(*arguments)

    monkeypatch.setattr(cpu_elementwise, "_call", watched)
    y.sum().backward()
    assert asked == [[True, True, True, False]]
    assert trained.grad is not None


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, table = torch.randn(3, 20), torch.ones(20), torch.zeros(3, 1, 20)
    kernels, problem = cpu_elementwise, "shapes do not fit"
    with pytest.raises(ValueError, match=problem + r": \(3, 20\), \(0,\)"):
        kernels.rms_norm(x, weight[:0], EPS)
    with pytest.raises(ValueError, match=problem):
        kernels.mean_of_norms(x, weight, x[:2], weight, EPS)
    with pytest.raises(ValueError, match=problem):
        kernels.rotate(x[:, None], table[:2], table)
    with pytest.raises(ValueError, match=problem):
        kernels.swiglu(x, x[:, :1])


def test_the_model_trains_with_them_also_under_checkpointing_and_autocast(plain: Callable[[], None]) -> None:
    assert ops.elementwise(torch.device("cpu")) is cpu_elementwise
    model, ids = random_model(tiny_config()).train(), random_ids(2, 9)
    found = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(ids, labels=ids).loss
        found.append((loss.detach(), gradients(model, loss)))
    copied = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = copied(ids, labels=ids).loss
    assert all(torch.isfinite(g).all() for g in gradients(copied, narrow).values())
    plain()
    model.gradient_checkpointing_disable()
    expected = model(ids, labels=ids).loss
    wanted = gradients(model, expected)
    for loss, by_name in found:
        torch.testing.assert_close(loss, expected.detach(), **EXACT)
        torch.testing.assert_close(by_name, wanted, **EXACT)
    torch.testing.assert_close(narrow, expected.float(), rtol=0.02, atol=0)
