"""The list of runs: finished, stopped and running ones, and nothing else."""

from pathlib import Path

import pytest
import yaml

from hymba_tune.errors import UserError
from hymba_tune.report.collect import collect
from hymba_tune.run_dir import RunDir
from hymba_tune.runs import find_runs, runs_table, state_of


def make_run(path: Path, finished: list[str]) -> RunDir:
    run = RunDir(path)
    run.write_text(run.recipe, yaml.safe_dump({"stage": path.name, "method": "sft", "eval": {"suites": []}}))
    run.write_json(run.state, {"finished": finished})
    return run


def test_runs_are_found_at_any_depth_and_not_inside_a_run(tmp_path: Path) -> None:
    for name in ("b", "pipeline/sft1", "a"):
        make_run(tmp_path / name, [])
    make_run(tmp_path / "a" / "checkpoints" / "inner", [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").touch()
    names = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert names == ["a", "b", "pipeline/sft1"]
    assert runs_table(tmp_path).row_count == 3
    with pytest.raises(UserError, match="no such folder"):
        list(find_runs(tmp_path / "nowhere"))


def test_a_run_is_finished_stopped_or_running(tmp_path: Path) -> None:
    done = make_run(tmp_path / "done", ["data", "before", "training", "after"])
    assert state_of(done, collect(done.path)) == "finished"
    cut = make_run(tmp_path / "cut", ["data", "before"])
    cut.metrics.write_text('{"step": 7, "epoch": 0.5, "loss": 1.0}\n')
    assert state_of(cut, collect(cut.path)) == "stopped: training step 7"
    with cut.locked():
        assert state_of(cut, collect(cut.path)) == "running: training step 7"
    cut.lock.write_text('{"pid": 1, "host": "left by a kill"}')
    assert state_of(cut, collect(cut.path)) == "stopped: training step 7"
