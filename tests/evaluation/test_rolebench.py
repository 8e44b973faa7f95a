"""RoleBench's Rouge-L values are the published packages', and its parts are read, or reported as missing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.errors import UserError
from hymba_tune.evaluation import rolebench
from hymba_tune.evaluation.chat_task import ChatItem, Verdict
from hymba_tune.evaluation.rouge import rouge_l_f1, union_rouge_l


@pytest.mark.parametrize(
    ("gold", "task", "answers"),
    [
        ("eng_inst_gen_role_specific_SPE", "rolebench_instruction", 3353),
        ("eng_role_gen_role_specific_SPE", "rolebench_role", 348),
        ("zh_role_specific_SPE", "rolebench_zh", 165),
    ],
)
def test_every_gold_answer_gets_the_official_rouge(gold, task, answers, data_dir):
    lines = (data_dir / "scoring_gold" / "rolebench" / f"{gold}.public.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == answers
    for row in map(json.loads, lines):
        best = rolebench.score(task, row["prediction"], row["references"]).scores
        first = best
        if len(row["references"]) > 1:
            first = rolebench.score(task, row["prediction"], row["references"][:1]).scores
        assert abs(best["recall"] - row["rougeL_recall_max"]) <= 1e-6
        assert abs(first["recall"] - row["rougeL_recall_first"]) <= 1e-6
        if task != "rolebench_zh":
            assert abs(best["first_f1"] - row["rouge_score_rougeL_f_first"]) <= 1e-6


def test_rouge_by_hand():
    same = union_rouge_l("The cat sat. It slept", "The cat sat. It slept")
    assert (same.recall, same.precision) == (1.0, 1.0)
    half = union_rouge_l("the cat ran", "The cat sat down")  # case is kept: only "cat" is shared
    assert (half.recall, half.precision) == (pytest.approx(1 / 4), pytest.approx(1 / 3))
    swapped = union_rouge_l("b a", "a b")
    assert swapped.recall == 0.5  # one subsequence, not the words as a bag
    assert union_rouge_l("a. b", "a b c d").recall == 0.5  # the union over the answer's sentences
    assert union_rouge_l("", "a b").recall == 0.0
    assert rouge_l_f1("The CAT, ran", "the cat sat") == pytest.approx(2 / 3)
    assert rouge_l_f1("", "a") == 0.0


def test_chinese_is_compared_by_character_and_the_best_reference_counts():
    scores = rolebench.score("rolebench_zh", "我很好", ["你好", "我很好吗"]).scores
    assert scores["recall"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "answer", ["你" * 100_000, "the. " * 20_000, ". " * 50_000, "the a " * 17_000, "\x00" * 100_000]
)
@pytest.mark.parametrize("task", ["rolebench_role", "rolebench_zh"])
def test_hostile_answers_are_scored_in_bounded_time(task, answer):
    began = time.process_time()
    verdict = rolebench.score(task, answer, ["the a " * 150 if task == "rolebench_role" else "你好" * 150])
    assert all(0 <= score <= 1 for score in verdict.scores.values())
    assert "first 20000 characters" in verdict.why
    assert time.process_time() - began < 20


def write_part(folder: Path, task: str, part: str, rows: list[Any]) -> None:
    path = folder / "rolebench" / rolebench.FOLDERS[task] / rolebench.PARTS[part]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


QUESTION = {"role": "Sherlock", "question": "Who are you?", "generated": ["A detective.", "Holmes."]}


def test_parts_are_read_and_missing_ones_say_how_to_get_them(tmp_path):
    write_part(tmp_path, "rolebench_role", "cus", [QUESTION, QUESTION])
    rows = rolebench.rolebench_rows("rolebench_role", tmp_path)
    assert [row["id"] for row in rows] == ["cus-0", "cus-1"]
    missing = rolebench.missing_parts("rolebench_role", tmp_path)
    assert missing.keys() == {"raw", "spe"}
    assert "ZenMoore/RoleBench" in missing["spe"]
    assert "raw.jsonl" in missing["raw"]
    with pytest.raises(BenchmarkNotFound, match="role_specific"):
        rolebench.rolebench_rows("rolebench_zh", tmp_path)


def test_the_real_files_hold_these_parts(data_dir):
    counts = {}
    for task in rolebench.PROTOCOLS:
        rows = rolebench.rolebench_rows(task, data_dir)
        counts[task] = {part: sum(row["part"] == part for row in rows) for part in rolebench.PARTS}
    assert counts == {
        "rolebench_instruction": {"cus": 0, "raw": 0, "spe": 4750},
        "rolebench_role": {"cus": 5000, "raw": 0, "spe": 2534},
        "rolebench_zh": {"cus": 1451, "raw": 0, "spe": 239},
    }


@pytest.mark.parametrize(
    "row", [{"role": "A"}, QUESTION | {"generated": []}, QUESTION | {"generated": "text"}, QUESTION | {"role": 3}]
)
def test_a_broken_line_is_refused_with_its_place(tmp_path, row):
    write_part(tmp_path, "rolebench_role", "spe", [QUESTION, row])
    with pytest.raises(UserError, match=r"role_specific.test\.jsonl: item spe-1"):
        rolebench.rolebench_rows("rolebench_role", tmp_path)


def test_the_prompt_gives_the_role_and_its_profile_where_there_is_one(tmp_path):
    write_part(tmp_path, "rolebench_role", "spe", [QUESTION])
    (row,) = rolebench.rolebench_rows("rolebench_role", tmp_path)
    system, user = rolebench.prompt_messages("rolebench_role", row)
    assert system["content"].startswith("You are Sherlock. Now please answer")
    assert user == {"role": "user", "content": "Who are you?"}
    profiles = tmp_path / "rolebench" / "profiles-eng"
    profiles.mkdir()
    (profiles / "desc.json").write_text(json.dumps({"Sherlock": "A detective"}))
    (row,) = rolebench.rolebench_rows("rolebench_role", tmp_path)
    (system, _) = rolebench.prompt_messages("rolebench_role", row)
    assert system["content"].startswith("You are Sherlock, your description is: A detective. Now")
    (profiles / "desc.json").write_text("[]")
    with pytest.raises(UserError, match=r"desc\.json"):
        rolebench.rolebench_rows("rolebench_role", tmp_path)


def test_the_mean_of_the_parts_stands_only_where_all_three_ran():
    def metrics(parts: list[str]) -> dict[str, float]:
        items = [ChatItem(part, [], [], None, part) for part in parts]
        verdicts = [Verdict({"recall": number / 10, "f1": 0.0}, None, "") for number, _ in enumerate(parts, 1)]
        return {name: metric.value for name, metric in rolebench.aggregate(items, verdicts).items()}

    assert metrics(["cus", "spe"]) == {"cus": 0.1, "cus_f1": 0.0, "spe": 0.2, "spe_f1": 0.0}
    assert metrics(["cus", "raw", "spe"])["mean"] == pytest.approx(0.2)
