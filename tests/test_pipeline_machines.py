"""One pipeline on several machines, here two threads: the first runs the stages, the other joins in their training."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymba_tune.errors import UserError
from hymba_tune.launch import RankFailed
from hymba_tune.machines import Follower, Lead, Place
from hymba_tune.pipeline import _join, load_pipeline, run_pipeline
from hymba_tune.recipe import Recipe
from hymba_tune.topology import free_port

RECIPE: dict[str, Any] = {
    "method": "sft",
    "model": {"from": "tiny"},
    "data": {"mix": "mix.yaml"},
    "trainer": {"global_batch": 8},
}
ON_TWO = {"config": "ddp", "processes": 4, "machines": 2}


def write(folder: Path, stage: str, **launch: Any) -> str:
    (folder / "mix.yaml").touch()
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump({**RECIPE, "stage": stage, "launch": launch}))
    return f"{stage}.yaml"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    """The first machine's, which this process is."""
    place = Place(0, 2, "127.0.0.1", free_port())
    for name, value in (("NODE_RANK", 0), ("MASTER_ADDR", place.address), ("MASTER_PORT", place.port)):
        monkeypatch.setenv(name, str(value))
    return place


def test_the_others_join_in_the_training_of_the_stage_that_the_first_runs(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(tmp_path / write(tmp_path, "one", **ON_TWO))
    seen: list[tuple[str, int, str, int]] = []

    def train(recipe: Recipe, earlier: Any, partners: Lead | Follower) -> None:
        topology = partners.prepare(recipe.stage, recipe.launch.topology)
        seen.append((recipe.stage, topology.machine, str(topology.address), topology.processes))
        partners.begin()
        partners.end([])

    def join(recipe: Recipe, partners: Follower) -> None:
        train(recipe, None, partners)
        raise RankFailed("said by the first machine, not here")

    monkeypatch.setattr("hymba_tune.stage.run_stage", train)
    monkeypatch.setattr("hymba_tune.stage.join_stage", join)
    monkeypatch.setattr("hymba_tune.stage.await_stage", lambda recipe: None)
    other = threading.Thread(target=_join, args=(pipeline, replace(place, machine=1)), daemon=True)
    other.start()
    assert len(run_pipeline(pipeline)) == 1
    other.join(30)
    assert sorted(seen) == [("one", 0, "127.0.0.1", 4), ("one", 1, "127.0.0.1", 4)]


def test_what_another_machine_lacks_is_told_by_the_first(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(tmp_path / write(tmp_path, "one", **ON_TWO))

    def lacking(recipe: Recipe) -> None:
        raise UserError("launch.processes: 4, but there is 1 GPU")

    monkeypatch.setattr("hymba_tune.launch.check_launch", lacking)
    other = threading.Thread(target=_join, args=(pipeline, replace(place, machine=1)), daemon=True)
    other.start()
    with pytest.raises(UserError, match=r"machine 1 \(.*\): launch.processes: 4, but there is 1 GPU"):
        run_pipeline(pipeline)
    other.join(30)


def test_a_run_that_is_not_on_the_other_machine_is_refused_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hymba_tune.stage import await_stage

    monkeypatch.setattr("hymba_tune.stage.VISIBLE_SECONDS", 0)
    pipeline = load_pipeline(tmp_path / write(tmp_path, "one", **ON_TWO), [f"output.dir={tmp_path / 'there'}"])
    with pytest.raises(UserError, match=r"output\.dir: .*there is not on machine"):
        await_stage(pipeline.stages[0])


def test_stages_on_one_machine_and_on_all_go_together(tmp_path: Path) -> None:
    names = [write(tmp_path, "one", **ON_TWO), write(tmp_path, "two"), write(tmp_path, "three", **ON_TWO)]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"stages": names}))
    assert load_pipeline(tmp_path / "pipeline.yaml").machines == 2
    write(tmp_path, "three", config="ddp", processes=4, machines=4)
    with pytest.raises(UserError, match=r"launch\.machines: stages want 2 and 4"):
        _ = load_pipeline(tmp_path / "pipeline.yaml").machines


def test_without_the_variables_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_RANK", raising=False)
    pipeline = load_pipeline(tmp_path / write(tmp_path, "one", **ON_TWO))
    with pytest.raises(UserError, match=r"launch\.machines: 2: NODE_RANK"):
        run_pipeline(pipeline)
