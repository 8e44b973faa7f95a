"""`watch` says how far a run is from its metrics alone, and shows what models wrote without harm."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hymba_tune.errors import UserError
from hymba_tune.report.collect import metric_lines
from hymba_tune.report.watch import last_answers, summary, watch

LINE = {"max_steps": 100, "epoch": 0.1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 50.0}


def write_metrics(path: Path, steps: int) -> None:
    lines = [LINE | {"step": i, "tokens": 100 * i, "seconds": 2.0 * i} for i in range(1, steps + 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')


def shown(path: Path, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    watch(path, once=True, console=console)
    return console.export_text()


def test_rate_and_time_left_come_from_the_last_lines(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 40)
    assert summary(metric_lines(tmp_path / "metrics.jsonl")) == "step 40 of 100, loss 2, 50 tokens/s, 2 min 00 s left"


def test_a_run_that_is_over_says_so_and_one_that_has_not_begun(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 100)
    assert summary(metric_lines(tmp_path / "metrics.jsonl")).endswith("done in 3 min 20 s")
    watch(tmp_path)  # ends by itself
    assert summary([]) == "no step has been logged yet"


@pytest.mark.parametrize("width", [60, 120])
def test_the_metrics_file_alone_gives_four_curves_that_fit(tmp_path: Path, width: int) -> None:
    write_metrics(tmp_path / "copied.jsonl", 40)
    text = shown(tmp_path / "copied.jsonl", width)
    for title in ("loss", "learning rate", "gradient norm", "tokens/s"):
        assert title in text
    assert max(map(len, text.splitlines())) <= width


def test_a_loss_that_is_no_number_leaves_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 3)
    path.write_text(path.read_text().replace('"loss": 2.0', '"loss": NaN'))
    assert "loss –" in shown(path, 80)


def test_answers_are_shown_short_and_without_controls(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 3)
    folder = tmp_path / "eval" / "after"
    folder.mkdir(parents=True)
    texts = ["old", "\x1b[2J\u202e[red]x[/red]" + "a" * 1_000_000, 0.5]
    lines = [json.dumps({"key": "k", "answer": {"text": text}}) for text in texts]
    (folder / "answers.jsonl").write_text("\n".join([lines[0], *lines[:2]]) + "\n")
    answers = last_answers(tmp_path)
    assert answers[0] == "old"
    assert answers[1].startswith("␛[2J⟨U+202E⟩[red]x[/red]aaa")
    assert len(answers[1]) < 500
    assert "[red]x[/red]" in shown(tmp_path, 100)
    (folder / "answers.jsonl").write_text(lines[2] + '\n{"key": "cut')
    assert last_answers(tmp_path) == []


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        watch(tmp_path, once=True)
