"""Rows that share a beginning have the logits of rows computed alone, and leave the beginning as it was."""

from __future__ import annotations

import pytest
import torch

from hymba_tune.model import HymbaCache
from hymba_tune.model.prefix_cache import PrefixCache
from tests.model.models import CONFIGURATIONS, EXACT, random_ids, random_model, tiny_config

PREFIX = 8
"""More than two windows."""


def prefilled(model, ids):
    cache = HymbaCache(model.config)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_rows_after_a_shared_beginning_equal_each_row_alone(name):
    model = random_model(tiny_config(name))
    prefix, rows, lengths = random_ids(1, PREFIX), random_ids(3, 7, seed=1), [7, 1, 4]
    cache = prefilled(model, prefix)
    before = [{key: t.clone() for key, t in layer.tensors().items()} for layer in cache.layers]
    mask = torch.tensor([[1] * PREFIX + [0] * (7 - n) + [1] * n for n in lengths])
    for _ in range(2):  # the second time from the same cache
        shared = PrefixCache.of(cache, 3)
        together = model(rows, attention_mask=mask, past_key_values=shared, use_cache=True).logits
        for row, n in enumerate(lengths):
            alone = model(torch.cat([prefix, rows[row : row + 1, 7 - n :]], 1), use_cache=False).logits
            torch.testing.assert_close(together[row, 7 - n :], alone[0, PREFIX:], **EXACT)
    one_each = model(rows[:, :1], past_key_values=PrefixCache.of(cache, 3), use_cache=True).logits
    alone = model(torch.cat([prefix.expand(3, -1), rows[:, :1]], 1), use_cache=False).logits
    torch.testing.assert_close(one_each, alone[:, PREFIX:], **EXACT)
    assert (cache.slots, cache.batch_size) == (PREFIX, 1)
    for layer, held in zip(cache.layers, before, strict=True):
        assert all(torch.equal(t, held[key]) for key, t in layer.tensors().items())


@torch.no_grad()
def test_only_one_row_without_padding_can_be_shared():
    model = random_model(tiny_config())
    padded, mask = HymbaCache(model.config), torch.tensor([[0, 1, 1]])
    model(random_ids(1, 3), attention_mask=mask, past_key_values=padded, use_cache=True)
    for cache in (HymbaCache(model.config), prefilled(model, random_ids(2, 3)), padded):
        with pytest.raises(ValueError, match="one row without padding"):
            PrefixCache.of(cache, 2)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("length", [1, 4])
def test_rows_that_share_their_beginning_go_on_as_rows_alone(name, length):
    """A turn with padding, then token by token, while rows leave and change places."""
    model = random_model(tiny_config(name))
    prefix, rows = random_ids(1, PREFIX), random_ids(3, length + 6, seed=1)
    cache = prefilled(model, prefix)
    cache.share(3)
    mask = torch.ones(3, PREFIX + length, dtype=torch.long)
    if length > 1:
        mask[1, PREFIX : PREFIX + 2] = 0
    order, kept = torch.tensor([2, 1]), [0, 1, 2]
    with torch.no_grad():
        logits = model(rows[:, :length], attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
        for step in range(6):
            for row, found in zip(kept, logits, strict=True):
                own = rows[row : row + 1, : length + step][:, mask[row, PREFIX:].argmax() :]
                alone = model(torch.cat([prefix, own], 1), use_cache=False).logits[0, -1]
                torch.testing.assert_close(found, alone, **EXACT)
            if step == 2:
                cache.batch_select_indices(order)
                kept = [kept[i] for i in order]
            logits = model(rows[kept, length + step, None], past_key_values=cache, use_cache=True).logits[:, -1]


def test_a_shared_beginning_is_held_once_by_global_layers():
    model = random_model(tiny_config())
    cache = prefilled(model, random_ids(1, PREFIX))
    before = {layer: held.k for layer, held in enumerate(cache.layers) if held.k is not None}
    cache.share(50)
    assert any(model.config.sees_all(layer) for layer in before)
    for layer, held in before.items():
        now = cache.layers[layer]
        if model.config.sees_all(layer):
            assert now.k.numel() == 0
            assert len(now.meta_k) == model.config.num_memory_tokens + PREFIX
        else:
            assert now.k.shape == (50, *held.shape[1:])
    for refused in (lambda: cache.share(2), lambda: PrefixCache.of(cache, 2), lambda: HymbaCache.joined([cache], 99)):
        with pytest.raises(ValueError, match=r"share|one row without padding"):
            refused()
