"""What the model computes today is what the golden file says it computed, with whatever backend this machine chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hymba_tune.model import HymbaForCausalLM
from tests.golden.make import CONFIGURATION, FILE, computed
from tests.model.models import random_model, tiny_config

# float32 sums in another order; the official code moves by 5e-5 between float32 and float64 on models of this size.
FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def model(golden: dict[str, Tensor]) -> HymbaForCausalLM:
    model = random_model(tiny_config(CONFIGURATION), seed=1, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = golden[f"weight.{name}"]
    return model


def test_logits_loss_gradients_and_cache_equal_the_golden_arrays(
    model: HymbaForCausalLM, golden: dict[str, Tensor]
) -> None:
    found = computed(model)
    assert found.keys() == {name for name in golden if not name.startswith("weight.")}
    for name, value in found.items():
        torch.testing.assert_close(value, golden[name], **FLOAT32, msg=lambda message, name=name: f"{name}: {message}")


def test_float64_gives_the_golden_arrays_too(golden: dict[str, Tensor], model: HymbaForCausalLM) -> None:
    """So the file holds the function itself and not the rounding of the machine that wrote it."""
    wide = random_model(model.config)
    wide.load_state_dict(model.state_dict())
    for name, value in computed(wide).items():
        torch.testing.assert_close(
            value.float(), golden[name], **FLOAT32, msg=lambda message, name=name: f"{name}: {message}"
        )


def test_the_random_models_of_these_tests_are_the_same_everywhere(golden: dict[str, Tensor]) -> None:
    model = random_model(tiny_config(CONFIGURATION), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, golden[f"weight.{name}"]), name
