"""transformers' `generate` in each of its modes gives, with our cache, what forwards without a cache give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from hymba_tune.model import HymbaCache, HymbaForCausalLM
from tests.model.models import EXACT, VOCABULARY, generate, random_documents, random_ids, random_model, tiny_config

# Prompts from one token to several windows (of 3), and outputs that cross it again.
PROMPTS = [2, 11, 1, 7]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def tiny() -> HymbaForCausalLM:
    return random_model(tiny_config())


def left_padded_prompts(lengths: list[int] = PROMPTS, seed: int = 0) -> dict[str, Tensor]:
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), 7), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, document in enumerate(random_documents(lengths, seed=seed)):
        ids[row, width - len(document) :], mask[row, width - len(document) :] = document, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def greedy_by_hand(model: HymbaForCausalLM, prompt: Tensor, steps: int) -> Tensor:
    """(L,) -> (steps,): the definition, one forward over everything for every token."""
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1].argmax()[None]])
    return ids[len(prompt) :]


def test_greedy_answers_of_a_left_padded_batch_are_those_of_each_prompt_alone(model: HymbaForCausalLM) -> None:
    batch = generate(model, **left_padded_prompts(), max_new_tokens=NEW_TOKENS, output_logits=True)
    for row, prompt in enumerate(random_documents(PROMPTS)):
        expected = greedy_by_hand(model, prompt, NEW_TOKENS)
        assert torch.equal(batch[row, -NEW_TOKENS:], expected)


def test_each_step_gets_the_last_tokens_alone_and_nothing_is_computed_twice(tiny: HymbaForCausalLM) -> None:
    embedded: list[int] = []
    scored: list[int] = []
    hooks = [
        tiny.model.embed_tokens.register_forward_pre_hook(lambda module, args: embedded.append(args[0].shape[1])),
        tiny.lm_head.register_forward_pre_hook(lambda module, args: scored.append(args[0].shape[1])),
    ]
    generate(tiny, random_ids(2, 5), max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    assert embedded == [5, 1, 1, 1]
    assert scored == [1, 1, 1, 1]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "top-p sampling": {"do_sample": True, "top_p": 0.7, "temperature": 1.3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "length_penalty": 0.7},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "prompt in chunks longer than it": {"prefill_chunk_size": 50},
    "end of sequence": {"eos_token_id": list(range(1, VOCABULARY, 4)), "do_sample": True},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_with_a_cache_every_mode_gives_the_tokens_that_it_gives_without(
    tiny: HymbaForCausalLM, options: dict[str, Any]
) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        without = {} if use_cache else {"prefill_chunk_size": None}
        calls = {**left_padded_prompts(), **options, **without, "use_cache": use_cache}
        found.append(
            generate(tiny, **calls, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_scores=True)
        )
    cached, plain = found
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.scores, plain.scores)
    assert isinstance(cached.past_key_values, HymbaCache)
    assert plain.past_key_values is None


def test_sampling_with_a_seed_is_sampling_by_hand(tiny: HymbaForCausalLM) -> None:
    prompt = random_ids(3, 5)
    torch.manual_seed(1)
    sampled = generate(tiny, prompt, max_new_tokens=6, do_sample=True, top_k=0, temperature=0.8)
    torch.manual_seed(1)
    ids = prompt
    for _ in range(6):
        with torch.no_grad():
            logits = tiny(ids).logits[:, -1].float()
        ids = torch.cat([ids, torch.multinomial(torch.softmax(logits / 0.8, -1), 1)], dim=1)
    assert torch.equal(sampled, ids)


def test_samples_of_one_prompt_differ_and_are_those_of_the_repeated_prompt(tiny: HymbaForCausalLM) -> None:
    prompts = random_ids(2, 6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True}
    torch.manual_seed(2)
    several = generate(tiny, prompts, num_return_sequences=3, **options)
    torch.manual_seed(2)
    assert torch.equal(several, generate(tiny, prompts.repeat_interleave(3, dim=0), **options))
    assert len({tuple(row.tolist()) for row in several}) > 2


LETTERS = "0123456789+-*/=abcdefghijklmnopqrstuvwxyz"
assert len(LETTERS) == VOCABULARY


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=LETTERS[0])


def test_generation_ends_at_a_stop_string(tiny: HymbaForCausalLM) -> None:
    tokenizer, prompt = letters_tokenizer(), random_ids(1, 6)
    free = generate(tiny, prompt, max_new_tokens=NEW_TOKENS)
    stop = str(tokenizer.decode(free[0, 8:10]))
    assert str(tokenizer.decode(free[0, 6:])).index(stop) == 2
    stopped = generate(tiny, prompt, max_new_tokens=NEW_TOKENS, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(stopped, free[:, :10])


def test_embeddings_in_place_of_tokens_generate_the_same(tiny: HymbaForCausalLM) -> None:
    prompts = left_padded_prompts()
    expected = generate(tiny, **prompts, max_new_tokens=NEW_TOKENS)
    embeds = tiny.get_input_embeddings()(prompts["input_ids"])
    mask = prompts["attention_mask"]
    found = generate(tiny, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW_TOKENS)
    assert torch.equal(found, expected[:, -NEW_TOKENS:])


@pytest.mark.parametrize("chunk", [None, 2], ids=["whole turns", "turns in chunks"])
def test_a_conversation_continues_with_its_cache_over_several_calls(model: HymbaForCausalLM, chunk: int | None) -> None:
    """The second call gets the whole text so far, of which the cache holds all but the last token."""
    cache, turns = HymbaCache(model.config), left_padded_prompts()
    said = generate(model, **turns, past_key_values=cache, max_new_tokens=4)
    for seed in (1, 2):
        new = left_padded_prompts([3, 1, 6, 2], seed=seed)
        grown = said.shape[1] - turns["attention_mask"].shape[1]
        ones = torch.ones(len(PROMPTS), grown, dtype=torch.long)
        turns = {
            "input_ids": torch.cat([said, new["input_ids"]], dim=1),
            "attention_mask": torch.cat([turns["attention_mask"], ones, new["attention_mask"]], dim=1),
        }
        said = generate(model, **turns, past_key_values=cache, max_new_tokens=4, prefill_chunk_size=chunk)
        assert torch.equal(said, generate(model, **turns, use_cache=False, max_new_tokens=4))
    assert cache.get_seq_length() == said.shape[1] - 1


def test_one_prefix_serves_several_questions_from_copies_of_its_cache(tiny: HymbaForCausalLM) -> None:
    prefix, cache = random_ids(1, 9), HymbaCache(tiny.config)
    with torch.no_grad():
        tiny(prefix, past_key_values=cache)
    for seed in (1, 2):
        ids = torch.cat([prefix, random_ids(1, 4, seed=seed)], dim=1)
        answer = generate(tiny, ids, past_key_values=copy.deepcopy(cache), max_new_tokens=5)
        assert torch.equal(answer, generate(tiny, ids, max_new_tokens=5))


def test_hidden_states_and_logits_of_each_step_are_returned(tiny: HymbaForCausalLM) -> None:
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
    found = generate(tiny, random_ids(2, 5), max_new_tokens=3, **options)
    with torch.no_grad():
        whole = tiny(found.sequences, output_hidden_states=True)
    assert [states[0].shape[1] for states in found.hidden_states] == [5, 1, 1]
    for layer in range(tiny.config.num_hidden_layers + 1):
        states = torch.cat([step[layer] for step in found.hidden_states], dim=1)
        torch.testing.assert_close(states, whole.hidden_states[layer][:, :7], **EXACT)
    torch.testing.assert_close(torch.stack(found.logits, 1), whole.logits[:, 4:7].float())


def test_generation_works_while_training_with_checkpointing_switched_on(tiny: HymbaForCausalLM) -> None:
    """As trainers that sample between steps do it: evaluation mode, checkpointing left on."""
    model, prompt = random_model(tiny_config()), random_ids(2, 5)
    model.gradient_checkpointing_enable()
    assert torch.equal(generate(model, prompt, max_new_tokens=5), generate(tiny, prompt, max_new_tokens=5))


def test_other_caches_are_refused(tiny: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache; Hymba continues a HymbaCache"):
        generate(tiny, random_ids(1, 3), past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static': Hymba has a cache of its own"):
        generate(tiny, random_ids(1, 3), cache_implementation="static", max_new_tokens=2)


def test_assisted_decoding_is_refused(tiny: HymbaForCausalLM) -> None:
    """It would have to take tokens back, and a scan's state does not run backwards."""
    with pytest.raises(ValueError, match="can't be cropped"):
        generate(tiny, random_ids(1, 6), assistant_model=random_model(tiny_config(), seed=1), max_new_tokens=8)
    with pytest.raises(ValueError, match="can't be cropped"):
        generate(tiny, random_ids(1, 6), prompt_lookup_num_tokens=2, max_new_tokens=8)
