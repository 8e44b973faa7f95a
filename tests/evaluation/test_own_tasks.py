"""A user's own tasks: a JSONL file with a scorer, an lm-eval YAML file; both are data, checked before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import UserError
from hymba_tune.evaluation.catalogue import find_tasks
from hymba_tune.evaluation.suite import run_suite

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "What is 1 + 1?", "target": "2", "group": "sums"},
    {"prompt": "Name a colour.", "target": ["red", "blue"], "id": "colour"},
    {"messages": [{"role": "user", "content": "Say hi."}], "target": "hi", "system": "ignored", "extra": 1},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "mine.jsonl", QUESTIONS)


def test_a_jsonl_with_a_scorer_is_a_task(tiny_hymba, character_tokenizer, questions, tmp_path):
    [result] = run_suite(
        tiny_hymba, character_tokenizer, [f"{questions}:contains"], tmp_path / "eval", max_new_tokens=8
    )
    assert json.loads((tmp_path / "eval" / "mine.json").read_text()) == result
    assert [item["id"] for item in result["items"]] == ["1", "colour", "3"]
    assert result["headline"] == "exact_match"
    assert result["metrics"]["exact_match"]["n"] == 3
    assert result["metrics"]["exact_match/sums"]["n"] == 1
    assert result["protocol"].startswith("mine.jsonl, scorer contains")


def test_the_files_content_decides_whether_a_result_stands(tiny_hymba, character_tokenizer, questions, tmp_path):
    def items() -> list[str]:
        [result] = run_suite(tiny_hymba, character_tokenizer, [f"{questions}:exact"], tmp_path / "e", max_new_tokens=2)
        return [item["id"] for item in result["items"]]

    assert items() == ["1", "colour", "3"]
    write_lines(questions, QUESTIONS[1:])
    assert items() == ["colour", "2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": "x"}, "item 1: needs prompt"),
        ({"prompt": "q"}, "item 1: target needs a text"),
        ({"prompt": "q", "target": "many"}, "item 1: target 'many' is no number"),
        ({"prompt": ["q"], "target": "1"}, "item 1: needs prompt"),
        ({"messages": [{"role": "boss", "content": "q"}], "target": "1"}, "item 1: a message needs a role"),
        ({"messages": [{"role": "assistant", "content": "q"}], "target": "1"}, "not the user's"),
        ({"prompt": "q", "target": "1", "tools": "f"}, "tools needs a list"),
        ([1], "list where an object is needed"),
    ],
)
def test_an_item_that_cannot_be_asked_or_scored_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "mine.jsonl", [row])
    with pytest.raises(UserError, match=message):
        find_tasks([f"{path}:number"])


def test_names_of_files_and_scorers_are_checked(tmp_path, questions):
    for name, message in (
        (str(questions), f"write {questions}:SCORER with one of exact, contains"),
        (f"{questions}:magic", "no scorer magic"),
        (f"{tmp_path}/none.jsonl:exact", r"no file .*none\.jsonl"),
        (f"{tmp_path}/none.yaml", r"no file .*none\.yaml"),
    ):
        with pytest.raises(UserError, match=message):
            find_tasks([name])
    empty, twice = tmp_path / "empty.jsonl", tmp_path / "twice.jsonl"
    empty.write_text("\n")
    write_lines(twice, [{"id": "a", "prompt": "q", "target": "1"}] * 2)
    with pytest.raises(UserError, match="no items"):
        find_tasks([f"{empty}:exact"])
    with pytest.raises(UserError, match="two items have the id 'a'"):
        find_tasks([f"{twice}:exact"])
    with pytest.raises(UserError, match="there is a task gsm8k already"):
        find_tasks([f"{write_lines(tmp_path / 'gsm8k.jsonl', QUESTIONS)}:exact"])


CHOICES = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: shots.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list:
  - metric: acc
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ANSWERS = """\
include: shared.yaml
task: sums
num_fewshot: 0
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6}
filter_list:
  - name: last-number
    filter: [{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}, {function: take_first}]
