"""Mixes: settings are checked, sources are read with their places, amounts and splits are exact and repeatable."""

import gzip
import itertools
import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from hymba_tune.data.mix import load_mix, mix_fingerprint, realise_mix
from hymba_tune.errors import UserError
from hymba_tune.evaluation.rolebench import SYSTEM_PROMPT, rolebench_rows

MIXES = Path(__file__).resolve().parents[2] / "data_mixes"


def row(number, source="a"):
    return {"question": f"{source} {number}?", "answer": f"{number}"}


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(item) for item in rows) + "\n")


@pytest.fixture
def realised(tmp_path):
    """Write a mix (sources as YAML text) next to a.jsonl (100 rows) and b.jsonl (40 rows), and realise it."""
    for name, n in {"a": 100, "b": 40}.items():
        write_lines(tmp_path / f"{name}.jsonl", [row(number, name) for number in range(n)])

    def make(text, seed=0, split="train", **options):
        (tmp_path / "mix.yaml").write_text(text)
        mix = load_mix(tmp_path / "mix.yaml")
        dataset, counts = realise_mix(mix, seed, split, cache_dir=tmp_path / "cache", **options)
        return questions(dataset), {count.source: count for count in counts}

    return make


def questions(dataset):
    return [json.loads(text)["messages"][0]["content"] for text in dataset["conversation"]]


def sources(**parts):
    lines = [f"  {name}: {{map: {{user: question, assistant: answer}}, {text}}}" for name, text in parts.items()]
    return "\n".join(["sources:", *lines, ""])


A, B = "path: a.jsonl", "path: b.jsonl"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"a": A, "b": B}, (100, 40)),
        ({"a": f"{A}, take: 30", "b": f"{B}, take: 400"}, (30, 40)),
        ({"a": f"{A}, weight: 0.5", "b": f"{B}, weight: 2.5"}, (50, 100)),
        ({"a": A, "b": f"{B}, share: 0.2"}, (100, 25)),
        ({"a": f"{A}, share: 0.5", "b": f"{B}, share: 0.5"}, (40, 40)),
        ({"a": f"{A}, share: 0.8", "b": f"{B}, share: 0.2"}, (100, 25)),
        ({"a": A, "b": f"{B}, share: 0.5, epochs: 3"}, (100, 100)),
        ({"a": f"{A}, share: 0.5", "b": f"{B}, share: 0.5, epochs: 2"}, (80, 80)),
    ],
)
def test_amounts_are_what_the_mix_asks(realised, parts, expected):
    found, counts = realised(sources(**parts))
    assert (counts["a"].conversations, counts["b"].conversations) == expected
    assert len(found) == sum(expected)
    for name, n in zip("ab", expected, strict=True):
        mine = [question for question in found if question.startswith(name)]
        assert len(mine) == n
        copies = [len(list(group)) for _, group in itertools.groupby(sorted(mine))]
        assert max(copies) - min(copies) <= 1, "repeats are spread evenly"


def test_the_order_is_the_seeds_and_no_other_thing(realised):
    mix = sources(a=A, b=B)
    first, _ = realised(mix, seed=1)
    assert realised(mix, seed=1)[0] == first
    assert realised(mix, seed=2)[0] != first
    assert sorted(realised(mix, seed=2)[0]) == sorted(first)
    assert realised(mix, seed=1, limit=10)[0] == first[:10]
    limited = realised(mix, seed=1, limit=10)[1]
    assert limited["a"].conversations + limited["b"].conversations == 10
    sources_seen = "".join(question[0] for question in first)
    assert "ab" in sources_seen[:20]
    assert "ba" in sources_seen[:40], "sources are mixed, not one after the other"


