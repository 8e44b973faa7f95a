"""A suite writes one result a task, reuses what is done, goes on where it was cut, and says what could not run."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import UserError
from hymba_tune.evaluation import cache, suite
from hymba_tune.evaluation.cache import PartCache
from hymba_tune.evaluation.catalogue import SUITES, TASKS, Task, find_tasks
from hymba_tune.evaluation.chat_task import ChatItem, Verdict, run_chat_task
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.gsm8k import gsm8k_splits, run_gsm8k
from hymba_tune.evaluation.suite import collect_shares, run_suite

pytest.importorskip("lm_eval")

NUMBERS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A GSM8K of ten training and six test questions."""
    folder = tmp_path / "data"
    (folder / "gsm8k").mkdir(parents=True)
    for split, count in (("train", 10), ("test", 6)):
        rows = [
            {"question": f"What is {n} plus {split}?", "answer": f"It is {n}+1 = <<{n}+1={n + 1}>>\n#### {n + 1}"}
            for n in NUMBERS[:count]
        ]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def gsm8k_result(model: Any, tokenizer: Any, out: Path, data: Path, **settings: Any) -> dict[str, Any]:
    [result] = run_suite(model, tokenizer, ["gsm8k"], out, data=data, max_new_tokens=12, **settings)
    return result


def test_gsm8k_runs_from_files_and_reports_every_item(tiny_hymba, character_tokenizer, data, tmp_path):
    result = gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "eval", data, limit=4)
    assert json.loads((tmp_path / "eval" / "gsm8k.json").read_text()) == result
    assert [item["id"] for item in result["items"]] == [f"gsm8k/test/{i}" for i in range(4)]
    assert [item["target"] for item in result["items"]] == ["4", "15", "16", "93"]
    assert set(result["metrics"]) == {"strict_match", "flexible_extract"}
    assert result["metrics"]["strict_match"]["n"] == 4
    assert result["settings"]["limit"] == 4
    assert (result["cut_answers"], result["cut_prompts"]) == (4, 0)
    assert result["not_run"] is None
    assert "torch" in result["packages"]


def test_the_prompt_is_five_worked_examples_as_turns(tiny_llama, character_tokenizer, data, monkeypatch):
    engine = Engine(tiny_llama, character_tokenizer, max_new_tokens=1)
    seen: list[list[dict[str, str]]] = []

    def render_chat(messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        seen.append(messages)
        return str(messages), [3]

    monkeypatch.setattr(engine, "render_chat", render_chat)
    for task in ("gsm8k", "gsm8k_upstream"):
        run_gsm8k(task, engine, gsm8k_splits(data), 1)
    ours, upstream = seen
    assert [message["role"] for message in ours] == ["user", "assistant"] * 5 + ["user"]
    assert ours[-1]["content"] == "Question: What is 3 plus test?\n"
    assert upstream[-1]["content"] == "Question: What is 3 plus test?\nAnswer:"
    assert ours[1]["content"].startswith("It is ")
    assert "#### " in ours[1]["content"]


def test_a_tokenizer_without_a_template_gets_plain_text(tiny_llama, character_tokenizer, data, monkeypatch):
    plain = copy.deepcopy(character_tokenizer)
    plain.chat_template = None
    engine = Engine(tiny_llama, plain, max_new_tokens=1)
    seen: list[str] = []

    def encode_text(text: str) -> list[int]:
        seen.append(text)
        return [3]

    monkeypatch.setattr(engine, "encode_text", encode_text)
    run_gsm8k("gsm8k", engine, gsm8k_splits(data), 1)
    assert seen[0].count("Question: ") == 6
    assert seen[0].endswith("Question: What is 3 plus test?\n")
    assert "[user]" not in seen[0]


def test_a_finished_task_is_reused_and_other_settings_are_not(
    tiny_hymba, character_tokenizer, data, tmp_path, monkeypatch
):
    out = tmp_path / "eval"
    first = gsm8k_result(tiny_hymba, character_tokenizer, out, data, limit=2)
    monkeypatch.setattr(type(tiny_hymba), "forward", lambda *args, **kwargs: pytest.fail("computed again"))
    assert gsm8k_result(tiny_hymba, character_tokenizer, out, data, limit=2) == first
    assert gsm8k_result(tiny_hymba, character_tokenizer, out, data, limit=1)["metrics"]["strict_match"]["n"] == 1
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        gsm8k_result(tiny_hymba, character_tokenizer, out, data, limit=3)


def test_a_cut_suite_goes_on_with_the_next_prompt(tiny_hymba, character_tokenizer, data, tmp_path):
    class Cut(Exception):
        pass

    def cut_after_two(task: str, done: int, total: int) -> None:
        if done == 2:
            raise Cut

    out = tmp_path / "eval"
    seen: list[int] = []
    with pytest.raises(Cut):
        gsm8k_result(tiny_hymba, character_tokenizer, out, data, progress=cut_after_two, batch_tokens=1)
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    resumed = gsm8k_result(
        tiny_hymba, character_tokenizer, out, data, progress=lambda task, done, total: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]
    fresh = gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "fresh", data)
    assert resumed["items"] == fresh["items"]
    assert len((out / "answers.jsonl").read_text().splitlines()) == 6


def shares_of_three(model: Any, tokenizer: Any, out: Path, data: Path, numbers: list[int]) -> list[Any]:
    """The results of those of three processes that come to their end, one after the other; each prompt is a batch."""
    collect_shares(out)
    return [
        run_suite(model, tokenizer, ["gsm8k"], out, data=data, max_new_tokens=12, batch_tokens=1, share=(number, 3))
        for number in numbers
    ]


