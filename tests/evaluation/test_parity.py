"""`python -m benchmarks.parity`: agreement ends with 0, a disagreement with 1, a broken gold file with 2."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parity

pytest.importorskip("lm_eval")

GOLD: dict[str, Any] = {
    "doc_id": 0,
    "system": "a",
    "variant": "b",
    "response": "It is 4.\n#### 4",
    "strict_filtered": "4",
    "strict_match": 1.0,
    "flexible_filtered": "4",
    "flexible_extract": 1.0,
}


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command writes; its folder is `tmp_path`, with one question and one gold answer."""
    for name, lines in (
        ("gsm8k/test.jsonl", [{"question": "What is 2 + 2?", "answer": "#### 4"}]),
        ("scoring_gold/gsm8k/gold.public.jsonl", [GOLD]),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written: dict[str, Any] = {}
    monkeypatch.setenv("HYMBA_TUNE_DATA", str(tmp_path))
    monkeypatch.setattr(parity, "write_result", lambda name, value: written.update(value))
    return written


def test_agreement_is_counted(figures, capsys):
    assert parity.main() == 0
    assert figures["gsm8k"]["gold"].pop("seconds") > 0
    assert figures["gsm8k"]["gold"] == {"answers": 1, "compared": 2, "disagreements": []}
    assert capsys.readouterr().out == "2 verdicts compared on 1 answers, 0 disagreements\n"


def test_a_disagreement_is_listed_with_both_verdicts(figures, tmp_path):
    gold = GOLD | {"flexible_filtered": "5", "flexible_extract": 0.0}
    (tmp_path / "scoring_gold" / "gsm8k" / "gold.public.jsonl").write_text(json.dumps(gold))
    assert parity.main() == 1
    (found,) = figures["gsm8k"]["gold"]["disagreements"]
    assert found == {"item": "0 a b flexible-extract", "ours": ("4", 1.0), "official": ("5", 0.0)}


def test_a_broken_gold_line_is_named(figures, tmp_path, capsys):
    with (tmp_path / "scoring_gold" / "gsm8k" / "gold.public.jsonl").open("a") as file:
        file.write('{"doc_id": 0, "res\n')
    assert parity.main() == 2
    assert "gold.public.jsonl:2: not JSON" in capsys.readouterr().err
    assert figures == {}
