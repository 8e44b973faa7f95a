"""MMLU and GPQA: prompts and choices of the protocol, the likeliest choice, no GPQA text in results."""

import json
import random
from typing import Any

import pytest

from hymba_tune.evaluation import gpqa, mmlu
from hymba_tune.evaluation.engine import Engine

pytest.importorskip("lm_eval")


def question(subject: str, number: int) -> dict[str, Any]:
    return {
        "question": f" Question {number} of {subject}? ",
        "subject": subject,
        "choices": [f"{letter}{number}" for letter in "wxyz"],
        "answer": number % 4,
    }


SUBJECTS = ["anatomy", "world_religions"]
SPLITS = {
    "dev": [question(subject, 10 + i) for subject in SUBJECTS for i in range(6)],
    "test": [question(subject, i) for subject, count in zip(SUBJECTS, (4, 2), strict=True) for i in range(count)],
}


@pytest.fixture
def engine(tiny_llama, character_tokenizer):
    return Engine(tiny_llama, character_tokenizer, max_length=4096)


def test_mmlu_asks_the_likelihood_of_four_letters_after_five_shots(engine, monkeypatch):
    chats: list[list[dict[str, str]]] = []
    asked: list[tuple[list[int], list[int]]] = []

    def render_chat(messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        chats.append(messages)
        return Engine.render_chat(engine, messages)

    def loglikelihood(requests: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        asked.extend(requests)
        return [(float(-(i % 4)), False) for i in range(len(requests))]

    monkeypatch.setattr(engine, "render_chat", render_chat)
    monkeypatch.setattr(engine, "loglikelihood", loglikelihood)
    scores = mmlu.run_mmlu("mmlu", engine, SPLITS, None)
    assert [message["role"] for message in chats[0]] == ["system", *["user", "assistant"] * 5, "user"]
    assert chats[0][0]["content"].startswith(
        "The following are multiple choice questions (with answers) about anatomy."
    )
    assert chats[0][1]["content"] == "Question 10 of anatomy?\nA. w10\nB. x10\nC. y10\nD. z10\nAnswer:"
    assert chats[0][2]["content"].strip() == "C"
    decoded = [engine.tokenizer.decode(continuation) for _, continuation in asked[:4]]
    assert decoded == ["\n A", "\n B", "\n C", "\n D"]
    assert [item["extracted"] for item in scores.items[:4]] == ["A"] * 4
    assert scores.items[0]["verdict"] == {"acc": 1.0}
    assert scores.items[1]["verdict"] == {"acc": 0.0}


def test_mmlu_counts_every_question_once_and_every_subject_apart(engine):
    scores = mmlu.run_mmlu("mmlu_upstream", engine, SPLITS, None)
    assert scores.metrics["acc"].n == 6
    parts = {name: metric for name, metric in scores.metrics.items() if name != "acc"}
    assert {name: metric.n for name, metric in parts.items()} == {"acc/anatomy": 4, "acc/world_religions": 2}
    weighted = sum(metric.value * metric.n for metric in parts.values()) / 6
    assert scores.metrics["acc"].value == pytest.approx(weighted)


def test_a_limit_takes_the_subjects_in_turn(engine):
    scores = mmlu.run_mmlu("mmlu", engine, SPLITS, 3)
    assert {item["id"] for item in scores.items} == {
        "mmlu/anatomy/0",
        "mmlu/world_religions/0",
        "mmlu/anatomy/1",
    }


def gpqa_row(number: int) -> dict[str, str]:
    wrong = {f"Incorrect Answer {i}": f" wrong{i} [note] of  {number} " for i in (1, 2, 3)}
    return {"Question": f"A secret question {number}", "Correct Answer": f"right {number} [title]so", **wrong}


def test_gpqa_choices_are_tidied_and_shuffled_with_one_seeded_generator():
    rng, again = random.Random(0), random.Random(0)
    rows = [gpqa.shuffled(gpqa_row(i), rng) for i in range(20)]
    for number, row in enumerate(rows):
        expected = [f"wrong1  of {number}", f"wrong2  of {number}", f"wrong3  of {number}", f"right {number}. so"]
        expected = [text.replace("  ", " ", 1) if "wrong" in text else text for text in expected]
        again.shuffle(expected)
        choices = [row[f"choice{i}"] for i in range(1, 5)]
        assert choices[row["answer"]] == f"right {number}. so"
        assert [c.split()[0] for c in choices] == [e.split()[0] for e in expected]


def test_gpqa_results_show_no_question(engine):
    rng = random.Random(0)
    scores = gpqa.run_gpqa(engine, [gpqa.shuffled(gpqa_row(i), rng) for i in range(5)], 4)
    assert scores.metrics["acc"].n == 4
    assert {item["target"] for item in scores.items} <= set(gpqa.LETTERS)
    text = json.dumps(scores.items)
    assert "secret" not in text
    assert "right 0" not in text
