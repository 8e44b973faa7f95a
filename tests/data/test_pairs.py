"""Tokenised pairs: exact ids, what is dropped or cut, and TRL's collator."""

import json

import datasets
import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hymba_tune.data.chat import encode_conversation, prompt_ids
from hymba_tune.data.pairs import build_pairs, encode_pair, load_pairs
from hymba_tune.errors import UserError

USER = {"role": "user", "content": "Q"}
TOOL = {"name": "f", "description": "F", "parameters": {}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
    {"role": "tool", "content": "12"},
]


def reply(text):
    return [{"role": "assistant", "content": text}]


def pairs_of(*made, source="a"):
    texts = [
        json.dumps({"prompt": prompt, "chosen": reply(good), "rejected": reply(bad)}) for prompt, good, bad in made
    ]
    return datasets.Dataset.from_dict({"conversation": texts, "source": [source] * len(texts)})


def test_a_pair_is_these_tokens(small_tokenizer):
    pair = {"prompt": [USER], "chosen": reply("12"), "rejected": reply(" no\n")}
    prompt, chosen, rejected = encode_pair(small_tokenizer, pair)
    assert small_tokenizer.decode(prompt) == "<extra_id_0>System\n\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\n"
    assert small_tokenizer.decode(chosen) == "12</s>"
    assert small_tokenizer.decode(rejected) == "no</s>"


@pytest.mark.parametrize("prompt", [[USER], CALLED, [{"role": "system", "content": "S"}, USER, *reply("A"), USER]])
def test_both_sides_are_the_conversations_of_fine_tuning(small_tokenizer, prompt):
    pair = {"prompt": prompt, "chosen": reply("good </s> text"), "rejected": CALLED[1:2], "tools": [TOOL]}
    start, *sides = encode_pair(small_tokenizer, pair)
    assert start == prompt_ids(small_tokenizer, prompt, [TOOL])
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        document = encode_conversation(small_tokenizer, [*prompt, *pair[name]], [TOOL])
        assert start + side == document.input_ids
        assert set(document.loss_mask[len(start) :]) == {1}, "every token of the reply is scored"
        assert side[-1] == small_tokenizer.eos_token_id
        assert side.count(small_tokenizer.eos_token_id) == 1


def test_the_collator_takes_the_rows(small_tokenizer, tmp_path):
    rows, counts = build_pairs(
        pairs_of(([USER], "12", "no"), ([USER], "a", "bc")), small_tokenizer, 200, folder=tmp_path / "rows"
    )
    batch = DataCollatorForPreference(pad_token_id=3)(list(rows))
    for number, row in enumerate(rows):
        for half, side in enumerate(("chosen_ids", "rejected_ids")):
            ids, scored = batch["input_ids"][2 * half + number], batch["completion_mask"][2 * half + number]
            length = len(row["prompt_ids"]) + len(row[side])
            assert ids[:length].tolist() == row["prompt_ids"] + row[side]
            assert ids[scored.bool()].tolist() == row[side]
            assert batch["attention_mask"][2 * half + number].tolist() == [1] * length + [0] * (len(ids) - length)
    assert counts.tokens == int(batch["attention_mask"].sum())
    assert counts.chosen_tokens + counts.rejected_tokens == int(batch["completion_mask"].sum())


def test_too_long_and_equal_pairs_are_dropped_or_cut_and_counted(small_tokenizer, tmp_path):
    long = [{"role": "user", "content": "Q" * 300}]
    dataset = pairs_of(
        ([USER], "1", "2"),
        ([USER], "1" * 99, "2"),
        ([USER], "x", " x"),
        (long, "1", "2"),
        ([USER], "3" * 90 + "a", "3" * 99),
    )
    prompt = len(prompt_ids(small_tokenizer, [USER]))
    limit = prompt + 10
    rows, counts = build_pairs(dataset, small_tokenizer, limit, folder=tmp_path / "drop")
    assert (counts.rows, counts.dropped_too_long, counts.dropped_same, counts.truncated) == (1, 3, 1, 0)
    assert counts.longest > 300
    rows, counts = build_pairs(dataset, small_tokenizer, limit, "truncate", folder=tmp_path / "cut")
    assert (counts.rows, counts.dropped_too_long, counts.dropped_same, counts.truncated) == (2, 1, 2, 1)
    assert [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows] == [(2, 2), (10, 2)]
    assert sum(part.tokens for part in counts.sources.values()) == counts.tokens
    assert counts.sources["a"].pairs == 2


def test_rows_keep_the_mixs_order_and_are_the_same_with_workers(small_tokenizer, tmp_path):
    dataset = pairs_of(*(([USER], f"{n}", "no") for n in range(250)))
    rows, counts = build_pairs(dataset, small_tokenizer, 200, folder=tmp_path / "one")
    assert [small_tokenizer.decode(ids[:-1]) for ids in rows["chosen_ids"]] == [str(n) for n in range(250)]
    again, _ = build_pairs(dataset, small_tokenizer, 200, folder=tmp_path / "two", workers=2)
    assert rows[:] == again[:]
    assert (load_pairs(tmp_path / "one")[0][:], load_pairs(tmp_path / "one")[1]) == (rows[:], counts)


def test_nothing_left_is_an_error(small_tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"data\.max_length: 4: none of 1 pairs fits \(0 have equal replies\); raise it"
    ):
        build_pairs(pairs_of(([USER], "1", "2")), small_tokenizer, 4, folder=tmp_path / "rows")
    assert not list(tmp_path.iterdir())
