"""What people do to a transformers model works on this one, or is refused in words."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hymba_tune.model import HymbaForCausalLM
from tests.model.models import EXACT, VOCABULARY, generate, random_ids, random_model, tiny_config


@pytest.fixture
def tiny() -> HymbaForCausalLM:
    return random_model(tiny_config())


def test_a_deep_copy_computes_the_same_and_shares_nothing(tiny: HymbaForCausalLM) -> None:
    twin, ids = copy.deepcopy(tiny), random_ids(1, 7)
    before = tiny(ids).logits
    assert torch.equal(twin(ids).logits, before)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    twin.model.memory_tokens.data.zero_()
    assert torch.equal(tiny(ids).logits, before)


def test_the_vocabulary_can_be_resized_and_the_head_stays_tied(tiny: HymbaForCausalLM) -> None:
    ids = random_ids(1, 7)
    before = tiny(ids).logits
    tiny.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    assert tiny.lm_head.weight is tiny.get_input_embeddings().weight
    assert tiny.config.vocab_size == VOCABULARY + 3
    after = tiny(ids).logits
    assert after.shape[-1] == VOCABULARY + 3
    torch.testing.assert_close(after[..., :VOCABULARY], before, **EXACT)
    assert generate(tiny, ids, max_new_tokens=3).shape == (1, 10)


def test_embeddings_can_be_passed_in_place_of_ids(tiny: HymbaForCausalLM) -> None:
    ids = random_ids(2, 7)
    assert torch.equal(tiny(inputs_embeds=tiny.get_input_embeddings()(ids)).logits, tiny(ids).logits)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=["last", "three", "chosen"])
def test_logits_of_some_slots_only(tiny: HymbaForCausalLM, kept: int | torch.Tensor) -> None:
    ids = random_ids(2, 7)
    expected = tiny(ids).logits[:, kept if isinstance(kept, torch.Tensor) else slice(-kept, None)]
    torch.testing.assert_close(tiny(ids, logits_to_keep=kept).logits, expected, **EXACT)


def test_hidden_states_start_at_the_embeddings_and_end_at_the_heads_input(tiny: HymbaForCausalLM) -> None:
    ids = random_ids(2, 7)
    outputs = tiny(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == tiny.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[0], tiny.get_input_embeddings()(ids))
    assert torch.equal(tiny.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert tiny(ids).hidden_states is None


def test_outputs_come_as_a_tuple_when_asked_for(tiny: HymbaForCausalLM) -> None:
    ids = random_ids(2, 7)
    loss, logits = tiny(ids, labels=ids, return_dict=False)
    expected = tiny(ids, labels=ids)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_attention_weights_are_refused(tiny: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="attention weights are never formed as a whole"):
        tiny(random_ids(1, 3), output_attentions=True)


def test_another_attention_implementation_is_refused(tiny: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        AutoModelForCausalLM.from_config(tiny.config, attn_implementation="flash_attention_2")


def test_the_token_id_of_padding_is_an_ordinary_token(tiny: HymbaForCausalLM) -> None:
    """The official config's pad id and its tokenizer's differ, and trainers rewrite the config's."""
    ids = random_ids(1, 7)
    ids[0, 3] = 0
    before = tiny(ids).logits
    embedding = tiny.get_parameter("model.embed_tokens.weight")
    (slope,) = torch.autograd.grad(tiny.model(ids).last_hidden_state.sum(), embedding)
    assert slope[0].abs().sum() > 0
    tiny.config.pad_token_id = int(ids[0, 2])
    assert torch.equal(tiny(ids).logits, before)
    embedding.data[0] += 1
    assert not torch.equal(tiny(ids).logits[0, 3], before[0, 3])


def test_the_same_forward_twice_is_bit_equal(model: HymbaForCausalLM) -> None:
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
