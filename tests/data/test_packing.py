"""Rows: whole documents, exact labels, in the columns that TRL's collator takes."""

import json
import random
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hymba_tune.data.chat import Document, encode_conversation
from hymba_tune.data.packing import IGNORED, best_fit_decreasing, build_rows, load_rows
from hymba_tune.errors import UserError


def conversations(texts, source="a"):
    chats = [
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}
        for user, reply in texts
    ]
    columns = {"conversation": [json.dumps(chat) for chat in chats], "source": [source] * len(chats)}
    return datasets.Dataset.from_dict(columns)


def random_conversations(n, seed=0):
    rng = random.Random(seed)
    return conversations([("a" * rng.randint(1, 40), "b c" * rng.randint(1, 40)) for _ in range(n)])


def labels_of(tokenizer, conversation):
    document = encode_conversation(tokenizer, json.loads(conversation)["messages"])
    pairs = zip(document.input_ids, document.loss_mask, strict=True)
    return document.input_ids, [token if mask else IGNORED for token, mask in pairs]


def lengths_of(tokenizer, dataset):
    return [len(labels_of(tokenizer, text)[0]) for text in dataset["conversation"]]


def test_rows_and_labels_are_these_numbers(monkeypatch, tmp_path, small_tokenizer):
    """Three documents in two rows, as literal matrices before and after TRL's collator."""
    encoded = {"x": ([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), "y": ([6, 7], [0, 1]), "z": ([8, 9, 10], [0, 1, 1])}
    monkeypatch.setattr(
        "hymba_tune.data.packing.encode_conversation",
        lambda tokenizer, messages, tools: Document(*encoded[messages]),
    )
    dataset = datasets.Dataset.from_dict(
        {"conversation": [json.dumps({"messages": name}) for name in "yxz"], "source": ["a", "b", "a"]}
    )
    rows, counts = build_rows(dataset, small_tokenizer, 8, folder=tmp_path / "rows")
    assert rows[:] == {
        "input_ids": [[6, 7], [1, 2, 3, 4, 5, 8, 9, 10]],
        "labels": [[-100, 7], [-100, -100, -100, 4, 5, -100, 9, 10]],
        "seq_lengths": [[2], [5, 3]],
    }
    assert (counts.rows, counts.documents, counts.tokens, counts.supervised_tokens, counts.longest) == (2, 3, 10, 5, 5)
    assert counts.fill == 10 / 16
    assert {name: (part.documents, part.tokens, part.supervised_tokens) for name, part in counts.sources.items()} == {
        "a": (2, 5, 3),
        "b": (1, 5, 2),
    }
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(rows))
    expected = {
        "input_ids": [[6, 7, 1, 2, 3, 4, 5, 8, 9, 10]],
        "labels": [[-100, 7, -100, -100, -100, 4, 5, -100, 9, 10]],
        "position_ids": [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2]],
        "seq_idx": [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2]],
        "cu_seq_lens_q": [0, 2, 7, 10],
        "cu_seq_lens_k": [0, 2, 7, 10],
    }
    for name, values in expected.items():
        assert batch[name].tolist() == values, name
    assert batch["max_length_q"] == batch["max_length_k"] == 5
    padded = DataCollatorForLanguageModeling(pad_token_id=0)(list(rows))
    assert torch.equal(padded["attention_mask"].sum(1), torch.tensor([2, 8]))


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_every_document_is_in_one_row_whole_with_its_labels(small_tokenizer, tmp_path, packing):
    dataset = random_conversations(300)
    rows, counts = build_rows(dataset, small_tokenizer, 256, packing, folder=tmp_path / "rows")
    found = []
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 256
        for end, length in zip(np.cumsum(row["seq_lengths"]), row["seq_lengths"], strict=True):
            found.append((row["input_ids"][end - length : end], row["labels"][end - length : end]))
    expected = [labels_of(small_tokenizer, text) for text in dataset["conversation"]]
    assert sorted(found) == sorted(expected)
    assert counts.documents == 300
    assert counts.tokens == sum(len(ids) for ids, _ in expected)
    assert counts.supervised_tokens == sum(label != IGNORED for _, labels in expected for label in labels)
    if packing == "none":
        assert found == expected, "in mix order"
    else:
        assert counts.fill > 0.95


def test_too_long_documents_are_dropped_or_truncated_and_counted(small_tokenizer, tmp_path):
    dataset = conversations([("a", "b"), ("a", "b" * 100), ("a" * 200, "b"), ("a", "c")])
    short, long_reply, long_prompt, _ = lengths_of(small_tokenizer, dataset)
    limit = short + 10
    rows, counts = build_rows(dataset, small_tokenizer, limit, "none", "drop", folder=tmp_path / "drop")
    assert [len(row) for row in rows["input_ids"]] == [short, short]
    assert (counts.dropped_too_long, counts.truncated, counts.dropped_unsupervised) == (2, 0, 0)
    assert counts.longest == max(long_reply, long_prompt)
    rows, counts = build_rows(dataset, small_tokenizer, limit, "none", "truncate", folder=tmp_path / "cut")
    assert [len(row) for row in rows["input_ids"]] == [short, limit, short]
    assert (counts.dropped_too_long, counts.truncated, counts.dropped_unsupervised) == (0, 1, 1)
    ids, labels = labels_of(small_tokenizer, dataset["conversation"][1])
    assert rows[1]["input_ids"] == ids[:limit]
    assert rows[1]["labels"] == labels[:limit]


