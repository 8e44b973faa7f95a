"""However documents lie in a batch, each is computed exactly as if it were alone: logits and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hymba_tune.model import HymbaForCausalLM
from hymba_tune.model.ops import use_backend
from tests.model.models import EXACT, gradients, logits_alone, random_documents, random_ids, random_model, tiny_config

# The window is 3: documents shorter than it, as long, and long enough to cross it several times.
LENGTHS = [1, 9, 4, 1, 13, 3]


@dataclass
class Layout:
    """Keyword arguments of a forward, and where each document lies: (row, columns)."""

    inputs: dict[str, Any]
    places: list[tuple[int, Tensor]]

    def pieces(self, x_BLC: Tensor) -> list[Tensor]:
        return [x_BLC[row, columns] for row, columns in self.places]


Arrangement = Callable[[list[Tensor]], Layout]


def packed_by(*fields: str) -> Arrangement:
    """One row of all documents, marked by these of the fields that TRL's padding-free collator gives."""

    def layout(documents: list[Tensor]) -> Layout:
        lengths = [len(document) for document in documents]
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        batch = collate([{"input_ids": torch.cat(documents).tolist(), "seq_lengths": lengths}])
        del batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", *(fields or set(batch) - {"input_ids"}))}
        return Layout(inputs, [(0, columns) for columns in torch.arange(sum(lengths)).split(lengths)])

    return layout


