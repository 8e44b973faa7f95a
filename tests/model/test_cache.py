"""With a cache, in any portions, every token gets the logits that one forward without a cache gives it.

That forward gets the documents as a padded batch; test_packing_exactness.py proves that it equals each document alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hymba_tune.model import HymbaCache, HymbaConfig, HymbaForCausalLM, ops
from tests.model.models import EXACT, WINDOW, random_documents, random_ids, random_model, tiny_config
from tests.model.ops.cases import needs_compiler

# Shorter than the window of 3, as long, and several times as long.
PROMPTS = [2, 11, 1, 3, 7]
NEW_TOKENS = 9
Padding = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def left_padded(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """ids and mask (B, the longest)."""
    ids = pad_sequence(documents, batch_first=True, padding_value=7, padding_side="left")
    return ids, pad_sequence(
        [torch.ones_like(document) for document in documents], batch_first=True, padding_side="left"
    )


def right_padded(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids, mask = left_padded([document.flip(0) for document in documents])
    return ids.flip(1), mask.flip(1)


class Conversation:
    """A batch that goes through the model in portions; keeps each document's real tokens and their logits."""

    def __init__(self, model: HymbaForCausalLM, rows: int, cache: HymbaCache | None = None) -> None:
        self.model, self.cache = model, cache or HymbaCache(model.config)
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.tokens: list[Tensor] = [torch.zeros(0, dtype=torch.long)] * rows
        self.logits: list[Tensor] = [torch.zeros(0, model.config.vocab_size, dtype=torch.float64)] * rows

    @torch.no_grad()
    def say(self, ids: Tensor, mask: Tensor | None = None) -> Conversation:
        mask = torch.ones_like(ids) if mask is None else mask
        self.mask = torch.cat([self.mask, mask], dim=1)
        output = self.model(ids, attention_mask=self.mask, past_key_values=self.cache)
        for row, real in enumerate(mask.bool()):
            self.tokens[row] = torch.cat([self.tokens[row], ids[row, real]])
            self.logits[row] = torch.cat([self.logits[row], output.logits[row, real]])
        return self

    def say_in_chunks(self, ids: Tensor, mask: Tensor, size: int) -> Conversation:
        for portion, real in zip(ids.split(size, dim=1), mask.split(size, dim=1), strict=True):
            self.say(portion, real)
        return self

    def check(self) -> Conversation:
        ids, mask = right_padded(self.tokens)
        with torch.no_grad():
            expected = self.model(ids, attention_mask=mask, use_cache=False).logits
        for row, logits in enumerate(self.logits):
            torch.testing.assert_close(logits, expected[row, : len(logits)], **EXACT)
        return self


def decode(talk: Conversation, steps: int, seed: int = 3) -> Conversation:
    for token in random_ids(len(talk.tokens), steps, seed=seed).split(1, dim=1):
        talk.say(token)
    return talk


@pytest.mark.parametrize("pad", [left_padded, right_padded])
def test_decoding_a_ragged_batch_step_by_step_equals_the_forward(model: HymbaForCausalLM, pad: Padding) -> None:
    talk = Conversation(model, len(PROMPTS)).say(*pad(random_documents(PROMPTS)))
    decode(talk, NEW_TOKENS).check()


@pytest.mark.parametrize("rows", [1, 2, 16, 64])
def test_decoding_equals_the_forward_at_any_batch_size(rows: int) -> None:
    model = random_model(tiny_config())
    lengths = [(5 * row) % 12 + 1 for row in range(rows)]
    decode(Conversation(model, rows).say(*left_padded(random_documents(lengths))), NEW_TOKENS).check()


@pytest.mark.parametrize("size", [1, 3, WINDOW, WINDOW + 5, 50])
def test_a_prompt_in_chunks_of_any_size_equals_the_forward(model: HymbaForCausalLM, size: int) -> None:
    ids, mask = left_padded(random_documents(PROMPTS))
    decode(Conversation(model, len(PROMPTS)).say_in_chunks(ids, mask, size), 3).check()


