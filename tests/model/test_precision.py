"""In bfloat16 and under autocast, dt, softplus, the scan and its state stay in float32; the oracles can't see it.

Each check recomputes in float64 from the very inputs that the model used, so that what is left is the error of the
step itself: 1e-7 in float32, 4e-3 in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import HymbaCache, HymbaForCausalLM, ops
from tests.model.models import generate, gradients, random_ids, random_model, tiny_config

# Half a unit in the last place of bfloat16's 8 bits, and of float32 after a few hundred accumulated steps.
BFLOAT16_ROUNDING = 2**-8
FLOAT32_SUM = 1e-5
LENGTH = 150


def slow_model(dtype: torch.dtype = torch.float32) -> HymbaForCausalLM:
    """Small steps (dt about 0.02, as Mamba starts) and a long memory: where coarse arithmetic does most harm."""
    model = random_model(tiny_config(), dtype=torch.float32)
    for layer in model.model.layers:
        layer.mamba.dt_proj[0].weight.data.mul_(0.02)
        layer.mamba.dt_proj[0].bias.data.mul_(0.1).sub_(4)
        layer.mamba.A_log[0].data.sub_(2)
    kept = {name: p.data for name, p in model.named_parameters() if "A_log" in name or ".D." in name}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, values in kept.items():
        model.get_parameter(name).data = values
    return model


@dataclass
class ScanCall:
    inputs: tuple[Any, ...]
    y: Tensor
    final_state: Tensor


@dataclass
class Recorder:
    """Every selective scan of the model and every step of one, in order."""

    scans: list[ScanCall] = field(default_factory=list)

    def selective_scan(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, final_state = self.original(*inputs)
        self.scans.append(ScanCall(inputs, y, final_state))
        return y, final_state

    def steps(self, device: torch.device) -> Any:
        found = self.original_steps(device)
        return SimpleNamespace(**{**vars(found), "scan_step": partial(self.scan_step, found.scan_step)})

    def scan_step(self, step: Any, *inputs: Any) -> Tensor:
        *before, state = inputs
        y: Tensor = step(*inputs)
        self.scans.append(ScanCall(tuple(before), y, state.clone()))
        return y

    original, original_steps = staticmethod(ops.selective_scan), staticmethod(ops.steps)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(ops, "selective_scan", recorder.selective_scan)
    monkeypatch.setattr(ops, "steps", recorder.steps)
    return recorder


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def exact_scan(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    wide: list[Any] = [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    ]
    with ops.use_backend("reference"):
        return Recorder.original(*wide)


def check_scans(recorder: Recorder) -> None:
    assert recorder.scans
    for scan in recorder.scans:
        _, dt, a, _, _, d, *_ = scan.inputs
        assert {t.dtype for t in (dt, a, d, scan.final_state)} == {torch.float32}
        y, state = exact_scan(scan.inputs)
        assert relative_error(scan.final_state, state) < FLOAT32_SUM
        assert relative_error(scan.y, y) < BFLOAT16_ROUNDING


def dt_calls(model: HymbaForCausalLM) -> list[tuple[Tensor, Tensor, torch.nn.Linear]]:
    calls: list[tuple[Tensor, Tensor, torch.nn.Linear]] = []
    for layer in model.model.layers:
        layer.mamba.dt_proj[0].register_forward_hook(lambda module, args, out: calls.append((args[0], out, module)))
    return calls


def check_dt(calls: list[tuple[Tensor, Tensor, torch.nn.Linear]]) -> None:
    """The bias, forty times larger than the product here, is added without rounding."""
    assert calls
    for x, dt, projection in calls:
        product = x.double() @ projection.weight.double().to(x.dtype).double().T
        error = (dt.double() - (product + projection.bias.double())).abs().max()
        assert dt.dtype == torch.float32
        assert error < BFLOAT16_ROUNDING * product.abs().max() + 1e-6
        assert error < 0.1 * BFLOAT16_ROUNDING * projection.bias.abs().max()


@torch.no_grad()
def test_in_bfloat16_dt_and_the_scan_are_exact_to_float32(recorder: Recorder) -> None:
    model = slow_model(torch.bfloat16)
    calls = dt_calls(model)
    model(random_ids(1, LENGTH))
    check_dt(calls)
    check_scans(recorder)


def test_under_autocast_dt_and_the_scan_are_exact_to_float32(recorder: Recorder) -> None:
    model, ids = slow_model().train(), random_ids(1, LENGTH)
    calls = dt_calls(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    assert {x.dtype for x, _, _ in calls} == {torch.bfloat16}
    check_dt([(x, dt.detach(), projection) for x, dt, projection in calls])
    check_scans(recorder)
    found = gradients(model, loss)
    expected = gradients(model, model(ids, labels=ids).loss)
    for name, gradient in expected.items():
        similarity = torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.95, f"{name}: {similarity:.4f}"


@torch.no_grad()
def test_decoding_in_bfloat16_carries_the_state_in_float32(recorder: Recorder) -> None:
    """The state after a prompt and many steps, against one float64 scan over all that went into it."""
    model, cache, steps = slow_model(torch.bfloat16), HymbaCache(tiny_config()), 60
    layers = model.config.num_hidden_layers
    model(random_ids(1, 10), past_key_values=cache)
    of_prompt, recorder.scans = recorder.scans, []
    for token in random_ids(1, steps, seed=1).split(1, dim=1):
        model(token, past_key_values=cache)
    for layer in range(layers):
        calls = [of_prompt[layer], *recorder.scans[layer::layers]]
        assert len(calls) == steps + 1
        x, dt, b, c, gate = (torch.cat([call.inputs[i] for call in calls]) for i in (0, 1, 3, 4, 6))
        a, d, meta = (calls[0].inputs[i] for i in (2, 5, -1))
        assert meta == model.config.num_memory_tokens
        _, state = exact_scan((x, dt, a, b, c, d, gate, torch.tensor([0, len(x) - meta]), None, meta))
        held = cache.layers[layer].ssm
        assert held is not None
        assert held.dtype == torch.float32
        assert relative_error(held, state) < FLOAT32_SUM


@torch.no_grad()
def test_bfloat16_stays_near_float32_in_forward_and_in_decoding() -> None:
    model = slow_model(torch.bfloat16)
    wide = slow_model()
    wide.load_state_dict(model.state_dict())
    ids = random_ids(2, 40)
    exact = wide(ids).logits
    whole = model(ids).logits
    cache = HymbaCache(model.config)
    steps = [model(portion, past_key_values=cache).logits for portion in ids.split([20] + [1] * 20, dim=1)]
    # Rounding to 8 bits in each of some 30 products on the way to the logits.
    for found in (whole, torch.cat(steps, dim=1)):
        assert (found.float() - exact).std() < 0.03 * exact.std()


def test_bfloat16_generates() -> None:
    model, prompt = slow_model(torch.bfloat16), random_ids(3, 9)
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    found = generate(
        model,
        prompt,
        attention_mask=mask,
        max_new_tokens=12,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert found.sequences.shape == (3, 21)
    assert torch.isfinite(torch.stack(found.logits)).all()


def test_norms_are_computed_in_float32() -> None:
    norm = random_model(tiny_config()).model.final_layernorm
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = norm(x.double())
    found = norm.to(torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    # Two roundings: of the weight, and of the result.
    assert relative_error(found, exact) < 2 * BFLOAT16_ROUNDING
