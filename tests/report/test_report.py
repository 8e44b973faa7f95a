"""A report says what the files say, at any point of a run, and nothing a model wrote can break it.

The golden report is made again by: python -m pytest tests/report --make-golden
"""

import json
import math
from pathlib import Path

import pytest

from hymba_tune.errors import UserError
from hymba_tune.report.collect import collect
from hymba_tune.report.render import render_markdown, write_report
from hymba_tune.report.text import fenced, inline, shortened, visible

GOLDEN = Path(__file__).with_name("golden")


def test_the_golden_results_render_to_the_golden_report(finished, request):
    if request.config.getoption("--make-golden", default=False):
        write_report(finished)
        for name in ("results.json", "report.md"):
            (GOLDEN / name).write_text((finished / name).read_text())
    results = json.loads((GOLDEN / "results.json").read_text())
    assert render_markdown(results) == (GOLDEN / "report.md").read_text()
    assert collect(finished) == results


def test_scores_carry_both_moments_and_the_paired_error_of_their_difference(finished):
    first, second, third = collect(finished)["scores"]
    assert (first["metric"], first["headline"], second["metric"]) == ("strict_match", True, "flexible_extract")
    assert (first["before"]["value"], first["after"]["value"]) == (0.25, 0.75)
    differences = [1, -1, 1, 1, 1, 1, 0, 0]
    mean = sum(differences) / 8
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 7)
    assert first["change"] == {"value": 0.5, "stderr": pytest.approx(spread / math.sqrt(8))}
    assert first["notes"] == [
        "before: 3 answers reached the token limit instead of ending",
        "after: suspect: 3 of 8 answers are empty: check the chat template",
        "after: 3 answers reached the token limit instead of ending",
    ]
    assert third["metric"] is None
    assert third["notes"][0] == "after: not run: gpqa: data missing; ask its authors"


def test_samples_are_what_changed_then_the_best_and_the_worst(finished):
    samples = collect(finished)["samples"]["gsm8k"]
    kinds = [(sample["kind"], sample["id"].rsplit("/")[-1]) for sample in samples]
    assert kinds == [
        ("improved", "0"),
        ("improved", "2"),
        ("worsened", "1"),
        ("best", "3"),
        ("best", "4"),
        ("worst", "7"),
    ]


def test_a_run_that_was_cut_off_has_a_report(begun):
    report = write_report(begun).read_text()
    assert "**Unfinished**: training, after still to come." in report
    assert "400 steps" in report
    assert collect(begun)["training"]["steps"] == 400


def test_a_loss_that_is_no_number_is_reported(begun):
    with (begun / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "epoch": 0.1, "loss": 2.0}\n{"step": 2, "epoch": 0.2, "loss": NaN}\n')
    assert "not a finite number from step 2 on" in write_report(begun).read_text()


def test_an_empty_folder_has_a_report(tmp_path):
    report = write_report(tmp_path).read_text()
    assert "Not begun." in report
    assert "Not prepared yet." in report


def test_a_broken_result_file_is_named(finished):
    path = finished / "eval" / "after" / "gsm8k.json"
    path.write_text('{"task": ')
    with pytest.raises(UserError, match=r"gsm8k\.json"):
        write_report(finished)


def test_hostile_text_stays_inside_its_block(finished):
    report = write_report(finished).read_text()
    assert "\x1b" not in report
    assert "\u202e" not in report
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if "<script>" in line)
    assert lines[start - 1] == "````text"
    assert "a\\|b" in report


def test_invisible_characters_are_written_out():
    assert visible("a\x1b[0m\x00\x7f\u202e\u200b\ufeff\ud800\u0085b\n\tc") == (
        "a␛[0m␀␡⟨U+202E⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+D800⟩⟨U+0085⟩b\n\tc"
    )


def test_inline_text_is_one_line_without_markup():
    assert inline("a | b\n*c* <b>") == r"a \| b \*c\* &lt;b&gt;"


def test_a_fence_is_longer_than_any_in_the_text():
    assert fenced("a ```` b").startswith("`````text\n")


def test_long_text_keeps_its_beginning_and_end():
    text = shortened("a" * 999_000 + "END", 100)
    assert text.startswith("aaaa")
    assert text.endswith("END")
    assert "[998903 characters]" in text
