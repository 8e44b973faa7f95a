"""Ranks that hang or die: the run ends with a message, nothing stays, and the same command goes on from there."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.errors import UserError
from hymba_tune.run_dir import RunDir
from tests.launched import assert_same_training, run, run_with, write_recipe


def of_the_run(folder: Path) -> list[int]:
    """Processes of this machine whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode()
        except OSError:
            continue
        if str(folder) in command and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("how", ["sleeping", pytest.param("stopped", marks=pytest.mark.full)])
def test_a_rank_that_hangs_ends_the_run_with_a_message(
    how: str, tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, small_tokenizer, "ddp")
    with pytest.raises(UserError) as caught:
        run_with(path, how, monkeypatch)
    message = str(caught.value)
    assert re.search(r"training: no step since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: ", message)
    where = r"after step 3 in .*launched\.py:\d+ \(act\)" if how == "sleeping" else "silent"
    assert re.search(rf"rank 1 {where}", message)
    assert re.search(r"rank 0 after step 3 in .*\.py:\d+ \(.*\)", message), message
    assert "raise launch.step_timeout" in message
    assert not of_the_run(tmp_path)
    ranks = RunDir(tmp_path / "ddp").ranks
    assert ("in act" in (ranks / "rank-1.log").read_text()) == (how == "sleeping")
    assert "no step any more" in (ranks / "rank-0.log").read_text()


@pytest.mark.full
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_a_run_whose_rank_was_killed_goes_on_as_if_it_had_not_been(
    config: str, tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    path = write_recipe(tmp_path, small_tokenizer, config, name="cut")
    with pytest.raises(UserError, match="rank 1 was ended by SIGKILL"):
        run_with(path, "killed", monkeypatch)
    assert not of_the_run(tmp_path)
    cut = RunDir(tmp_path / "cut")
    assert [folder.name for folder in cut.checkpoints.iterdir()] == ["checkpoint-2"]
    whole = run(write_recipe(tmp_path, small_tokenizer, "single", 1, name="whole"))
    assert_same_training(run(path), whole)


@pytest.mark.full
def test_a_run_whose_launcher_was_killed_leaves_no_process_and_goes_on(tmp_path: Path, small_tokenizer: Any) -> None:
    pytest.importorskip("deepspeed")
    path = write_recipe(tmp_path, small_tokenizer, "zero2", name="cut")
    code = f"from tests.launched import *\nrun_with(Path({str(path)!r}), 'launcher_killed', pytest.MonkeyPatch())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while of_the_run(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not of_the_run(tmp_path)
    whole = run(write_recipe(tmp_path, small_tokenizer, "single", 1, name="whole"))
    assert_same_training(run(path), whole)


def test_a_run_that_was_cut_under_ddp_goes_on_in_one_process(
    tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="rank 1 was ended by SIGKILL"):
        run_with(write_recipe(tmp_path, small_tokenizer, "ddp", name="cut"), "killed", monkeypatch)
    whole = run(write_recipe(tmp_path, small_tokenizer, "single", 1, name="whole"))
    assert_same_training(run(write_recipe(tmp_path, small_tokenizer, "single", 1, name="cut")), whole)


@pytest.mark.full
def test_pieces_go_together_on_as_many_processes_as_made_them(
    tmp_path: Path, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match="rank 1 was ended by SIGKILL"):
        run_with(write_recipe(tmp_path, small_tokenizer, "zero2", name="cut"), "killed", monkeypatch)
    for config, processes in (("zero2", 1), ("zero3", 2), ("ddp", 2), ("single", 1)):
        path = write_recipe(tmp_path, small_tokenizer, config, processes, name="cut")
        with pytest.raises(UserError, match=r"made by zero2 on 2 processes; .* set launch as it was, or start over"):
            run(path)
    assert [folder.name for folder in RunDir(tmp_path / "cut").checkpoints.iterdir()] == ["checkpoint-2"]
