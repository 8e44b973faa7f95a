"""IFEval's verdicts are lm-eval's, seeded and bounded, and its four accuracies are what the paper's figure averages."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.errors import UserError
from hymba_tune.evaluation import ifeval
from hymba_tune.evaluation.engine import Engine

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[dict[str, Any]]:
    return ifeval.ifeval_rows(data_dir)


@pytest.mark.parametrize(
    ("model", "stable"),
    [
        ("Qwen__Qwen2.5-0.5B-Instruct-GPTQ-Int4", 547),
        ("Qwen__Qwen2.5-1.5B-Instruct-GPTQ-Int4", 546),
        ("Qwen__Qwen2.5-3B-Instruct-GPTQ-Int4", 543),
        ("deepseek-ai__deepseek-llm-7b-chat", 547),
        ("gpt4_20231107", 547),
        ("hugging-quants__Meta-Llama-3.1-8B-Instruct-AWQ-INT4", 546),
        ("mistralai__Mistral-7B-Instruct-v0.3", 546),
    ],
)
def test_every_stable_gold_instruction_gets_the_official_verdict(model, stable, rows, data_dir):
    gold = data_dir / "scoring_gold" / "ifeval" / f"{model}.public.jsonl"
    compared, disagreements = 0, []
    for answer in map(json.loads, gold.read_text(encoding="utf-8").splitlines()):
        ours = ifeval.check_answer(answer, answer["response"])
        for number, name in enumerate(answer["instruction_id_list"]):
            if answer["stable"][number]:
                compared += 1
                if any(ours[mode][number] != answer[mode][number] for mode in ifeval.MODES):
                    disagreements.append((answer["key"], name))
    assert compared == stable
    assert disagreements == []


def test_all_prompts_are_read(rows):
    assert len(rows) == 541
    assert sum(len(row["instruction_id_list"]) for row in rows) == 834


def test_a_verdict_is_the_same_every_time_and_leaves_random_alone(rows):
    (open_letter,) = (row for row in rows if row["key"] == 1122)
    state = random.getstate()
    verdicts = [ifeval.check_answer(open_letter, "Letters all over: aaabbbcccdddeee.") for _ in range(5)]
    assert verdicts == verdicts[:1] * 5
    assert random.getstate() == state


def prompt(name: str, **arguments: Any) -> dict[str, Any]:
    return {"key": 1, "prompt": "Write.", "instruction_id_list": [name], "kwargs": [arguments]}


def test_loose_forgives_a_first_line_and_asterisks():
    row = prompt("startend:quotation")
    assert ifeval.check_answer(row, '"All of it."') == {"strict": [True], "loose": [True]}
    assert ifeval.check_answer(row, 'Sure:\n"All of it."') == {"strict": [False], "loose": [True]}
    assert ifeval.check_answer(row, "") == {"strict": [False], "loose": [False]}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("detectable_format:json_format", "[" * 100_000),
        ("detectable_content:number_placeholders", "[" * 100_000),
        ("detectable_content:postscript", "a" + " " * 100_000 + "b"),
        ("detectable_format:number_bullet_lists", "a" + "\n" * 100_000 + "b"),
        ("punctuation:no_comma", "x" * 100_000),
        ("detectable_format:title", "\x00<b>" * 25_000),
        ("change_case:english_lowercase", "é" * 100_000),
    ],
)
def test_hostile_answers_are_checked_in_bounded_time(name, answer, capsys):
    began = time.process_time()
    verdict = ifeval.check_answer(prompt(name), answer)
    assert verdict.keys() == set(ifeval.MODES)
    assert time.process_time() - began < 30
    assert len(capsys.readouterr().err) < 1_000


def test_the_mean_is_that_of_the_four_accuracies():
    followed = [
        {"strict": [True, False, True], "loose": [True, True, True]},
        {"strict": [True], "loose": [True]},
        {"strict": [False, False], "loose": [False, True]},
    ]
    metrics = ifeval.aggregate(followed)
    values = {name: (metric.value, metric.n) for name, metric in metrics.items()}
    assert values == {
        "prompt_strict": (pytest.approx(1 / 3), 3),
        "instruction_strict": (pytest.approx(3 / 6), 6),
        "prompt_loose": (pytest.approx(2 / 3), 3),
        "instruction_loose": (pytest.approx(5 / 6), 6),
        "mean": (pytest.approx((1 / 3 + 1 / 2 + 2 / 3 + 5 / 6) / 4), 3),
    }
    assert all(metric.stderr for metric in metrics.values())


def test_a_model_is_asked_and_judged(rows, character_tokenizer, tiny_llama):
    engine = Engine(tiny_llama, character_tokenizer, max_new_tokens=8, max_length=512)
    chosen = [row for row in rows if len(row["prompt"]) < 200][:3]
    scores = ifeval.run_ifeval(engine, chosen, 2)
    assert [item["id"] for item in scores.items] == [f"ifeval/{row['key']}" for row in chosen[:2]]
    assert scores.items[0]["prompt"] == chosen[0]["prompt"].strip()
    assert set(scores.items[0]["verdict"]) == {"prompt_strict", "prompt_loose", "strict", "loose"}
    assert scores.metrics["mean"].n == 2


def write_prompts(folder: Path, row: dict[str, Any]) -> None:
    (folder / "ifeval").mkdir()
    (folder / "ifeval" / "input_data.jsonl").write_text(json.dumps(row))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"kwargs": []}, "as many kwargs"), ({"instruction_id_list": ["no:such"]}, "unknown instruction")],
)
def test_a_broken_prompt_is_refused(tmp_path, rows, change, complaint):
    write_prompts(tmp_path, prompt("punctuation:no_comma") | change)
    with pytest.raises(UserError, match=complaint):
        ifeval.ifeval_rows(tmp_path)


def test_without_the_sentence_model_it_is_not_run(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(BenchmarkNotFound, match="punkt_tab"):
        ifeval.ifeval_rows(tmp_path)