def test_ragged_turns_of_several_tokens_continue_the_cache(model: HymbaForCausalLM) -> None:
    """Padding lies between a row's turns; one row says nothing in the second turn."""
    talk = Conversation(model, 3).say(*left_padded(random_documents([4, 9, 1])))
    decode(talk, 2)
    second = random_documents([6, 1, 5], seed=1)
    ids, mask = left_padded(second)
    mask[1] = 0
    talk.say(ids, mask).say(*right_padded(random_documents([2, 8, 12], seed=2)))
    decode(talk, 2, seed=4).check()


def test_a_long_turn_is_attended_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.model.cache._QUERY_BLOCK", 4)
    talk = Conversation(random_model(tiny_config()), 2).say(random_ids(2, 3))
    talk.say(*left_padded(random_documents([13, 6], seed=1))).check()


def test_rows_of_the_cache_can_be_reordered_repeated_and_dropped(model: HymbaForCausalLM) -> None:
    talk = Conversation(model, 3).say(*left_padded(random_documents([4, 9, 1])))
    decode(talk, 2)
    for chosen in ([2, 0, 0, 1], [3, 3], [1]):
        rows = torch.tensor(chosen)
        talk.cache.reorder_cache(rows)
        talk.mask = talk.mask[rows]
        talk.tokens, talk.logits = [talk.tokens[i] for i in chosen], [talk.logits[i] for i in chosen]
        decode(talk, 2, seed=len(chosen)).check()
    assert talk.cache.batch_size == 1