def test_nothing_left_is_an_error(small_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length: 4: none of 3 documents fits a row"):
        build_rows(random_conversations(3), small_tokenizer, 4, folder=tmp_path / "rows")
    assert not list(tmp_path.iterdir()), "nothing half-written stays"


def test_rows_are_the_same_each_time_and_with_workers(small_tokenizer, tmp_path):
    dataset = random_conversations(250)
    first, counts = build_rows(dataset, small_tokenizer, 300, folder=tmp_path / "one")
    again, counts_again = build_rows(dataset, small_tokenizer, 300, folder=tmp_path / "two", workers=2)
    assert first[:] == again[:]
    assert counts == counts_again
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "counts.json",
        "fingerprint",
        "rows-00000.arrow",
    ]
    build_rows(dataset.select(range(9)), small_tokenizer, 300, folder=tmp_path / "one")
    rows, counts = load_rows(tmp_path / "one")
    assert counts.documents == 9
    assert sum(map(len, rows["input_ids"])) == counts.tokens


def test_a_large_mix_is_packed_part_by_part_and_goes_on_where_it_was_cut(small_tokenizer, tmp_path, monkeypatch):
    """Parts of 100: the second attempt encodes what the first had not finished, and the rows are the uncut ones."""
    from hymba_tune.data import encoding, packing

    monkeypatch.setattr(encoding, "PART", 100)
    dataset = random_conversations(250)
    whole, counts = build_rows(dataset, small_tokenizer, 300, folder=tmp_path / "whole")
    assert [file.name for file in sorted((tmp_path / "whole").glob("*.arrow"))] == [
        f"rows-0000{part}.arrow" for part in range(3)
    ]
    assert counts.documents == 250
    written: list[str] = []
    pack = packing._pack

    def cut_at_the_third(documents, path, **settings):
        if len(written) == 2:
            written.append("cut")
            raise KeyboardInterrupt
        written.append(path.name)
        return pack(documents, path, **settings)

    monkeypatch.setattr(packing, "_pack", cut_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_rows(dataset, small_tokenizer, 300, folder=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    rows, counts_again = build_rows(dataset, small_tokenizer, 300, folder=tmp_path / "cut")
    assert written == ["rows-00000.arrow", "rows-00001.arrow", "cut", "rows-00002.arrow"]
    assert rows[:] == whole[:]
    assert counts_again == counts
    assert not (tmp_path / "cut.unfinished").exists()


def test_what_was_cut_under_other_settings_is_not_used(small_tokenizer, tmp_path):
    draft = tmp_path / "rows.unfinished"
    draft.mkdir()
    (draft / "fingerprint").write_text("of other settings")
    (draft / "part-00000.json").write_text('{"rows": 99}')
    _, counts = build_rows(random_conversations(15), small_tokenizer, 300, folder=tmp_path / "rows")
    assert counts.documents == 15


def test_a_realised_mix_has_the_same_fingerprint_in_every_process(tmp_path):
    """Or nothing that was cut off could ever go on."""
    code = (
        "import sys; from pathlib import Path; from hymba_tune.data.mix import load_mix, realise_mix\n"
        "print(realise_mix(load_mix('sft1_tiny'), 0, limit=50, cache_dir=Path(sys.argv[1]))[0]._fingerprint)"
    )
    prints = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert prints[0] == prints[1] != ""


def by_hand(lengths, capacity):
    """Best fit decreasing in the plainest way: the open row with the least sufficient space, by trying all."""
    rows: list[list[int]] = []
    spaces: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in range(len(rows)) if spaces[row] >= lengths[document]]
        if not fitting:
            rows.append([])
            spaces.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: spaces[row])
        rows[row].append(document)
        spaces[row] -= lengths[document]
    return rows


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_best_fit_decreasing_is_as_tight_as_by_hand_and_as_trl(capacity):
    rng = np.random.default_rng(capacity)
    lengths = np.minimum(rng.lognormal(np.log(capacity) / 2, 1, 400).astype(int) + 1, capacity)
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(400))
    totals = [int(lengths[row].sum()) for row in rows]
    assert max(totals) <= capacity
    assert sorted(totals) == sorted(sum(lengths[i] for i in row) for row in by_hand(lengths, capacity))
    assert rows == sorted(sorted(row) for row in rows), "documents and rows stand in mix order"
    trl = pack_dataset(datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), capacity)
    assert len(trl) == len(rows)


def test_real_conversations_fill_rows_of_the_real_length(data_dir, tmp_path):
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.mix import load_mix, realise_mix

    dataset, _ = realise_mix(load_mix("sft1_files"), seed=0, limit=400, cache_dir=tmp_path)
    tokenizer = load_tokenizer(data_dir / "hymba-1.5b")
    rows, counts = build_rows(dataset, tokenizer, 8192, folder=tmp_path / "rows")
    assert counts.documents == 400
    assert counts.dropped_too_long == counts.dropped_unsupervised == counts.truncated == 0
    assert set(counts.sources) == {"math", "code", "function_calls"}
    ends = sum(label == tokenizer.eos_token_id for row in rows["labels"] for label in row)
    replies = [json.loads(text)["messages"] for text in dataset["conversation"]]
    assert ends == sum(message["role"] == "assistant" for messages in replies for message in messages)
