"""Which edits make a run another run."""

import shutil
from pathlib import Path

import pytest

from hymba_tune import code_version


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that a test may edit."""
    copy = tmp_path / "hymba_tune"
    shutil.copytree(code_version.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_version, "PACKAGE", copy)
    return copy


def code(method: str = "sft") -> dict[str, str]:
    return code_version.weights_code.__wrapped__(method)


@pytest.mark.parametrize("name", ["training/sft.py", "training/trainer.py", "data/packing.py", "model/ops/cpu_scan.py"])
def test_an_edit_of_what_decides_weights_counts_and_one_of_its_comments_does_not(package: Path, name: str) -> None:
    before, file = code(), package / name
    text = file.read_text()
    file.write_text(text.replace('"""', '"""Another word. ', 1) + "\n# a comment\n")
    assert code() == before
    file.write_text(text + "\nanything = 1\n")
    assert {key for key, value in code().items() if before[key] != value} == {name}


@pytest.mark.parametrize("name", ["cli.py", "report/render.py", "evaluation/suite.py", "training/callbacks.py"])
def test_an_edit_of_what_only_shows_or_scores_does_not_count(package: Path, name: str) -> None:
    before = code()
    (package / name).write_text("anything = 1\n")
    assert code() == before


def test_a_method_does_not_depend_on_the_code_of_another(package: Path) -> None:
    before = code("sft"), code("dpo")
    (package / "training" / "dpo.py").write_text("anything = 1\n")
    assert code("sft") == before[0]
    assert code("dpo") != before[1]


def test_kernels_and_the_chat_template_count() -> None:
    assert {"data/chat_template.jinja", "model/ops/cpu_kernels/kernels.c", "version"} <= code().keys()
