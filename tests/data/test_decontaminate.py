"""Conversations that repeat a test item are found, listed and dropped; what only sounds alike stays."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hymba_tune.data.decontaminate import (
    BOILERPLATE_CONVERSATIONS,
    BenchmarkIndex,
    decontaminate,
    find_contamination,
    words_of,
)
from hymba_tune.data.formats import alpaca

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May to them all."
SHORT = "Find the distance between New York City and Los Angeles"
TEXTS = [
    ("gsm8k", "0", LONG),
    ("bfcl_v2", "multiple_65", SHORT),
    ("bfcl_v2", "irrelevance_1", "What is the capital of France?"),
    ("bfcl_v2", "irrelevance_2", "Paris"),
    ("gpqa", "7", "Two quantum states have lifetimes of ten nanoseconds; which energies can be told apart by a lamp?"),
]


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Well."}]}


def hits(*conversations: dict[str, Any]) -> list[tuple[int, str, str]]:
    found = find_contamination((("mix", one) for one in conversations), BenchmarkIndex(TEXTS))
    return [(hit.row, hit.item, hit.kind) for hit in found.hits]


def test_words_ignore_case_punctuation_and_width_and_split_chinese():
    assert words_of("The  CAT's, ﬁsh—Ａ_b 3.5 Straße 你好") == [
        "the", "cat", "s", "fish", "a", "b", "3", "5", "strasse", "你", "好",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LONG.upper().replace(",", ""), [(0, "0", "exact")]),
        (f"Solve this.\n\n{LONG}", [(0, "0", "exact")]),  # a paragraph
        (f"Solve: {LONG} Thanks!", [(0, "0", "ngram")]),
        ("She sold clips to 48 of her friends in April, and then she sold half", [(0, "0", "ngram")]),  # 13 words
        ("She sold clips to 48 of her friends in April and then", []),  # 11 of them
        (f"Please: {SHORT.lower()}!", [(0, "multiple_65", "ngram")]),  # all of a short item
        ("Find the distance between New York City and Boston", []),
        ("what is the CAPITAL of france", [(0, "irrelevance_1", "exact")]),
        ("Tell me, what is the capital of France?", []),  # six words inside another text are no evidence
        ("Paris", []),  # nor is one word
        ("", []),
    ],
)
def test_a_message_overlaps_as_a_whole_or_by_its_ngrams(text, expected):
    assert hits(user(text)) == expected


def test_every_message_is_compared_and_an_item_hits_once_a_conversation():
    conversation = user(SHORT)
    conversation["messages"] += [{"role": "user", "content": f"{LONG}"}, {"role": "assistant", "content": LONG}]
    conversation["messages"].append({"role": "assistant", "content": None, "tool_calls": []})
    assert hits(user("Hello."), conversation) == [(1, "multiple_65", "exact"), (1, "0", "exact")]


def test_preference_pairs_are_compared():
    pair = {
        "prompt": [{"role": "user", "content": "Hi."}],
        "chosen": [{"role": "assistant", "content": LONG}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert hits(pair) == [(0, "0", "exact")]
    assert hits({"prompt": LONG, "chosen": "a", "rejected": "b"}) == [(0, "0", "exact")]


def test_a_hit_says_where_and_what_but_never_shows_gpqa():
    found = find_contamination([("mine", user(TEXTS[-1][2])), ("mine", user(SHORT))], BenchmarkIndex(TEXTS))
    secret, shown = found.hits
    assert (secret.benchmark, secret.item, secret.text) == ("gpqa", "7", None)
    assert (shown.source, shown.row, shown.message, shown.share) == ("mine", 1, "messages[0]", 1.0)
    assert shown.text == "find the distance between new york city and los angeles"
    report = found.to_json()
    assert report["conversations"] == report["dropped"] == 2
    assert report["test_items"] == {"gsm8k": 1, "bfcl_v2": 3, "gpqa": 1}
    assert report["hits_by_benchmark"] == {"bfcl_v2": {"exact": 1}, "gpqa": {"exact": 1}}
    assert "nanoseconds" not in json.dumps(report)


def test_boilerplate_is_counted_and_a_copied_item_is_not_boilerplate():
    stock = "Useful for when you need to answer questions about current events; input should be a search query."
    item = f"{stock} " + " ".join(f"word{n}" for n in range(60))
    index = BenchmarkIndex([("bfcl_v2", "live_1", item)])
    many = BOILERPLATE_CONVERSATIONS + 1
    found = find_contamination([("mix", user(stock))] * many, index)
    assert found.hits == []
    assert found.boilerplate == {("bfcl_v2", "live_1"): many}
    assert len(find_contamination([("mix", user(stock))] * (many - 1), index).hits) == many - 1
    copies = find_contamination([("mix", user(stock))] * many + [("mix", user(f"Do: {item}"))] * many, index)
    assert copies.rows == list(range(many, 2 * many))


def test_rows_that_repeat_an_item_are_dropped():
    texts = ["Hello.", LONG, "Good day.", SHORT]
    rows = datasets.Dataset.from_dict(
        {"conversation": [json.dumps(user(text)) for text in texts], "source": ["a", "b", "b", "a"]}
    )
    kept, found = decontaminate(rows, iter(TEXTS))
    assert [json.loads(one)["messages"][0]["content"] for one in kept["conversation"]] == ["Hello.", "Good day."]
    assert found.rows == [1, 3]
    clean, nothing = decontaminate(kept, TEXTS)
    assert len(clean) == 2
    assert nothing.hits == []


def test_the_known_bfcl_questions_in_gpteacher_are_found(data_dir):
    source = data_dir / "data" / "train_mix" / "gpteacher" / "toolformer-dedupe-only-dataset.json"
    conversations = [("toolformer", alpaca(row)) for row in json.loads(source.read_text(encoding="utf-8"))]
    found = find_contamination(conversations, BenchmarkIndex(bfcl_texts(data_dir / "data" / "bfcl_v2")))
    assert [(hit.row, hit.item) for hit in found.hits if hit.kind == "exact"] == [
        (3024, "live_irrelevance_269-57-4"),
        (3260, "irrelevance_54"),
        (6313, "live_irrelevance_269-57-4"),
    ]
    assert len(found.rows) == 10  # seven more hold a whole short question in a longer text
    assert found.boilerplate == {("bfcl_v2", "live_multiple_125-47-1"): 1151}  # a tool's stock description


def bfcl_texts(folder: Path) -> list[tuple[str, str, str]]:
    lines = [line for path in sorted(folder.glob("BFCL_v2_*.json")) for line in path.read_text().splitlines()]
    return [("bfcl_v2", row["id"], turn["content"]) for row in map(json.loads, lines) for turn in row["question"]]