def padded(side: str) -> Arrangement:
    """One row a document, padded with a token that is no pad token on the left, the right, or both sides."""

    def layout(documents: list[Tensor]) -> Layout:
        width = max(map(len, documents)) + 4
        ids, mask = random_ids(len(documents), width, seed=99), torch.zeros(len(documents), width, dtype=torch.long)
        places = []
        for row, document in enumerate(documents):
            room = width - len(document)
            start = {"left": room, "right": 0, "both": room // 2}[side]
            columns = torch.arange(start, start + len(document))
            ids[row, columns], mask[row, columns] = document, 1
            places.append((row, columns))
        return Layout({"input_ids": ids, "attention_mask": mask}, places)

    return layout


def rows_of_packed_documents(documents: list[Tensor]) -> Layout:
    """Rows of several documents each, padded on the right: `seq_idx` marks documents, the mask padding."""
    rows = [documents[i::2] for i in range(2)]
    ids = pad_sequence([torch.cat(row) for row in rows], batch_first=True, padding_value=7)
    seq_idx, mask = torch.full_like(ids, -1), torch.zeros_like(ids)
    places: list[tuple[int, Tensor]] = [(0, torch.empty(0))] * len(documents)
    for r, row in enumerate(rows):
        lengths = [len(document) for document in row]
        for i, columns in enumerate(torch.arange(sum(lengths)).split(lengths)):
            seq_idx[r, columns], mask[r, columns] = i, 1
            places[2 * i + r] = (r, columns)
    return Layout({"input_ids": ids, "attention_mask": mask, "seq_idx": seq_idx}, places)


LAYOUTS: dict[str, Arrangement] = {
    "position_ids": packed_by("position_ids"),
    "seq_idx": packed_by("seq_idx"),
    "cu_seq_lens_q": packed_by("cu_seq_lens_q"),
    "as_trl_packs": packed_by(),
    "padded_left": padded("left"),
    "padded_right": padded("right"),
    "padded_both": padded("both"),
    "rows_of_packed_documents": rows_of_packed_documents,
}


@pytest.fixture(params=LAYOUTS)
def arrange(request: pytest.FixtureRequest) -> Arrangement:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def alone(model: HymbaForCausalLM) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What every layout must give: logits and gradients of the documents, each in a forward of its own."""
    logits = [model(document[None]).logits[0] for document in random_documents(LENGTHS)]
    return [piece.detach() for piece in logits], gradients(model, weighted(logits))


def weighted(logits: list[Tensor]) -> Tensor:
    """A loss that weighs every logit of every document by its own random number."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(piece.shape, generator=generator, dtype=piece.dtype) for piece in logits]
    return sum(((piece * weight).sum() for piece, weight in zip(logits, weights, strict=True)), torch.zeros(()))


def test_trl_gives_the_fields_that_these_tests_pack_by() -> None:
    names = set(packed_by()(random_documents(LENGTHS)).inputs)
    lengths = {f"{what}_{side}" for what in ("cu_seq_lens", "max_length") for side in "qk"}
    assert names == {"input_ids", "position_ids", "seq_idx", *lengths}


def test_every_layout_gives_each_document_the_logits_and_gradients_it_gets_alone(
    model: HymbaForCausalLM, alone: tuple[list[Tensor], dict[str, Tensor]], arrange: Arrangement
) -> None:
    layout = arrange(random_documents(LENGTHS))
    logits = layout.pieces(model(**layout.inputs).logits)
    expected_logits, expected_gradients = alone
    torch.testing.assert_close(logits, expected_logits, **EXACT)
    torch.testing.assert_close(gradients(model, weighted(logits)), expected_gradients, **EXACT)


@torch.no_grad()
def test_changing_one_document_leaves_the_others_bit_equal(model: HymbaForCausalLM, arrange: Arrangement) -> None:
    documents = random_documents(LENGTHS)
    others = random_documents(LENGTHS, seed=1)
    layout = arrange(documents)
    before = layout.pieces(model(**layout.inputs).logits)
    for changed in (0, 1, 4):
        layout = arrange([*documents[:changed], others[changed], *documents[changed + 1 :]])
        after = layout.pieces(model(**layout.inputs).logits)
        moved = [i for i in range(len(documents)) if not torch.equal(before[i], after[i])]
        assert moved == [changed]


@torch.no_grad()
def test_padding_comes_back_as_zeros_whatever_stands_in_it(model: HymbaForCausalLM) -> None:
    layout = padded("both")(random_documents(LENGTHS))
    padding = layout.inputs["attention_mask"] == 0
    outputs = model.model(**layout.inputs, output_hidden_states=True)
    for states in (outputs.last_hidden_state, *outputs.hidden_states):
        assert torch.equal(states[padding], torch.zeros_like(states[padding]))

    layout.inputs["input_ids"][padding] = 11
    torch.testing.assert_close(model.model(**layout.inputs).last_hidden_state, outputs.last_hidden_state, **EXACT)


@torch.no_grad()
def test_a_row_of_padding_alone_changes_nothing(model: HymbaForCausalLM) -> None:
    layout = padded("left")(random_documents(LENGTHS))
    layout.inputs["attention_mask"][2] = 0
    logits = model(**layout.inputs).logits
    assert torch.equal(logits[2], torch.zeros_like(logits[2]))
    for row, (document, piece) in enumerate(zip(random_documents(LENGTHS), layout.pieces(logits), strict=True)):
        if row != 2:
            torch.testing.assert_close(piece, logits_alone(model, document), **EXACT)


@torch.no_grad()
def test_a_batch_of_padding_alone_gives_zeros(model: HymbaForCausalLM) -> None:
    ids = random_ids(2, 3)
    hidden = model.model(ids, attention_mask=torch.zeros_like(ids)).last_hidden_state
    assert torch.equal(hidden, torch.zeros_like(hidden))


def test_isolation_would_be_seen_to_break() -> None:
    """The same documents without marks do leak into each other: the proofs above can fail."""
    model = random_model(tiny_config())
    documents = random_documents(LENGTHS)
    layout = packed_by()(documents)
    leaky = layout.pieces(model(layout.inputs["input_ids"]).logits)
    differences = [
        (piece - logits_alone(model, document)).abs().max().item()
        for piece, document in zip(leaky, documents, strict=True)
    ]
    assert differences[0] < EXACT["atol"]
    assert min(differences[1:]) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_last_slots_asked_for_alone_are_those_of_the_whole(
    model: HymbaForCausalLM, arrange: Arrangement, count: int
) -> None:
    inputs = arrange(random_documents(LENGTHS)).inputs
    whole = model(**inputs).logits[:, -count:]
    torch.testing.assert_close(model(**inputs, logits_to_keep=count).logits, whole, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cache_is_the_same_whatever_was_asked_for(model: HymbaForCausalLM, backend: str) -> None:
    inputs = padded("left")(random_documents(LENGTHS)).inputs
    read: list[int] = []
    caches = []
    with use_backend(backend):
        for asked in (0, 2):
            hook = model.model.layers[-1].moe.register_forward_hook(lambda _, states, __: read.append(len(states[0])))
            caches.append(model(**inputs, use_cache=True, logits_to_keep=asked).past_key_values)
            hook.remove()
    assert read == [model.config.num_memory_tokens + sum(LENGTHS), sum(min(length, 2) for length in LENGTHS)]
    for whole, part in zip(*(cache.layers for cache in caches), strict=True):
        for name, value in whole.tensors().items():
            assert torch.equal(value, part.tensors()[name]), name