def test_repeating_rows_interleaves_them() -> None:
    model = random_model(tiny_config())
    talk = Conversation(model, 2).say(random_ids(2, 5))
    talk.cache.batch_repeat_interleave(2)
    talk.mask = talk.mask.repeat_interleave(2, dim=0)
    talk.tokens, talk.logits = [talk.tokens[i // 2] for i in range(4)], [talk.logits[i // 2] for i in range(4)]
    decode(talk, 3).check()


def test_a_copied_cache_continues_apart_from_its_original() -> None:
    model = random_model(tiny_config())
    talk = Conversation(model, 2).say(random_ids(2, 5))
    fork = Conversation(model, 2, copy.deepcopy(talk.cache))
    fork.mask, fork.tokens, fork.logits = talk.mask, list(talk.tokens), list(talk.logits)
    decode(fork, 4, seed=1).check()
    decode(talk, 4, seed=2).check()


def test_a_step_with_gradients_computes_the_same_and_replaces_the_states() -> None:
    """Autograd may need the states before the step."""
    model = random_model(tiny_config())
    cache = Conversation(model, 2).say(random_ids(2, 5)).cache
    token, states = random_ids(2, 1, seed=8), [held.ssm for held in cache.layers]
    with torch.no_grad():
        expected = model(token, past_key_values=copy.deepcopy(cache)).logits
    logits = model(token, past_key_values=cache).logits
    assert logits.requires_grad
    torch.testing.assert_close(logits, expected, **EXACT)
    assert all(held.ssm is not state for held, state in zip(cache.layers, states, strict=True))


@needs_compiler
def test_states_change_in_place_and_stay_in_the_order_that_the_kernels_take() -> None:
    with ops.use_backend("cpu"):
        model = random_model(tiny_config())
        talk = Conversation(model, 3).say(random_ids(3, 5))
        joined = HymbaCache.joined([talk.cache, copy.deepcopy(talk.cache)], 5)
        talk.cache.batch_select_indices(torch.tensor([2, 0]))
        for cache in (talk.cache, joined):
            before = _states(cache)
            with torch.no_grad():
                model(random_ids(cache.batch_size, 1), past_key_values=cache)
            assert before
            assert all(now is state for now, state in zip(_states(cache), before, strict=True))
            assert all(state.mT.is_contiguous() for state in before)


def _states(cache: HymbaCache) -> list[Tensor]:
    return [state for held in cache.layers for state in (held.conv, held.ssm) if state is not None]


@pytest.mark.parametrize("max_length", [None, 30, 5], ids=["unplanned", "planned", "planned too short"])
def test_the_planned_length_changes_no_logit(max_length: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymba_tune.model.cache._GROWTH", 2)
    config = tiny_config()
    talk = Conversation(random_model(config), 2, HymbaCache(config, max_length=max_length))
    talk.say(*left_padded(random_documents([4, 9])))
    decode(talk, 15).check()


def test_an_allocated_cache_computes_the_same() -> None:
    config = tiny_config()
    cache = HymbaCache(config, max_length=40)
    cache.allocate(2, torch.float64, "cpu")
    bytes_before = cache.nbytes()
    talk = Conversation(random_model(config), 2, cache).say(*left_padded(random_documents([4, 9])))
    decode(talk, 15).check()
    assert cache.nbytes() == bytes_before


def test_allocating_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="needs max_length; pass it to HymbaCache"):
        HymbaCache(tiny_config()).allocate(1, torch.float32, "cpu")


def test_a_cache_that_was_reset_starts_anew() -> None:
    talk = Conversation(random_model(tiny_config()), 2).say(random_ids(2, 5))
    talk.cache.reset()
    assert (talk.cache.get_seq_length(), talk.cache.batch_size, talk.cache.is_initialized) == (0, 0, False)
    decode(Conversation(talk.model, 3, talk.cache).say(random_ids(3, 4)), 3).check()


def test_the_length_counts_slots_with_padding_and_without_meta_tokens() -> None:
    talk = Conversation(random_model(tiny_config()), 2).say(*left_padded(random_documents([2, 6])))
    decode(talk, 3)
    assert talk.cache.get_seq_length() == 9
    assert talk.cache.lengths is not None
    assert talk.cache.lengths.tolist() == [5, 9]


def test_a_scan_does_not_run_backwards() -> None:
    cache = HymbaCache(tiny_config())
    cache.crop(0)
    with pytest.raises(ValueError, match="can't be cropped"):
        cache.crop(1)
    assert not cache.is_croppable


def test_producers_keep_meta_tokens_and_a_window_or_everything_and_consumers_keep_nothing() -> None:
    model = random_model(tiny_config())
    talk = decode(Conversation(model, 2, HymbaCache(model.config, max_length=20)).say(random_ids(2, 11)), 9)
    held = [None if layer.k is None else layer.k.shape[2] for layer in talk.cache.layers]
    assert held == [20, WINDOW, None, None, 20]
    for layer in talk.cache.layers:
        assert (layer.k is None) == (layer.v is None) == (layer.meta_k is None) == (layer.meta_v is None)
        if layer.meta_k is not None:
            assert layer.meta_k.shape[0] == 5


def test_layers_with_one_branch_cache_that_branch_only() -> None:
    model = random_model(tiny_config("attention_and_ssm_only_layers"))
    talk = Conversation(model, 2).say(random_ids(2, 5))
    held = [sorted(layer.tensors()) for layer in talk.cache.layers]
    attention, ssm = ["k", "meta_k", "meta_v", "v"], ["conv", "ssm"]
    assert held == [ssm, attention, ssm, ssm, attention]


def test_the_cache_keeps_nothing_of_a_long_prompt_alive_but_what_it_counts() -> None:
    model = random_model(tiny_config())
    talk = Conversation(model, 1, HymbaCache(model.config, max_length=200)).say(random_ids(1, 200))
    tensors = [tensor for layer in talk.cache.layers for tensor in layer.tensors().values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == sum(talk.cache.nbytes().values())


def test_the_real_model_holds_the_documented_bytes_at_8192_tokens(data_dir: Path) -> None:
    config = HymbaConfig.from_pretrained(data_dir / "hymba-1.5b")
    cache = HymbaCache(config, max_length=8192)
    cache.allocate(1, torch.bfloat16, "meta")
    # 3 global producers of 128 + 8192 positions and 14 of 128 + 1024, of 5 heads with 64 + 128 features.
    assert cache.nbytes()["kv"] == (3 * 8320 + 14 * 1152) * 5 * 192 * 2 == 78_888_960
    assert cache.nbytes()["ssm"] == 32 * 3200 * 16 * 4 == 6_553_600
    assert cache.nbytes()["conv"] == 32 * 3200 * 4 * 2 == 819_200
