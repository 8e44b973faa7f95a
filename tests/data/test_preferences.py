"""Every preference format makes the one form of a pair, says what is wrong with a row, or finds no preference in it."""

import json

import pytest

from hymba_tune.data.formats import BadRow, mapped
from hymba_tune.data.mix import load_mix, realise_mix
from hymba_tune.data.preferences import PREFERENCES, NoPreference, preference
from hymba_tune.errors import UserError
from tests.data.test_mix import write_lines

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Q"}
MORE = {"role": "user", "content": "Q2"}
REPLY = {"role": "assistant", "content": "A"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
TOOL = {"name": "f", "description": "F", "parameters": {}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
RESULT = {"role": "tool", "content": "{}"}

ROWS: dict[str, list[tuple]] = {
    "preference": [
        ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, [USER], GOOD, BAD),
        ({"prompt": "Q", "chosen": GOOD, "rejected": [BAD], "system": "S"}, [SYSTEM, USER], GOOD, BAD),
        ({"prompt": [USER, REPLY, MORE], "chosen": [GOOD], "rejected": [BAD]}, [USER, REPLY, MORE], GOOD, BAD),
        # ultrafeedback_binarized and the tulu mixtures: whole conversations next to the prompt's text
        ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], GOOD, BAD),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER], GOOD, BAD),
        ({"prompt": [USER, CALL, RESULT], "chosen": "good", "rejected": "bad"}, [USER, CALL, RESULT], GOOD, BAD),
        ({"prompt": "Q", "chosen": CALL, "rejected": "bad", "tools": [TOOL]}, [USER], CALL, BAD),
    ],
    "sharegpt_preference": [
        (
            {
                "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            [SYSTEM, USER],
            GOOD,
            BAD,
        )
    ],
    "hh_rlhf": [
        (
            {
                "chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant: good",
                "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant: bad",
            },
            [USER, REPLY, MORE],
            GOOD,
            BAD,
        )
    ],
    "pandalm": [
        (
            {"instruction": "I", "input": "in", "response1": "bad", "response2": "good"}
            | {"annotator1": 2, "annotator2": 1, "annotator3": 2},
            [{"role": "user", "content": "I\n\nin"}],
            GOOD,
            BAD,
        ),
        (
            {"instruction": "Q", "input": "", "response1": "good", "response2": True}
            | {"annotator1": 1, "annotator2": 1, "annotator3": 0},
            [USER],
            GOOD,
            {"role": "assistant", "content": "True"},
        ),
    ],
    "helpsteer2": [
        (
            {
                "rows": [
                    {"prompt": "Q", "response": "bad", "helpfulness": 1},
                    {"prompt": "Q", "response": "good", "helpfulness": 3},
                ]
            },
            [USER],
            GOOD,
            BAD,
        ),
        (
            {
                "rows": [
                    {"prompt": "Q\n<extra_id_1>Assistant\nA\n<extra_id_1>User\nQ2", "response": text, "helpfulness": n}
                    for text, n in (("good", 4), ("bad", 0))
                ]
            },
            [USER, REPLY, MORE],
            GOOD,
            BAD,
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "row", "prompt", "chosen", "rejected"),
    [(name, *case) for name, cases in ROWS.items() for case in cases],
)
def test_each_format_makes_the_one_form(name, row, prompt, chosen, rejected):
    made = PREFERENCES[name](row)
    assert {key: made[key] for key in made if key != "tools"} == {
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [rejected],
    }
    assert made.get("tools") == row.get("tools")
    assert json.loads(json.dumps(made)) == made


def test_every_format_has_a_case():
    assert set(ROWS) == set(PREFERENCES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "rejected": "bad"}, r"no column 'chosen' \(columns: prompt, rejected\)"),
        ({"chosen": "good", "rejected": "bad"}, "no column 'prompt'"),
        ({"prompt": "Q", "chosen": 3, "rejected": "bad"}, "chosen is not a list of objects"),
        ({"prompt": "Q", "chosen": " ", "rejected": "bad"}, "chosen: message 2: the assistant says nothing"),
        ({"prompt": "Q", "chosen": "good", "rejected": ""}, "rejected: message 2: the assistant says nothing"),
        ({"prompt": [USER, REPLY], "chosen": "good", "rejected": "bad"}, "the prompt ends with assistant; it must end"),
        ({"prompt": [], "chosen": "good", "rejected": "bad"}, "the prompt ends with nothing"),
        (
            {"prompt": "Q", "chosen": [CALL, RESULT, GOOD], "rejected": "bad"},
            "chosen: a reply is one assistant message, not assistant, tool, assistant; what comes before it belongs in",
        ),
        (
            {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, BAD, MORE, BAD]},
            "chosen: a reply is one assistant message, not assistant, user, assistant",
        ),
        ({"chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "the prompt ends with nothing"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(BadRow, match=message):
        preference(row)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("hh_rlhf", {"chosen": "Human: Q", "rejected": "x"}, r"chosen is no dialogue that begins with '\\n\\nHuman:'"),
        ("pandalm", {"annotator1": 1, "annotator2": 3, "annotator3": 1}, r"labels are \[1, 3, 1\], not 0, 1 or 2"),
        ("sharegpt_preference", {"conversations": [{"from": "x"}]}, "message 1: unknown speaker 'x'"),
        ("helpsteer2", {"rows": [{"prompt": "Q"}, {"prompt": "Q2"}]}, "this row and the next have different prompts"),
    ],
)
def test_formats_name_the_column_or_turn(name, row, message):
    with pytest.raises(BadRow, match=message):
        PREFERENCES[name](row)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("preference", {"prompt": "Q", "chosen": "same", "rejected": "same"}),
        ("preference", {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}),
        ("pandalm", {"annotator1": 0, "annotator2": 1, "annotator3": 0}),
        ("pandalm", {"annotator1": 0, "annotator2": 1, "annotator3": 2}),
        ("helpsteer2", {"rows": [{"prompt": "Q", "response": text, "helpfulness": 3} for text in "ab"]}),
    ],
)
def test_a_row_that_prefers_neither_reply_is_no_error(name, row):
    with pytest.raises(NoPreference):
        PREFERENCES[name](row)