def test_shares_together_are_the_results_of_one_process(tiny_hymba, character_tokenizer, data, tmp_path, monkeypatch):
    out = tmp_path / "eval"
    *others, [shared] = shares_of_three(tiny_hymba, character_tokenizer, out, data, [1, 2, 0])
    assert others == [[], []]
    lines = [len((out / f"answers-{number}.jsonl").read_text().splitlines()) for number in range(3)]
    assert lines == [2, 2, 2]
    collect_shares(out)
    with monkeypatch.context() as patched:
        patched.setattr(type(tiny_hymba), "forward", lambda *args, **kwargs: pytest.fail("computed again"))
        assert gsm8k_result(tiny_hymba, character_tokenizer, out, data) == shared
    alone = gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "alone", data, batch_tokens=1)
    clock = ("seconds", "tokens_per_second")
    assert shared.keys() == alone.keys()
    assert {k: v for k, v in shared.items() if k not in clock} == {k: v for k, v in alone.items() if k not in clock}
    assert min(shared[name] for name in clock) > 0
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "gsm8k.json"]
    sorted_lines = [sorted((folder / "answers.jsonl").read_text().splitlines()) for folder in (out, tmp_path / "alone")]
    assert sorted_lines[0] == sorted_lines[1]


def test_what_a_lost_process_left_is_shared_out_again(tiny_hymba, character_tokenizer, data, tmp_path):
    out = tmp_path / "eval"
    shares_of_three(tiny_hymba, character_tokenizer, out, data, [1, 2])
    with (out / "answers-2.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    shares_of_three(tiny_hymba, character_tokenizer, out, data, [1])
    assert len((out / "answers.jsonl").read_text().splitlines()) == 4
    assert len((out / "answers-1.jsonl").read_text().splitlines()) == 1  # the second of the two that were left
    resumed = gsm8k_result(tiny_hymba, character_tokenizer, out, data)
    assert resumed["items"] == gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "fresh", data)["items"]


def test_the_first_process_waits_for_what_the_others_answer(tmp_path, monkeypatch):
    parts = [tmp_path / f"answers-{number}.jsonl" for number in range(2)]
    first = PartCache(tmp_path / "answers.jsonl", parts, 0)
    first.put("a", 1)
    later = iter(
        [
            lambda: None,
            lambda: parts[1].write_text('{"key": "b", "answer": "\u00e9'),
            lambda: parts[1].write_text('{"key": "b", "answer": "\u00e9!"}\n{"key": "c", "answer": 3}\n'),
        ]
    )
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: next(later)())
    assert list(first.all_of(["c", "a", "b"])) == [{"a": 1}] * 3 + [{"c": 3, "a": 1, "b": "\u00e9!"}]
    assert first.get("b") is None  # so that all see the same requests unanswered


def test_batched_results_equal_one_prompt_at_a_time(tiny_hymba, character_tokenizer, data, tmp_path):
    together = gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "a", data, batch_tokens=100_000)
    alone = gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "b", data, batch_tokens=1)
    assert together["items"] == alone["items"]


def test_missing_data_is_not_run_and_says_how_to_get_it(tiny_hymba, character_tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    result = gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "eval", tmp_path / "empty")
    assert result["metrics"] == {}
    assert "grade-school-math" in result["not_run"]


def test_a_broken_line_names_file_and_line(tiny_hymba, character_tokenizer, data, tmp_path):
    with (data / "gsm8k" / "test.jsonl").open("a") as file:
        file.write('{"question": "cut o\n')
    with pytest.raises(UserError, match=r"test\.jsonl:7: not JSON"):
        gsm8k_result(tiny_hymba, character_tokenizer, tmp_path / "eval", data)


def test_an_unknown_task_is_refused(tiny_hymba, character_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no suite or task gsm9k; there are paper, .*gsm8k"):
        run_suite(tiny_hymba, character_tokenizer, ["gsm9k"], tmp_path)


def test_suites_and_tasks_mix_and_every_task_comes_once():
    assert list(find_tasks(["gsm8k", "paper", "mmlu"])) == ["gsm8k", "mmlu", "ifeval", "gpqa", "bfcl_v2"]
    assert all(name in TASKS for suite_tasks in SUITES.values() for name in suite_tasks)


HOSTILE = ["x" * 100_000, "<script>alert(1)</script>", "\x1b[31m\x00\x07 \u202eabc", "(" * 50_000, "\ud800"]


def test_hostile_answers_are_stored_as_they_are(tiny_hymba, character_tokenizer, tmp_path, monkeypatch):
    def hostile(engine, rows, limit):
        items = [ChatItem(str(i), [{"role": "user", "content": text}], text) for i, text in enumerate(rows)]
        monkeypatch.setattr(engine, "encode_chat", lambda messages, tools=None: [3])
        return run_chat_task(engine, items, lambda i, a: Verdict({"seen": 1.0}, i.target, i.target), max_new_tokens=1)

    monkeypatch.setitem(TASKS, "hostile", Task("hostile v1", "seen", lambda data: HOSTILE, hostile))
    [result] = run_suite(tiny_hymba, character_tokenizer, ["hostile"], tmp_path)
    kept = json.loads((tmp_path / "hostile.json").read_text())
    assert [item["extracted"] for item in kept["items"]] == HOSTILE
    assert suite.read_result(tmp_path / "hostile.json") == result
