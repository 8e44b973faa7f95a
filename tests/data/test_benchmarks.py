"""Benchmark rows come whole and in order; what is missing or broken is named with its remedy."""

import json
import zipfile

import pytest

from hymba_tune.data.benchmarks import SOURCES, BenchmarkNotFound, benchmark_rows, data_folder
from hymba_tune.errors import UserError


@pytest.mark.parametrize(
    ("name", "split", "count"), [("gsm8k", "test", 1319), ("gsm8k", "train", 7473), ("ifeval", "test", 541)]
)
def test_the_real_files_hold_every_row(data_dir, name, split, count):
    assert len(benchmark_rows(name, split, data_dir)) == count


def test_mmlu_holds_57_subjects_in_hub_form(data_dir):
    test, dev = benchmark_rows("mmlu", "test", data_dir), benchmark_rows("mmlu", "dev", data_dir)
    assert (len(test), len(dev)) == (14042, 285)
    subjects = list(dict.fromkeys(row["subject"] for row in test))
    assert len(subjects) == 57
    assert subjects == sorted(subjects)
    assert test[0].keys() == {"question", "subject", "choices", "answer"}
    assert {row["answer"] for row in test} == {0, 1, 2, 3}


def test_a_broken_mmlu_row_is_named(tmp_path):
    (tmp_path / "mmlu").mkdir()
    with zipfile.ZipFile(tmp_path / "mmlu" / "mmlu.zip", "w") as archive:
        archive.writestr("data/test/anatomy_test.csv", "What?,a,b,c,d,A\nWhat?,a,b\n")
    with pytest.raises(UserError, match=r"anatomy_test\.csv:2: 3 cells"):
        benchmark_rows("mmlu", "test", tmp_path)
    (tmp_path / "mmlu" / "mmlu.zip").write_text("no archive")
    with pytest.raises(UserError, match=r"mmlu\.zip: File is not a zip file"):
        benchmark_rows("mmlu", "test", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_file_says_where_to_get_it(tmp_path, name):
    split = next(iter(SOURCES[name].files))
    with pytest.raises(BenchmarkNotFound, match=r"is missing; get it from .*\w"):
        benchmark_rows(name, split, tmp_path)


def test_without_a_folder_an_unreachable_hub_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*args: object, **settings: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.delenv("HYMBA_TUNE_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(BenchmarkNotFound, match=r"openai/gsm8k cannot be loaded \(no route to host\); .* eval\.data"):
        benchmark_rows("gsm8k", "test")


def test_the_environment_names_a_folder_or_the_parent_of_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HYMBA_TUNE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    (tmp_path / "data").mkdir()
    assert data_folder() == tmp_path / "data"
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"eval\.data: .*other is not a folder"):
        data_folder(other)


def test_a_line_that_is_not_an_object_is_named(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.write_text(json.dumps({"question": "a"}) + "\n\n[1]\n")
    with pytest.raises(UserError, match=r"test\.jsonl:3: list where an object is needed"):
        benchmark_rows("gsm8k", "test", tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"test\.jsonl:1: not JSON"):
        benchmark_rows("gsm8k", "test", tmp_path)
