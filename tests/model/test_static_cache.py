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