def test_a_users_own_columns_are_mapped():
    row = {"question": "Q", "answers": ["good", "bad"], "role": "a pirate"}
    mapping = {"system": "You are {role}.", "prompt": "question", "chosen": "{answers[0]}", "rejected": "{answers[1]}"}
    made = preference(mapped(row, mapping))
    assert made["prompt"] == [{"role": "system", "content": "You are a pirate."}, USER]
    assert (made["chosen"], made["rejected"]) == ([GOOD], [BAD])


def realised(folder, text, **options):
    (folder / "mix.yaml").write_text(text)
    mix = load_mix(folder / "mix.yaml", kind="preferences")
    dataset, counts = realise_mix(mix, 0, cache_dir=folder / "cache", **options)
    return [json.loads(pair) for pair in dataset["conversation"]], {count.source: count for count in counts}


def test_a_mix_of_preferences_counts_ties_and_holds_pairs_out(tmp_path):
    rows = [{"q": f"Q{n}", "good": "a", "bad": "a" if n % 5 == 0 else "b"} for n in range(50)]
    write_lines(tmp_path / "own.jsonl", rows)
    text = "kind: preferences\nsources:\n  own: {path: own.jsonl, map: {prompt: q, chosen: good, rejected: bad}}\n"
    pairs, counts = realised(tmp_path, text, validation=4)
    own = counts["own"]
    assert (own.read, own.ties, own.kept, own.validation, own.conversations) == (50, 10, 40, 4, 36)
    assert len(pairs) == 36
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)


def test_rows_that_belong_together_stay_together(tmp_path):
    rows = [{"prompt": f"Q{n // 2}", "response": f"R{n}", "helpfulness": n % 2} for n in range(20)]
    write_lines(tmp_path / "rated.jsonl", rows)
    text = "kind: preferences\nsources:\n  rated: {path: rated.jsonl, format: helpsteer2}\n"
    pairs, counts = realised(tmp_path, text)
    assert counts["rated"].read == counts["rated"].kept == 10
    for made in pairs:
        number = int(made["prompt"][0]["content"][1:])
        assert (made["chosen"][0]["content"], made["rejected"][0]["content"]) == (
            f"R{2 * number + 1}",
            f"R{2 * number}",
        )
    write_lines(tmp_path / "rated.jsonl", rows[:-1])
    with pytest.raises(UserError, match=r"rated.jsonl:19: the format takes 2 rows together, and the last ones are"):
        realised(tmp_path, text)
    write_lines(tmp_path / "rated.jsonl", rows[1:])
    with pytest.raises(UserError, match=r"rated.jsonl:1: this row and the next have different prompts"):
        realised(tmp_path, text)


def test_the_kind_of_a_mix_must_fit_its_use_and_its_formats(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"prompt": "Q"}])
    mix = tmp_path / "mix.yaml"
    mix.write_text("sources:\n  a: {path: a.jsonl, format: pandalm, map: {prompt: x}}\n")
    with pytest.raises(UserError) as refused:
        load_mix(mix, kind="preferences")
    assert f"{mix}:2: sources.a.format: 'pandalm' is unknown for conversations; known are messages" in str(
        refused.value
    )
    assert "sources.a.map.prompt: no format for conversations reads it; use user, assistant" in str(refused.value)
    assert "kind: conversations, but preferences are needed here; name another mix" in str(refused.value)


def test_the_real_files_are_all_read(data_dir, tmp_path):
    mix = load_mix("dpo_files", kind="preferences")
    _, counts = realise_mix(mix, seed=0, cache_dir=tmp_path)
    found = {count.source: (count.read, count.ties, count.skipped, count.kept) for count in counts}
    assert found == {
        "harmless": (2312, 0, 9, 2303),
        "judged": (999, 105, 52, 842),
        "chat": (299, 0, 0, 299),
    }