def test_validation_is_held_out_of_each_source_and_shares_nothing(realised, tmp_path):
    write_lines(tmp_path / "a.jsonl", [row(number % 50, "a") for number in range(100)])
    mix = sources(a=A, b=f"{B}, weight: 3")
    train, counts = realised(mix, validation=14)
    held, held_counts = realised(mix, split="validation", validation=14)
    assert len(held) == 14
    assert (counts["a"].validation, counts["b"].validation) == (10, 4)
    assert (held_counts["a"].conversations, held_counts["b"].conversations) == (10, 4)
    assert not set(train) & set(held)
    assert counts["b"].conversations == 3 * 36
    assert realised(mix)[1]["a"].conversations == 100
    with pytest.raises(UserError, match="validation: 140 of 140 conversations leave none"):
        realised(mix, validation=140)


def test_duplicates_are_dropped_where_asked_and_counted(realised, tmp_path):
    write_lines(tmp_path / "b.jsonl", [row(number, "a") for number in range(90, 110)])
    assert len(realised(sources(a=A, b=B))[0]) == 120
    found, counts = realised(sources(a=A, b=B) + "drop_duplicates: true\n")
    assert len(found) == len(set(found)) == 110
    assert (counts["a"].duplicates, counts["b"].duplicates) == (0, 10)


def test_every_kind_of_file_is_read(realised, tmp_path):
    rows = [row(number, "c") for number in range(5)]
    (tmp_path / "c1.json").write_text(json.dumps(rows, indent=1))
    write_lines(tmp_path / "c2.json", rows)
    (tmp_path / "c3.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode("utf-8-sig")))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c4.parquet")
    found, counts = realised(sources(all="path: [c1.json, 'c[2-9].*']"))
    assert sorted(found) == sorted(item["question"] for item in rows * 4)
    assert counts["all"].read == counts["all"].kept == 20


