"""The stage graph: order, hand-off of weights and adapters, what is skipped and what runs anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hymba_tune.errors import UserError
from hymba_tune.pipeline import load_pipeline, run_pipeline
from hymba_tune.run_dir import RunDir
from hymba_tune.weights import Weights, find_weights, load_weights, stage_weights
from tests.test_stage import recipe_file  # noqa: F401  (a fixture)

ADAPTER = {"type": "dora", "r": 2, "alpha": 4}
IDS = torch.arange(4, 14)[None]


def write(folder: Path, name: str, **values: Any) -> None:
    """A stage's recipe on top of the one that goes all the way, two steps long."""
    short = {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
    recipe = {"extends": "recipe.yaml", "stage": name, "trainer": short, "eval": {"suites": []}, **values}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def after(parent: str, **values: Any) -> dict[str, Any]:
    return {"from": f"stage:{parent}", "config": None, "tokenizer": None, **values}


@pytest.fixture
def file(recipe_file: Path) -> Path:  # noqa: F811
    folder = recipe_file.parent
    write(folder, "first")
    write(folder, "second", model=after("first"), adapter=ADAPTER)
    write(folder, "third", model=after("second", handoff="merge"))
    path = folder / "pipeline.yaml"
    path.write_text(
        yaml.safe_dump({"stages": ["third.yaml", "second.yaml", "first.yaml"], "output": {"dir": str(folder / "runs")}})
    )
    return path


def started(runs: list[RunDir]) -> list[int]:
    return [run.metrics.stat().st_mtime_ns for run in runs]


def test_stages_run_in_the_order_of_their_arrows_and_only_once(file: Path) -> None:
    pipeline = load_pipeline(file)
    assert [recipe.stage for recipe in pipeline.stages] == ["first", "second", "third"]
    runs = run_pipeline(pipeline)
    assert [run.path.name for run in runs] == ["first", "second", "third"]
    assert runs[2].model.exists()
    report = json.loads((file.parent / "runs" / "results.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == report["planned"] == ["first", "second", "third"]
    assert (file.parent / "runs" / "report.html").exists()
    written = started(runs)
    assert started(run_pipeline(load_pipeline(file))) == written


def test_a_changed_stage_runs_anew_with_what_depends_on_it(file: Path) -> None:
    written = started(run_pipeline(load_pipeline(file)))
    again = started(run_pipeline(load_pipeline(file, ["second.trainer.learning_rate=1e-3"])))
    assert again[0] == written[0]
    assert again[1] != written[1]
    assert again[2] != written[2]


def test_from_and_only_choose_stages(file: Path) -> None:
    pipeline = load_pipeline(file)
    written = started(run_pipeline(pipeline))
    anew = started(run_pipeline(pipeline, start="second"))
    assert [new != old for new, old in zip(anew, written, strict=True)] == [False, True, True]
    assert [run.path.name for run in run_pipeline(pipeline, only="second")] == ["second"]
    with pytest.raises(UserError, match="no stage fourth; there are first, second, third"):
        run_pipeline(pipeline, start="fourth")


def test_overrides_go_to_every_stage_or_to_the_one_they_name(file: Path) -> None:
    pipeline = load_pipeline(file, ["data.seed=3", "first.trainer.learning_rate=1e-4"])
    assert {recipe.data.seed for recipe in pipeline.stages} == {3}
    rates = [recipe.trainer_arguments["learning_rate"] for recipe in pipeline.stages]
    assert rates == [1e-4, 1e-2, 1e-2]
    with pytest.raises(UserError, match="frist: neither a section of a recipe nor a stage"):
        load_pipeline(file, ["frist.data.seed=3"])


def test_graphs_that_cannot_run_are_refused(file: Path) -> None:
    folder = file.parent
    write(folder, "first", model=after("third"))
    with pytest.raises(UserError, match="start from each other"):
        load_pipeline(file)
    write(folder, "first", model=after("zeroth"))
    with pytest.raises(UserError, match="stage:zeroth, which is not listed"):
        load_pipeline(file)


def test_an_adapter_must_be_handed_over_in_words(file: Path) -> None:
    write(file.parent, "third", model=after("second"))
    with pytest.raises(UserError, match=r"set model\.handoff to merge .*, continue .* or stack"):
        run_pipeline(load_pipeline(file))


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_weights(find_weights(str(path))).eval()(IDS).logits


@pytest.mark.parametrize("handoff", ["merge", "stack", "continue"])
def test_every_hand_off_starts_from_what_the_stage_before_computes(file: Path, handoff: str) -> None:
    adapter = None if handoff == "continue" else ADAPTER
    write(file.parent, "third", model=after("second", handoff=handoff), adapter=adapter)
    still = ["third.trainer.learning_rate=0"]
    runs = run_pipeline(load_pipeline(file, still))
    torch.testing.assert_close(logits(runs[2].path), logits(runs[1].path), atol=1e-4, rtol=0)
    base = json.loads((runs[2].adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    expected = {"merge": runs[2].initial, "stack": runs[1].adapter, "continue": runs[0].model}
    assert Path(base) == expected[handoff]


def test_a_recipe_alone_starts_from_the_run_beside_it(file: Path) -> None:
    folder = file.parent
    alone = load_pipeline(folder / "second.yaml", [f"output.dir={folder / 'second'}"])
    with pytest.raises(UserError, match="run that stage first"):
        run_pipeline(alone)
    run_pipeline(load_pipeline(folder / "first.yaml", [f"output.dir={folder / 'first'}"]))
    assert stage_weights(alone.stages[0]) == Weights(str(folder / "first" / "model"))
    assert run_pipeline(alone)[0].adapter.exists()
