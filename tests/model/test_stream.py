"""The stream's layout, what it refuses, and which tokens a layer may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.stream import Stream, packed_to_stream, rows_to_stream
from tests.model.models import EXACT, WINDOW, random_ids, random_model, tiny_config


def lengths(stream: Stream) -> list[int]:
    return stream.cu_seqlens.diff().tolist()


def test_a_padded_batch_lies_end_to_end_with_the_meta_tokens_once_in_front() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    stream = packed_to_stream((3, 4), 2, mask)
    assert stream.cu_seqlens.tolist() == [0, 3, 7, 8]
    assert stream.rope_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 2]
    slots = torch.arange(12).reshape(3, 4)
    assert stream.flatten(slots).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert stream.unflatten(stream.flatten(slots)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0]]


@pytest.mark.parametrize(
    "marks",
    [
        {"position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]])},
        {"seq_idx": torch.tensor([[4, 4, 5, 9, 9, 9]], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 2, 3, 6], dtype=torch.int32)},
        {"cu_seq_lens_k": torch.tensor([0, 2, 3, 3, 6], dtype=torch.int32)},
    ],
    ids=lambda marks: next(iter(marks)),
)
def test_each_packing_field_marks_the_same_documents(marks: dict[str, Any]) -> None:
    stream = packed_to_stream((1, 6), 1, **marks)
    assert lengths(stream) == [2, 1, 3]
    assert stream.rope_ids.tolist() == [0, 1, 2, 1, 1, 2, 3]


def test_a_row_always_starts_a_document() -> None:
    assert lengths(packed_to_stream((2, 3), 1, seq_idx=torch.zeros(2, 3))) == [3, 3]
    assert lengths(packed_to_stream((2, 3), 1, position_ids=torch.arange(6).reshape(2, 3))) == [3, 3]


def test_an_attention_mask_alone_decides_what_is_padding_and_position_ids_then_mark_no_documents() -> None:
    ids, mask = torch.tensor([[0, 1, 2, 0, 1, 9]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    stream = packed_to_stream((1, 6), 1, mask, ids)
    assert lengths(stream) == [5]
    assert stream.rope_ids.tolist() == [0, 1, 2, 3, 1, 2]


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "seq_idx against position_ids": (
        {"seq_idx": torch.tensor([[0, 0, 1, 1]]), "position_ids": torch.tensor([[0, 1, 2, 0]])},
        "seq_idx and position_ids mark different documents",
    ),
    "seq_idx against cu_seq_lens_q": (
        {"seq_idx": torch.tensor([[0, 0, 1, 1]]), "cu_seq_lens_q": torch.tensor([0, 1, 4])},
        "seq_idx and cu_seq_lens_q mark different documents",
    ),
    "cu_seq_lens_q against cu_seq_lens_k": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 1, 4])},
        "cu_seq_lens_q and cu_seq_lens_k mark different documents",
    ),
    "cu_seq_lens_q against the mask": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
        "cu_seq_lens counts every slot, but attention_mask has padding",
    ),
    "cu_seq_lens_q of another length": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 5])},
        r"cu_seq_lens_q must rise from 0 to the 4 slots of the batch, got \[0, 2, 5\]",
    ),
    "empty cu_seq_lens_q": ({"cu_seq_lens_q": torch.tensor([])}, "cu_seq_lens_q must rise from 0 to the 4 slots"),
    "cu_seq_lens_q that falls": ({"cu_seq_lens_q": torch.tensor([0, 3, 2, 4])}, "cu_seq_lens_q must rise"),
    "seq_idx of another shape": ({"seq_idx": torch.zeros(1, 3)}, r"seq_idx has shape \(1, 3\), expected \(1, 4\)"),
    "position_ids of another shape": ({"position_ids": torch.zeros(2, 4)}, r"position_ids has shape \(2, 4\)"),
    "mask of another shape": ({"attention_mask": torch.ones(1, 5)}, r"attention_mask has shape \(1, 5\), expected \(1"),
}


@pytest.mark.parametrize(("inputs", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_inputs_that_contradict_each_other_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_model(tiny_config())(random_ids(1, 4), **inputs)


def test_a_document_across_two_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="crosses from one row of the batch to the next"):
        packed_to_stream((2, 2), 1, cu_seq_lens_q=torch.tensor([0, 3, 4]))


@pytest.mark.parametrize(
    "packing",
    [
        {"seq_idx": torch.tensor([[0, 0, 1, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 2, 4])},
        {"position_ids": torch.tensor([[0, 1, 0, 1]])},
    ],
    ids=lambda packing: next(iter(packing)),
)
def test_packed_documents_are_not_cached(packing: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="packed documents can't fill a cache: pass use_cache=False"):
        random_model(tiny_config())(random_ids(1, 4), use_cache=True, **packing)


def test_a_mask_that_denies_what_the_cache_holds_is_refused() -> None:
    model, cache = random_model(tiny_config()), HymbaCache(tiny_config())
    model(random_ids(2, 4), past_key_values=cache)
    mask = torch.ones(2, 5)
    mask[1, 2] = 0
    with pytest.raises(ValueError, match=r"attention_mask has \[4, 3\] tokens .* the cache holds \[4, 4\]"):
        model(random_ids(2, 1), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, the batch has 3"):
        model(random_ids(3, 1), past_key_values=cache)


def test_ids_and_embeddings_together_or_neither_are_refused() -> None:
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(random_ids(1, 2), inputs_embeds=torch.zeros(1, 2, 20))


def test_meta_tokens_lie_before_a_first_call_only() -> None:
    first = rows_to_stream((2, 3), 4, None, None, None)
    assert first.rope_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    then = rows_to_stream((2, 2), 4, torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]), None, torch.tensor([3, 2]), 3)
    assert then.num_meta == 0
    assert then.rope_ids.tolist() == [7, 8, 6]


@torch.no_grad()
def test_position_ids_of_the_caller_are_honoured() -> None:
    model, ids = random_model(tiny_config()), random_ids(2, 9)
    default = model(ids).logits
    for given in (torch.arange(9)[None], torch.arange(9).expand(2, 9)):
        assert torch.equal(model(ids, position_ids=given).logits, default)
    # Farther from the meta tokens, and farther from each other.
    assert (model(ids, position_ids=torch.arange(9)[None] + 5).logits - default).abs().max() > 0.1
    assert (model(ids, position_ids=torch.arange(9)[None] * 2).logits - default).abs().max() > 0.1


@torch.no_grad()
def test_only_distances_between_positions_matter_where_there_are_no_meta_tokens() -> None:
    model, ids = random_model(tiny_config("no_meta_tokens")), random_ids(2, 9)
    shifted = model(ids, position_ids=torch.arange(9)[None] + 5).logits
    torch.testing.assert_close(shifted, model(ids).logits, **EXACT)


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("layer", [0, 1], ids=["windowed", "global"])
def test_a_query_sees_itself_and_window_earlier_tokens_whatever_their_position_ids(layer: int, stride: int) -> None:
    """One attention layer, the other one an SSM whose output is cut off: the derivative shows what reaches a token."""
    types = ["a", "m"] if layer == 0 else ["m", "a"]
    config = tiny_config(num_hidden_layers=2, layer_type=types, global_attn_idx=[1], kv_reuse_group=[])
    model = random_model(config)
    model.model.layers[1 - layer].mamba.out_proj.weight.data.zero_()
    embeds = torch.randn(1, 9, 20, dtype=torch.float64, requires_grad=True)
    hidden = model.model(inputs_embeds=embeds, position_ids=torch.arange(9)[None] * stride).last_hidden_state
    for query in range(9):
        (slope,) = torch.autograd.grad(hidden[0, query].sum(), embeds, retain_graph=True)
        seen = slope[0].abs().sum(-1).nonzero().flatten().tolist()
        assert seen == list(range(0 if layer else max(0, query - WINDOW), query + 1))


def test_every_token_sees_every_meta_token_and_meta_tokens_see_no_document() -> None:
    config = tiny_config(num_hidden_layers=1, layer_type=["a"], global_attn_idx=[], kv_reuse_group=[])
    model = random_model(config)
    hidden = model.model(random_ids(1, 12)).last_hidden_state
    for query in (0, 11):
        (slope,) = torch.autograd.grad(hidden[0, query].sum(), model.model.memory_tokens, retain_graph=True)
        assert (slope.abs().sum(-1) > 0).all()

    outputs: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    for seed in range(2):
        model(random_ids(1, 12, seed=seed))
    meta = config.num_memory_tokens
    torch.testing.assert_close(outputs[0][:meta], outputs[1][:meta], **EXACT)