"""
SHARED = """\
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{n} + 1?", "answer": n + 1, "choices": ["red", "blue"], "right": n % 2} for n in range(5)]
    for name, text in (("colours", CHOICES), ("sums", ANSWERS), ("shared", SHARED)):
        (tmp_path / f"{name}.yaml").write_text(text)
    write_lines(tmp_path / "rows.jsonl", rows)
    write_lines(tmp_path / "shots.jsonl", rows)
    return tmp_path


@pytest.fixture(autouse=True)
def hub_cache_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_an_lm_eval_task_is_run_as_lm_eval_runs_it(tiny_llama, character_tokenizer, folder, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = run_suite(
        tiny_llama, character_tokenizer, [str(folder / "colours.yaml"), str(folder / "sums.yaml")], tmp_path / "eval"
    )
    for name in ("colours", "shared"):  # lm-eval reads data files relative to the working directory
        path = folder / f"{name}.yaml"
        path.write_text(path.read_text().replace("rows.jsonl", str(folder / "rows.jsonl")))
        path.write_text(path.read_text().replace("shots.jsonl", str(folder / "shots.jsonl")))
    theirs = simple_evaluate(
        model=HFLM(
            pretrained=tiny_llama, tokenizer=character_tokenizer, batch_size=1, add_bos_token=False, device="cpu"
        ),
        tasks=["colours", "sums"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    for result, name, metrics in zip(
        ours,
        ("colours", "sums"),
        ({"acc": "acc,none", "acc_norm": "acc_norm,none"}, {"exact_match_last_number": "exact_match,last-number"}),
        strict=True,
    ):
        assert result["task"] == name
        assert result["headline"] == next(iter(metrics))
        logged = {entry["doc_id"]: entry for entry in theirs["samples"][name]}
        for metric, official in metrics.items():
            assert result["metrics"][metric]["value"] == pytest.approx(theirs["results"][name][official])
        for number, item in enumerate(result["items"]):
            responses = [response[0] for response in logged[number]["resps"]]
            if name == "sums":
                assert item["answer"] == responses[0]
            else:
                logprobs = [float(pair[0]) for pair in responses]
                assert item["extracted"] == ["red", "blue"][logprobs.index(max(logprobs))]


def test_a_limit_takes_the_first_rows(tiny_llama, character_tokenizer, folder, tmp_path):
    [result] = run_suite(tiny_llama, character_tokenizer, [str(folder / "sums.yaml")], tmp_path / "eval", limit=2)
    assert [item["id"] for item in result["items"]] == ["sums/0", "sums/1"]
    assert [item["target"] for item in result["items"]] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("process_docs: !function utils.f", r"shared\.yaml:\d+: !function runs code"),
        ("unsafe_code: true", "unsafe_code: runs code"),
        ("output_type: loglikelihood_rolling", "output_type: loglikelihood_rolling: only"),
        ("metric_list: [{metric: bleu}]", "metric_list: bleu: only means"),
        ("metric_list: [{metric: exact_match, aggregation: median}]", "metric_list: exact_match: only means"),
        ("test_split: null", "test_split: missing"),
        ("dataset_path: null", "dataset_path: missing"),
        ("task: [a, b]", "task: needs the name of one task"),
        ("include: shared.yaml", "end the circle"),
        ("a: [", "not YAML"),
    ],
)
def test_what_would_run_code_or_has_no_score_an_item_is_refused(folder, change, message):
    path = folder / "shared.yaml"
    path.write_text(f"task: x\n{SHARED}")
    key = change.split(":")[0]
    kept = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, change]) + "\n")
    with pytest.raises(UserError, match=message):
        find_tasks([str(path)])


def test_a_local_file_that_is_not_there_is_refused_and_a_hub_that_is_not_there_is_not_run(
    tiny_llama, character_tokenizer, folder, tmp_path, monkeypatch
):
    (folder / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"sums\.yaml: split test of json cannot be loaded"):
        run_suite(tiny_llama, character_tokenizer, [str(folder / "sums.yaml")], tmp_path / "eval")
    path = folder / "shared.yaml"
    path.write_text(SHARED.replace("dataset_path: json", "dataset_path: someone/something"))

    def unreachable(*args: object, **settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    [result] = run_suite(tiny_llama, character_tokenizer, [str(folder / "sums.yaml")], tmp_path / "eval")
    assert "someone/something cannot be loaded (no route to host)" in result["not_run"]
