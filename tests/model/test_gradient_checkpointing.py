"""Recomputing layers in the backward pass changes no gradient, and K/V gradients cross layers either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import HymbaCache, HymbaForCausalLM
from tests.model.models import EXACT, gradients, random_ids, random_model, tiny_config

MODES = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
SHAPE = (2, 11)


def packed_loss(model: HymbaForCausalLM) -> Tensor:
    """Two rows of documents of 4 and 7 tokens."""
    ids = random_ids(*SHAPE)
    positions = torch.cat([torch.arange(4), torch.arange(7)]).expand(SHAPE)
    return model(ids, position_ids=positions, labels=ids, use_cache=False).loss


def training_gradients(model: HymbaForCausalLM, use_reentrant: bool | None) -> dict[str, Tensor]:
    """Gradients in training mode; with checkpointing unless `use_reentrant` is None."""
    model.train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, packed_loss(model))
    model.gradient_checkpointing_disable()
    model.eval()
    return found


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    forward: Any = module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    module.forward = counted
    return calls


@MODES
def test_gradients_are_the_same_with_checkpointing(model: HymbaForCausalLM, use_reentrant: bool) -> None:
    expected = training_gradients(model, None)
    torch.testing.assert_close(training_gradients(model, use_reentrant), expected, **EXACT)


@MODES
def test_every_layer_is_recomputed(use_reentrant: bool) -> None:
    model = random_model(tiny_config())
    calls = [count_calls(layer.mamba.in_proj) for layer in model.model.layers]
    training_gradients(model, use_reentrant)
    # Once forward; once more in the backward pass.
    assert [len(of_layer) for of_layer in calls] == [2] * len(calls)


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["none", "reentrant", "non_reentrant"])
def test_consumers_send_their_gradient_to_the_producers_keys_and_values(use_reentrant: bool | None) -> None:
    """The producer's own attention is silenced, so that only its consumers can move its K/V rows."""
    model = random_model(tiny_config())
    producer = model.model.layers[1].mamba
    queries, keys, values = producer.sizes[:3]
    producer.pre_avg_layernorm1.weight.data.zero_()
    rows = training_gradients(model, use_reentrant)["model.layers.1.mamba.in_proj.weight"]
    assert torch.equal(rows[:queries], torch.zeros_like(rows[:queries]))
    assert (rows[queries : queries + keys].abs().sum(1) > 0).all()
    assert (rows[queries + keys : queries + keys + values].abs().sum(1) > 0).all()

    for consumer in (2, 3):
        model.model.layers[consumer].mamba.pre_avg_layernorm1.weight.data.zero_()
    rows = training_gradients(model, use_reentrant)["model.layers.1.mamba.in_proj.weight"]
    assert torch.equal(rows[: queries + keys + values], torch.zeros_like(rows[: queries + keys + values]))


@MODES
def test_one_trainable_projection_in_a_frozen_model_gets_its_gradient(use_reentrant: bool) -> None:
    """As adapters train: everything else is frozen, and the Trainer makes the embeddings' output require a gradient."""
    model = random_model(tiny_config())
    model.requires_grad_(False)
    model.model.layers[1].mamba.in_proj.weight.requires_grad_(True)
    expected = training_gradients(model, None)
    model.enable_input_require_grads()
    torch.testing.assert_close(training_gradients(model, use_reentrant), expected, **EXACT)


def test_a_cache_under_checkpointing_is_refused() -> None:
    model = random_model(tiny_config()).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would fill the cache twice: pass use_cache=False"):
        model(random_ids(1, 3), past_key_values=HymbaCache(model.config))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_keys_and_values_keep_nothing_else_alive(model: HymbaForCausalLM, checkpointing: bool) -> None:
    """What consumers hold until the backward pass is K and V themselves, not the projection they were cut from."""
    shared: list[Tensor] = []
    hooks = [
        layer.mamba.register_forward_pre_hook(
            lambda _, args: shared.extend(part for part in args[1:3] if part is not None)
        )
        for layer in model.model.layers
    ]
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    packed_loss(model)
    model.gradient_checkpointing_disable()
    model.eval()
    for hook in hooks:
        hook.remove()
    assert shared
    assert [part.untyped_storage().nbytes() for part in shared] == [part.nbytes for part in shared]
