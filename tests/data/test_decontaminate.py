"""Conversations that repeat a test item are found, listed and dropped; what only sounds alike stays."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest

from hymba_tune.data.benchmark_texts import BENCHMARKS, benchmark_texts
from hymba_tune.data.decontaminate import (
    BOILERPLATE_CONVERSATIONS,
    BenchmarkIndex,
    KeptOut,
    find_contamination,
    words_of,
)
from hymba_tune.data.mix import Mix, load_mix, mix_contamination, mix_kept_out, realise_mix
from hymba_tune.errors import UserError
from hymba_tune.recipe import Benchmark

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


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    """Two sources; two of four conversations repeat an item."""
    for name, texts in (("a", ["Hello.", LONG, SHORT]), ("b", ["Good day."])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(user(text)) + "\n" for text in texts))
    (tmp_path / "mix.yaml").write_text("sources: {a: {path: a.jsonl}, b: {path: b.jsonl, weight: 2}}\n")
    return load_mix(tmp_path / "mix.yaml")


def contents(rows: Any) -> list[str]:
    return sorted(json.loads(one)["messages"][0]["content"] for one in rows["conversation"])


def test_conversations_that_repeat_an_item_are_in_no_split_and_are_counted(mix, tmp_path):
    kept, counts = realise_mix(mix, 0, keep_out=KeptOut(TEXTS), cache_dir=tmp_path / "cache")
    assert contents(kept) == ["Good day.", "Good day.", "Hello."]
    assert [(count.source, count.contaminated, count.conversations) for count in counts] == [("a", 2, 1), ("b", 0, 2)]
    held, _ = realise_mix(mix, 0, "validation", validation=1, keep_out=KeptOut(TEXTS), cache_dir=tmp_path / "cache")
    assert contents(held)[0] in ("Hello.", "Good day.")
    everything, counts = realise_mix(mix, 0, cache_dir=tmp_path / "cache")
    assert (len(everything), [count.contaminated for count in counts]) == (5, [0, 0])


def test_overlaps_are_found_once_and_again_when_items_or_data_change(mix, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    found = mix_contamination(mix, 0, KeptOut(TEXTS), cache)
    assert [(hit.source, hit.row, hit.item) for hit in found.hits] == [("a", 1, "0"), ("a", 2, "multiple_65")]
    assert (found.conversations, found.dropped) == (4, 2)
    monkeypatch.setattr(KeptOut, "index", property(lambda self: pytest.fail("compared again")))
    assert mix_contamination(mix, 0, KeptOut(TEXTS), cache) == found
    with pytest.raises(pytest.fail.Exception, match="compared again"):
        mix_contamination(mix, 0, KeptOut(TEXTS[1:]), cache)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write(json.dumps(user(LONG)) + "\n")
    with pytest.raises(pytest.fail.Exception, match="compared again"):
        mix_contamination(load_mix(tmp_path / "mix.yaml"), 0, KeptOut(TEXTS), tmp_path / "other")


def test_any_number_of_processes_finds_the_same(tmp_path):
    stock = "Useful for when you need to answer questions about current events; input should be a search query."
    item = f"{stock} " + " ".join(f"word{n}" for n in range(60))
    cycle = [LONG, stock, "Hello.", SHORT, f"Do: {item}", TEXTS[-1][2], "Good day."]
    conversations = [("mine", user(cycle[n % 7])) for n in range(250)]
    rows = datasets.Dataset.from_list(
        [{"source": name, "conversation": json.dumps(one)} for name, one in conversations]
    )
    texts = [*TEXTS, ("bfcl_v2", "live_1", item)]
    expected = find_contamination(conversations, BenchmarkIndex(texts))
    assert (expected.dropped, expected.boilerplate) == (143, {("bfcl_v2", "live_1"): 36})
    for workers in (1, 3):
        assert KeptOut(texts).found_in(rows, tmp_path / f"{workers}.json", workers) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "3.json"]


def test_a_source_that_holds_nothing_but_test_items_is_refused_with_their_benchmarks(mix, tmp_path):
    everything = [*TEXTS, ("mmlu", "1", "Good day."), ("ifeval", "1", "Hello.")]
    index = KeptOut(everything + [("mmlu", "2", f"{word} there my good old friend") for word in ("Hello", "Good")])
    (tmp_path / "a.jsonl").write_text(json.dumps(user(LONG)) + "\n")
    with pytest.raises(UserError, match=r"mix\.yaml:1: sources\.a: every one .* of gsm8k; take another"):
        realise_mix(load_mix(tmp_path / "mix.yaml"), 0, keep_out=index, cache_dir=tmp_path / "cache")


def test_generators_are_not_looked_at_and_false_keeps_nothing_out(mix, tmp_path, monkeypatch):
    monkeypatch.setattr("hymba_tune.data.decontaminate.benchmark_texts", lambda *_: pytest.fail("read"))
    assert mix_kept_out(load_mix("sft1_tiny")) is None
    assert mix_kept_out(mix, False) is None
    with pytest.raises(pytest.fail.Exception, match="read"):
        mix_kept_out(mix, ["gsm8k"])


def test_the_texts_are_those_of_every_benchmark_in_the_folder(data_dir):
    texts, missing = benchmark_texts(data_dir)
    counts = Counter(benchmark for benchmark, _, _ in texts)
    assert {name: counts[name] for name in ("gsm8k", "ifeval", "mmlu")} == {"gsm8k": 1319, "ifeval": 541, "mmlu": 14042}
    assert all(counts[name] for name in BENCHMARKS if name not in missing)
    assert all("get it from" in why for why in missing.values())
    for name, item, text in texts:
        if name == "mmlu":
            assert len(text.split("\n")[0].split()) >= 8 or "\n" in text, item
    assert set(get_args(Benchmark)) == set(BENCHMARKS)


def test_a_benchmark_that_is_not_here_is_named_and_a_dead_hub_is_asked_once(tmp_path, monkeypatch):
    texts, missing = benchmark_texts(tmp_path)
    assert texts == []
    assert list(missing) == list(BENCHMARKS)
    asked = []

    def unreachable(*arguments: object, **settings: object) -> None:
        asked.append(arguments)
        raise ConnectionError("no route to host")

    monkeypatch.delenv("HYMBA_TUNE_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert list(benchmark_texts(None)[1]) == list(BENCHMARKS)
    assert len(asked) == 1


def test_the_known_bfcl_questions_in_gpteacher_are_found_through_its_mix(data_dir, tmp_path):
    found = mix_contamination(load_mix("sft2_files"), 0, KeptOut(*benchmark_texts(data_dir, ["bfcl_v2"])), tmp_path)
    mine = [hit for hit in found.hits if hit.source == "tools_in_text"]
    assert [(hit.row, hit.item) for hit in mine if hit.kind == "exact"] == [
        (3024, "live_irrelevance_269-57-4"),
        (3260, "irrelevance_54"),
        (6313, "live_irrelevance_269-57-4"),
    ]
    assert len({hit.row for hit in mine}) == 10  # seven more hold a whole short question in a longer text
    assert found.boilerplate == {("bfcl_v2", "live_multiple_125-47-1"): 1151}  # a tool's stock description
