"""The pages: self-contained, harmless, and readable in a browser at three sizes, light and dark."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.report_size import make_pipeline
from hymba_tune.errors import UserError
from hymba_tune.report.compare import compare, write_comparison
from hymba_tune.report.render import rebuild, write_report


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_a_stage_page_has_no_script_and_loads_nothing(finished: Path) -> None:
    write_report(finished)
    page = (finished / "report.html").read_text()
    tags = Tags(page).tags
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    links = [attributes[name] for _, attributes in tags for name in ("href", "src", "xlink:href") if name in attributes]
    assert all(link is not None and link.startswith("#") for link in links)
    assert "default-src 'none'" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_a_page_answers_better_trusted_cost_and_source_first(finished: Path) -> None:
    write_report(finished)
    page = (finished / "report.html").read_text()
    answers = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    assert [question for question, _ in answers] == [
        "Did it get better?",
        "Can I trust it?",
        "What did it cost?",
        "What did it learn from?",
    ]
    assert answers[2][1] == "3 min 20 s of training"
    assert answers[3][1] == "1 000 conversations"


def test_a_megabyte_of_any_text_stays_small_and_is_text(finished: Path) -> None:
    path = finished / "eval" / "after" / "gsm8k.json"
    result = json.loads(path.read_text())
    for item in result["items"]:
        item["answer"] = "\u202e</pre><script>" * 60_000 + "\x00\x1b[2J"
    path.write_text(json.dumps(result))
    write_report(finished)
    page = (finished / "report.html").read_text()
    assert len(page) < 200_000
    assert "<script" not in page
    assert not re.search("[\x00\x1b\u202e]", page)


def test_a_pipeline_compares_each_stage_with_the_one_before(pipeline: Path) -> None:
    text = write_report(pipeline).read_text()
    results = json.loads((pipeline / "results.json").read_text())
    base, first, second = results["headline"]["rows"]
    assert [row["name"] for row in (base, first, second)] == ["base", "sft1", "sft2"]
    assert base["cells"][0]["metric"]["value"] == 0.25
    assert first["cells"][0]["change"]["value"] == 0.5
    assert second["cells"] == [None]
    assert "Hymba-1.5B-Instruct, published | 58.8 |" in text
    assert "**Unfinished**: sft2, dpo still to come" in text
    assert "sft2: loss 0 &lt;b&gt; (at training 3)" in text
    changes = results["stages"][1]["parent"]["changes"]
    assert {"key": "trainer.learning_rate", "old": 0.002, "new": 0.001} in changes
    assert {row["key"] for row in results["stages"][0]["paper"]} >= {"trainer.learning_rate", "trainer.global_batch"}


def test_a_regression_is_marked_in_words(pipeline: Path) -> None:
    after = pipeline / "sft1" / "eval" / "after" / "gsm8k.json"
    result = json.loads(after.read_text())
    before = json.loads((pipeline / "sft1" / "eval" / "before" / "gsm8k.json").read_text())
    for moment, value in ((before, 1.0), (result, 0.0)):
        for index, item in enumerate(moment["items"]):
            item["verdict"]["strict_match"] = value if index else 0.5
        moment["metrics"]["strict_match"] = {"value": (0.5 + 7 * value) / 8, "n": 8, "stderr": 0.06}
    after.write_text(json.dumps(result))
    (pipeline / "sft1" / "eval" / "before" / "gsm8k.json").write_text(json.dumps(before))
    assert "worse)" in write_report(pipeline).read_text()
    assert "▼ worse" in (pipeline / "report.html").read_text()


def test_runs_are_compared_with_the_first(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([pipeline])
    shown = capsys.readouterr().out
    assert "trainer.learning_rate: 0.002 -> 0.001" in shown
    page = write_comparison([pipeline / "sft1", pipeline / "sft2"], tmp_path / "comparison.html").read_text()
    assert "Settings that differ from sft1" in page


def test_a_pipeline_is_rebuilt_with_its_stages_from_files_alone(pipeline: Path) -> None:
    (pipeline / "pipeline.json").unlink()
    rebuild(pipeline)
    assert (pipeline / "sft2" / "report.html").exists()
    assert json.loads((pipeline / "results.json").read_text())["planned"] == ["sft1", "sft2"]


def test_a_broken_recipe_is_named(pipeline: Path) -> None:
    (pipeline / "sft2" / "recipe.yaml").write_text("stage: [")
    with pytest.raises(UserError, match=r"recipe\.yaml: not valid YAML"):
        rebuild(pipeline)


def test_the_same_results_give_the_same_page(finished: Path) -> None:
    write_report(finished)
    first = (finished / "report.html").read_bytes()
    write_report(finished)
    assert (finished / "report.html").read_bytes() == first


def test_a_page_of_five_stages_and_six_suites_is_small(tmp_path: Path) -> None:
    folder = make_pipeline(tmp_path / "pipeline")
    write_report(folder)
    page = folder / "report.html"
    assert page.stat().st_size < 3_000_000
    assert page.read_text().count("<svg") == 5 * 5 + 1