def test_a_filter_keeps_matching_rows(realised, tmp_path):
    rows = [{**row(n), "score": str(n / 10), "kind": "xyz"[n % 3]} for n in range(10)]
    write_lines(tmp_path / "a.jsonl", rows)
    found, counts = realised(sources(a=A + ", filter: {score: {min: 0.5}, kind: [x, y]}"))
    assert sorted(found) == ["a 6?", "a 7?", "a 9?"]
    assert (counts["a"].read, counts["a"].filtered, counts["a"].kept) == (10, 7, 3)
    with pytest.raises(UserError, match=r"a\.jsonl:1: filter: no column 'quality' \(columns: question, answer"):
        realised(sources(a=A + ", filter: {quality: {max: 1}}"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: filter: column 'kind' holds 'x', no number"):
        realised(sources(a=A + ", filter: {kind: {max: 1}}"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x", ', r"a\.jsonl:2: not valid JSON \(.*column 18\)"),
        ("[1, 2]", r"a\.jsonl:2: not a JSON object"),
        ('{"question": "x"}', r"a\.jsonl:2: map: no column 'answer' \(columns: question\)"),
        ('{"question": "x", "answer": ""}', r"a\.jsonl:2: message 2: the assistant says nothing"),
        ('{"question": "x", "answer": "\\ud83d"}', r"a\.jsonl:2: half a character"),
    ],
)
def test_a_bad_row_names_file_and_line_or_is_skipped_and_counted(realised, tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row(0))}\n{line}\n{json.dumps(row(2))}\n")
    with pytest.raises(UserError, match=message) as refused:
        realised(sources(a=A))
    assert f"set on_bad_row: skip at {tmp_path}/mix.yaml:2: sources.a" in str(refused.value)
    assert not list((tmp_path / "cache").iterdir()), "nothing half-written stays"
    found, counts = realised(sources(a=A + ", on_bad_row: skip"))
    assert sorted(found) == ["a 0?", "a 2?"]
    assert counts["a"].skipped == 1
    assert "a.jsonl:2" in counts["a"].first_skipped
    assert len(realised(sources(a=A) + "on_bad_row: skip\n")[0]) == 2


def test_bytes_that_are_no_text_are_a_bad_row(realised, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not UTF-8 text \(byte 14 of the line\)"):
        realised(sources(a=A))


def test_a_source_without_one_good_row_is_an_error(realised, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(
        UserError, match=r"sources\.a: not one of its conversations can be used \(rows read 3, .*skipped 3"
    ):
        realised(sources(a=A + ", on_bad_row: skip"))


def test_conversions_are_kept_until_the_content_changes(realised, tmp_path):
    text = sources(a=A)
    realised(text)
    (cached,) = (tmp_path / "cache").glob("*.arrow")
    before = cached.stat().st_mtime_ns
    realised(text, seed=5)
    assert cached.stat().st_mtime_ns == before
    mix = load_mix(tmp_path / "mix.yaml")
    fingerprint = mix_fingerprint(mix)
    write_lines(tmp_path / "a.jsonl", [row(1)])
    assert mix_fingerprint(mix) != fingerprint
    assert realised(text)[0] == ["a 1?"]


def test_hub_sources_are_read_and_an_unreachable_hub_is_one_message(realised, monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return datasets.Dataset.from_list([row(number, "h") for number in range(50)])

    text = sources(h="hub: {id: some/set, subset: s, split: 'train[:50]'}, take: 20")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, counts = realised(text)
    assert asked == [("some/set", "s", {"data_files": None, "split": "train[:50]", "revision": None})]
    assert len(set(found)) == counts["h"].read == 20, "no more is read than taken"
    assert max(int(question.split()[1][:-1]) for question in found) > 25, "a random choice, not the first rows"
    assert sorted(realised(text, seed=1)[0]) != sorted(found)

    def unreachable(*names, **options):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"mix\.yaml:2: sources\.h\.hub: some/set: Couldn't reach.*\n.*path:"
    ) as refused:
        realised(text.replace("split", "revision: r, split"))
    assert str(refused.value).count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: {}", "mix.yaml:1: sources: "),
        ("sources:\n  a:\n    pth: x", "mix.yaml:3: sources.a.pth: unknown key; did you mean path?"),
        ("sources:\n  a:\n    path: a.jsonl\n    take: many", "mix.yaml:4: sources.a.take: 'many': input should be"),
        ("sources:\n  a:\n    path: a.jsonl\n    take: 0", "mix.yaml:4: sources.a.take: 0: input should be greater"),
        ("sources:\n  a:\n    hub: {subset: x}", "mix.yaml:3: sources.a.hub.id: missing; add it"),
        ("sources:\n  a:\n    licence: MIT", "mix.yaml:2: sources.a: has no origin; give exactly one of path, hub"),
        ("sources:\n  a:\n    path: a.jsonl\n    hub: {id: x/y}", "mix.yaml:2: sources.a: has path and hub"),
        ("sources:\n  a:\n    path: none.jsonl", "mix.yaml:3: sources.a.path: no file "),
        ("sources:\n  a:\n    path: mix.yaml", "unknown kind of file; use .jsonl"),
        ("sources:\n  a:\n    path: ${NO_SUCH}/x", "mix.yaml:3: sources.a.path: ${NO_SUCH}/x: the variable NO_SUCH"),
        (
            "sources:\n  a:\n    path: a.jsonl\n    format: xml",
            "mix.yaml:4: sources.a.format: 'xml' is unknown for conv",
        ),
        ("sources:\n  a:\n    generator: {name: x, n: 1}", "mix.yaml:3: sources.a.generator.name: 'x' is unknown"),
        (
            "sources:\n  a:\n    path: a.jsonl\n    take: 1\n    weight: 2",
            "mix.yaml:5: sources.a.weight: contradicts take",
        ),
        ("sources:\n  a: {path: a.jsonl, epochs: 2}", "limits how often a share is filled; give share too"),
        ("sources:\n  a: {path: a.jsonl, share: 0.5}", "all sources have a share, but these sum to 0.5; make it 1"),
        ("sources:\n  a: {path: a.jsonl}\n  b: {path: b.jsonl, share: 1.0}", "leave nothing for the other sources"),
        ("sources:\n  a: {path: a.jsonl, map: {usr: x}}", "mix.yaml:2: sources.a.map.usr: no format for conv"),
        (
            "kind: pairs\nsources:\n  a: {path: a.jsonl}",
            "mix.yaml:1: kind: 'pairs': input should be 'conversations', 'pref",
        ),
    ],
)
def test_a_wrong_mix_is_refused_with_line_field_and_remedy(realised, text, message):
    with pytest.raises(UserError) as refused:
        realised(text)
    assert message in str(refused.value)


def test_a_share_that_the_source_cannot_fill_is_an_error(realised):
    with pytest.raises(
        UserError,
        match=r"sources\.b\.share: 0\.5 of the mix is 100 conversations, but the source has 40; .* set epochs: 3",
    ):
        realised(sources(a=A, b=f"{B}, share: 0.5"))


def test_embedded_generators_are_sources(tmp_path):
    dataset, counts = realise_mix(load_mix("sft1_tiny"), seed=0, limit=50, cache_dir=tmp_path)
    assert len(dataset) == 50
    assert all(count.kept == count.read > 0 for count in counts)
    assert any("tools" in json.loads(text) for text in dataset["conversation"])


@pytest.mark.parametrize("path", sorted(MIXES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_mix_loads_and_names_its_licences(path, request):
    if "HYMBA_TUNE_DATA" in path.read_text():
        request.getfixturevalue("data_dir")
    for name, source in load_mix(path).sources.items():
        assert source.licence in ("Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0", "ODC-BY-1.0"), name


REAL = {
    "sft1_files": {"math": 7473, "code": 4535, "function_calls": 2122},
    "sft2_files": {
        "instructions": 985, "roles": 1923, "tools_in_text": 4000, "tool_dialogues": 265,
        "replay_math": 1606, "replay_code": 1071, "replay_function_calls": 856,
    },
    "roleplay_files": {"role_specific": 4250},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_real_files_are_all_read(name, data_dir, tmp_path):
    _, counts = realise_mix(load_mix(name), seed=0, cache_dir=tmp_path)
    assert {count.source: count.conversations for count in counts} == REAL[name]


@pytest.mark.parametrize("name", ["roleplay", "roleplay_roles", "roleplay_files"])
def test_roles_are_trained_with_the_prompt_that_they_are_evaluated_with(name, request):
    if name.endswith("_files"):
        request.getfixturevalue("data_dir")
    for source in load_mix(name).sources.values():
        assert source.map is not None
        assert source.map["system"] == SYSTEM_PROMPT.format(role="{role}", description="")


def test_the_local_roles_are_other_roles_than_those_of_role_generalization(data_dir, tmp_path):
    dataset, _ = realise_mix(load_mix("roleplay_files"), seed=0, cache_dir=tmp_path)
    systems = {json.loads(text)["messages"][0]["content"] for text in dataset["conversation"]}
    assert len(systems) == 85
    assert not systems & {
        SYSTEM_PROMPT.format(role=item["role"], description="")
        for item in rolebench_rows("rolebench_role", data_dir / "data")
    }


def test_a_demo_file_with_function_calls_is_read(data_dir, tmp_path):
    path = data_dir / "data/train_mix/llamafactory_demos/glaive_toolcall_en_demo.json"
    (tmp_path / "mix.yaml").write_text(f"sources: {{glaive: {{path: {path}, format: sharegpt}}}}")
    dataset, counts = realise_mix(load_mix(tmp_path / "mix.yaml"), seed=0, cache_dir=tmp_path / "cache")
    assert counts[0].kept == 300
    messages = [message for text in dataset["conversation"] for message in json.loads(text)["messages"]]
    assert sum("tool_calls" in message for message in messages) == 211
