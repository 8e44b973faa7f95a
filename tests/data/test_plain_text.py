"""Plain text: its tokens and labels, texts in pieces, rows that make no document."""

import json

import datasets
import pytest

from hymba_tune.data.chat import Document
from hymba_tune.data.formats import BadRow
from hymba_tune.data.mix import load_mix, realise_mix
from hymba_tune.data.packing import IGNORED, build_rows
from hymba_tune.data.plain_text import encode_text, pieces, text
from hymba_tune.errors import UserError


def test_a_document_begins_and_ends_and_all_but_its_beginning_is_learned(small_tokenizer):
    document = encode_text(small_tokenizer, "How many?")
    plain = small_tokenizer.encode("How many?", add_special_tokens=False)
    assert document.input_ids == [small_tokenizer.bos_token_id, *plain, small_tokenizer.eos_token_id]
    assert document.loss_mask == [0] + [1] * (len(plain) + 1)


def test_special_tokens_in_a_text_are_characters(small_tokenizer):
    written = "a</s><s>[PAD]"
    ids = encode_text(small_tokenizer, written).input_ids[1:-1]
    assert not {1, 2, 3} & set(ids)
    assert small_tokenizer.decode(ids) == written


def test_a_tokenizer_without_a_beginning_is_refused(small_tokenizer):
    bare = type(small_tokenizer)(tokenizer_object=small_tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(UserError, match="no bos_token"):
        encode_text(bare, "a")


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("max_length", [2, 3, 4, 7])
def test_pieces_fit_and_every_token_is_learned_once_after_the_one_before_it(length, max_length):
    document = Document(list(range(length)), [0] + [1] * (length - 1))
    learned = []
    for piece in pieces(document, max_length):
        assert 2 <= len(piece.input_ids) == len(piece.loss_mask) <= max_length
        assert piece.loss_mask[0] == 0, "nothing in the piece comes before its first token"
        learned += [
            (before, token)
            for before, token, mask in zip(piece.input_ids, piece.input_ids[1:], piece.loss_mask[1:], strict=False)
            if mask
        ]
    assert learned == [(token - 1, token) for token in range(1, length)]


@pytest.mark.parametrize(
    ("row", "message"),
    [({"txt": "a"}, "no column 'text'"), ({"text": 3}, "int, not a text"), ({"text": " \n"}, "nothing but white")],
)
def test_a_row_without_text_is_bad(row, message):
    with pytest.raises(BadRow, match=message):
        text(row)


def documents(*texts):
    return datasets.Dataset.from_dict(
        {"conversation": [json.dumps({"text": each}) for each in texts], "source": ["web"] * len(texts)}
    )


def test_long_documents_are_split_over_rows_and_counted(small_tokenizer, tmp_path):
    texts = ["b c" * 20, "d", "e" * 7]
    whole = [encode_text(small_tokenizer, each).input_ids for each in texts]
    rows, counts = build_rows(documents(*texts), small_tokenizer, 16, too_long="split", folder=tmp_path / "rows")
    assert all(len(row) <= 16 for row in rows["input_ids"])
    assert (counts.split, counts.truncated, counts.dropped_too_long) == (1, 0, 0)
    assert counts.longest == max(map(len, whole)) == len(whole[0])
    assert counts.supervised_tokens == sum(len(ids) - 1 for ids in whole)
    assert counts.documents == sum(map(len, rows["seq_lengths"]))
    learned = sorted(label for row in rows["labels"] for label in row if label != IGNORED)
    assert learned == sorted(token for ids in whole for token in ids[1:])


def test_a_mix_of_documents_comes_from_files_and_the_embedded_generator(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"content": "one"}\n{"content": " "}\n{"content": "two"}\n')
    (tmp_path / "mix.yaml").write_text(
        "kind: documents\nsources:\n  web: {path: web.jsonl, map: {text: content}, on_bad_row: skip}\n"
        "  world: {generator: {name: tiny_documents, n: 5}}\n"
    )
    dataset, counts = realise_mix(load_mix(tmp_path / "mix.yaml", "documents"), 0, cache_dir=tmp_path / "cache")
    assert [(count.source, count.kept, count.skipped) for count in counts] == [("web", 2, 1), ("world", 5, 0)]
    assert len(dataset) == 7
    assert {'{"text": "one"}', '{"text": "two"}'} <= set(dataset["conversation"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("generator: {name: tiny_math, n: 5}", "'tiny_math' is unknown for documents; known are tiny_documents"),
        ("path: web.jsonl, map: {system: a}", "no format for documents reads it; use text"),
    ],
)
def test_a_mix_of_documents_takes_nothing_of_a_chat(tmp_path, source, message):
    (tmp_path / "web.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "mix.yaml").write_text(f"kind: documents\nsources:\n  web: {{{source}}}\n")
    with pytest.raises(UserError, match=message):
        load_mix(tmp_path / "mix.yaml")
