"""Model cards: what the hub reads, what a reader sees, and nothing of the machine they were made on."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hymba_tune.report.card import lineage, model_card, write_card
from hymba_tune.run_dir import RunDir

METRIC = {"value": 0.5, "n": 100, "stderr": 0.05}


def make_run(path: Path, start: str, adapter: dict[str, Any] | None = None, name: str = "sft1") -> RunDir:
    """A finished run written by hand: two sources, one task."""
    run = RunDir(path)
    recipe = {
        "stage": path.name,
        "method": "sft",
        "model": {"from": start, "dtype": "auto"},
        "data": {"mix": "/home/me/secret/mix.yaml", "max_length": 512, "packing": "bfd", "too_long": "drop", "seed": 0},
        "adapter": adapter,
        "trainer": {"learning_rate": 1e-3, "save_steps": 10},
        "eval": {"suites": ["task"]},
        "output": {"dir": "/home/me/secret/run"},
    }
    sources = [
        {"source": name, "hub": f"owner/{name}", "licence": "MIT", "conversations": 1200, "tokens": 34567},
        {"source": "mine | <b>", "hub": None, "licence": None, "conversations": 3, "tokens": 40},
    ]
    item = {
        "id": "1",
        "prompt": "p",
        "answer": "a",
        "extracted": "a",
        "target": "a",
        "verdict": {"acc": 1.0},
        "why": "",
    }
    result = {
        "task": "task", "protocol": "task v1", "headline": "acc", "metrics": {"acc": METRIC}, "settings": {},
        "items": [item], "packages": {}, "seconds": 1.0, "tokens_per_second": 1.0, "cut_prompts": 0, "cut_answers": 0,
        "suspect": None, "not_run": None,
    }  # fmt: skip
    run.write_text(run.recipe, yaml.safe_dump(recipe))
    run.write_json(run.state, {"finished": ["data", "before", "training", "after"]})
    run.write_json(
        run.data, {"mix": "/home/me/secret/mix.yaml", "sources": sources, "dropped_too_long": 2, "truncated": 0}
    )
    run.write_json(run.evaluation("after") / "task.json", result)
    (run.adapter if adapter else run.model).mkdir()
    return run


def front_matter(card: str) -> dict[str, Any]:
    return ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def test_the_hub_reads_base_data_licence_and_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft1", "nvidia/Hymba-1.5B-Base", {"type": "dora", "r": 4})
    written = write_card(run.path)
    assert written == run.adapter / "README.md"
    matter = front_matter(written.read_text())
    assert matter == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["hymba", "hymba-tune", "sft", "dora"],
        "base_model": "nvidia/Hymba-1.5B-Base",
        "base_model_relation": "adapter",
        "datasets": ["owner/sft1"],
        "license": "other",
        "license_name": "nvidia-open-model-license",
        "license_link": matter["license_link"],
    }


def test_a_stage_names_the_base_and_the_data_of_all_stages_before_it(tmp_path: Path) -> None:
    make_run(tmp_path / "sft1", "nvidia/Hymba-1.5B-Base")
    last = make_run(tmp_path / "sft2", "stage:sft1", name="second")
    assert [stage["stage"] for stage in lineage(last.model)] == ["sft1", "sft2"]
    matter = front_matter(model_card(lineage(last.path), "model"))
    assert matter["base_model"] == "nvidia/Hymba-1.5B-Base"
    assert matter["base_model_relation"] == "finetune"
    assert matter["datasets"] == ["owner/sft1", "owner/second"]


def test_runs_that_start_from_each_other_end(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "stage:b")
    make_run(tmp_path / "b", "stage:a")
    assert [stage["stage"] for stage in lineage(tmp_path / "a")] == ["b", "a"]


def test_a_reader_sees_scores_licences_settings_and_limits(tmp_path: Path) -> None:
    card = model_card(lineage(make_run(tmp_path / "sft1", "tiny").path), "model", dtype="bfloat16")
    for text in (
        "| task | acc | 100 | – | 50.0 ± 5.0 |",
        "| sft1 | owner/sft1 | MIT | 1 200 | 34 567 |",
        "learning_rate: 0.001",
        "0 were cut and 2 left out",
        "these are rounded to bfloat16",
        "from_pretrained(",
    ):
        assert text in card


def test_a_card_shows_no_folder_of_the_machine_and_no_markup_of_others(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft1", str(tmp_path / "my-checkpoint"))
    card = model_card(lineage(run.path), "model")
    assert "secret" not in card
    assert str(tmp_path) not in card
    assert "the local checkpoint my-checkpoint" in card
    assert "| mine \\| &lt;b&gt; | files or a generator | not stated |" in card
    assert "base_model" not in front_matter(card)


def test_weights_of_unknown_origin_get_a_card_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert lineage(tmp_path / "weights") == []
    card = model_card([], "model", "me/mine", base="nvidia/Hymba-1.5B-Instruct")
    assert front_matter(card)["base_model"] == "nvidia/Hymba-1.5B-Instruct"
    assert 'from_pretrained("me/mine")' in card
    assert "is not recorded" in card


def test_a_run_without_weights_has_no_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft1", "tiny")
    run.model.rmdir()
    assert write_card(run.path) is None


@pytest.mark.parametrize("start", ["scratch", "tiny", "nvidia/Hymba-1.5B-Base"])
def test_every_start_gives_a_card_the_hub_can_read(tmp_path: Path, start: str) -> None:
    assert front_matter(model_card(lineage(make_run(tmp_path / "run", start).path), "model"))["tags"][0] == "hymba"
