"""Decoding in fixed buffers equals decoding with a cache that grows, and no buffer is ever replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hymba_tune.model import HymbaCache
from hymba_tune.model.static_cache import StaticDecoder, StaticHymbaCache
from tests.model.models import CONFIGURATIONS, EXACT, random_ids, random_model, tiny_config

STEPS = 9
"""Three windows."""


def prefilled(model: Any, max_length: int | None = 6 + STEPS) -> HymbaCache:
    """Rows of 6, 2 and 4 tokens, padded on the left."""
    ids, mask = random_ids(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = mask[2, :2] = 0
    cache = HymbaCache(model.config, max_length)
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_step_gives_the_logits_of_the_growing_cache(name):
    model = random_model(tiny_config(name))
    growing = prefilled(model)
    static = StaticHymbaCache.of(growing)
    places = [t.data_ptr() for layer in static.layers for t in layer.tensors().values()]
    for step in range(STEPS):
        ids = random_ids(3, 1, seed=step)
        expected = model(ids, past_key_values=growing, use_cache=True).logits
        torch.testing.assert_close(model(ids, past_key_values=static, use_cache=True).logits, expected, **EXACT)
    assert places == [t.data_ptr() for layer in static.layers for t in layer.tensors().values()]


@torch.no_grad()
def test_rows_that_are_left_go_on_as_if_nothing_had_happened():
    """Row 1 leaves and the batch stays as wide; with row 0 the buffers are made anew."""
    model = random_model(tiny_config())
    whole, shrinking = (StaticDecoder(model, prefilled(model)) for _ in range(2))
    chosen = random_ids(3)
    left = chosen
    for step in range(STEPS):
        if step in (2, 4):
            kept = torch.tensor([0, 2] if step == 2 else [1])
            shrinking.keep(kept)
            left = left[kept]
        chosen, left = whole.step(chosen), shrinking.step(left)
        rows = [0, 1, 2] if step < 2 else [0, 2] if step < 4 else [2]
        assert left.tolist() == chosen[rows].tolist()


@torch.no_grad()
def test_what_a_static_cache_cannot_take_is_refused():
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match="max_length"):
        StaticHymbaCache.of(prefilled(model, max_length=None))
    with pytest.raises(ValueError, match="one token a row"):
        model(random_ids(3, 2), past_key_values=StaticHymbaCache.of(prefilled(model)), use_cache=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_on_a_gpu_the_graph_gives_the_tokens_of_plain_torch(name):
    """In float32, beyond the steps that warm up, in rows that are left, too."""
    model: Any = random_model(tiny_config(name), dtype=torch.float32)
    expected = StaticDecoder(model, prefilled(model))
    filled = prefilled(model)
    for layer in filled.layers:
        vars(layer).update({name: value.cuda() for name, value in layer.tensors().items()})
    assert filled.lengths is not None
    filled.lengths = filled.lengths.cuda()
    model_there: Any = random_model(tiny_config(name), dtype=torch.float32)
    found = StaticDecoder(model_there.cuda(), filled)
    chosen = there = random_ids(3)
    for step in range(STEPS):
        if step == 5:
            kept = torch.tensor([2])
            expected.keep(kept)
            found.keep(kept.cuda())
            chosen, there = chosen[kept], there[kept]
        chosen, there = expected.step(chosen), found.step(there.cuda()).cpu()
        assert there.tolist() == chosen.tolist()
