"""What the model computes today, with the backend that this machine chooses, is what the golden file says."""

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


def golden_model(golden: dict[str, Tensor], dtype: torch.dtype) -> HymbaForCausalLM:
    model = random_model(tiny_config(CONFIGURATION), seed=1, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.data = golden[f"weight.{name}"].to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_logits_loss_gradients_and_cache_equal_the_golden_arrays(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In float64 too: the file holds the function itself and not the rounding of the machine that wrote it."""
    found = computed(golden_model(golden, dtype), golden)
    assert found.keys() < golden.keys()
    assert len(found) > 100
    for name, value in found.items():
        assert torch.allclose(value.float(), golden[name], **FLOAT32), name
