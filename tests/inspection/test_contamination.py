"""`data check` lists overlaps as text that cannot act, says what was not compared, and writes a file when asked."""

import json

import pytest
from rich.console import Console

from hymba_tune.errors import UserError
from hymba_tune.inspection.contamination import SHOWN, check_mix

QUESTION = "How many [bold]apples[/] \x1b[31m does Ann keep if she gives three of her nine apples to Ben?"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """One GSM8K question, and a mix with it in every conversation but the first."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "6"}) + "\n")
    texts = ["Hello there.", *[QUESTION] * (SHOWN + 1)]
    rows = [{"question": text, "answer": "Six."} for text in texts]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = "sources:\n  chats: {path: chats.jsonl, map: {user: question, assistant: answer}}\n"
    (tmp_path / "mix.yaml").write_text(mix)
    return tmp_path


def test_overlaps_are_listed_and_written(data):
    console = Console(width=200, record=True, file=(data / "shown").open("w"))
    check_mix(str(data / "mix.yaml"), data=data / "data", out=data / "all.json", console=console)
    shown = console.export_text()
    assert f"{SHOWN + 1} of {SHOWN + 2} conversations repeat a test item" in shown
    assert "and 1 more overlaps" in shown
    assert "gsm8k" in shown
    assert "\x1b" not in shown
    assert "not compared with mmlu" in shown
    record = json.loads((data / "all.json").read_text())
    assert (record["dropped"], len(record["hits"])) == (SHOWN + 1, SHOWN + 1)


def test_without_any_benchmark_there_is_nothing_to_say(data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no benchmark's test items are here to compare with: gsm8k: "):
        check_mix(str(data / "mix.yaml"), data=tmp_path / "empty")
