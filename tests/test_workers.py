"""A killed run leaves no worker behind, whoever forked it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from hymba_tune.recipe import load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage
from tests.test_stage import CONFIG

# Starts workers that are busy for a minute, prints their process ids and waits to be killed.
POOL = """
import sys, time
from multiprocess import Pool
from hymba_tune.workers import end_with_parent
if sys.argv[1] == "guarded":
    end_with_parent()
pool = Pool(2)
pool.map_async(time.sleep, [60, 60], chunksize=1)
time.sleep(0.3)
print(*[worker.pid for worker in pool._pool], flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def forked_by(parent: int) -> list[int]:
    """The living processes that `parent` has forked and that run on as its copies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            copied = (folder / "cmdline").read_bytes() == Path(f"/proc/{parent}/cmdline").read_bytes()
        except OSError:
            continue
        if int(ppid) == parent and copied and alive(int(folder.name)):
            found.append(int(folder.name))
    return found


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("guarded", [True, False])
def test_busy_workers_of_a_pool_outlive_a_kill_only_without_the_guard(guarded: bool) -> None:
    command = [sys.executable, "-c", POOL, "guarded" if guarded else "bare"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        workers = [int(pid) for pid in launcher.stdout.readline().split()]
        try:
            assert all(map(alive, workers))
            launcher.send_signal(signal.SIGKILL)
            launcher.wait()
            assert gone(workers, 10 if guarded else 1) is guarded
        finally:
            for pid in workers:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def recipe_file(tmp_path: Path, small_tokenizer: Any) -> Path:
    """Ten thousand conversations, which two processes encode, and twelve steps, for which another one loads rows."""
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    mix = {"sources": {"math": {"generator": {"name": "tiny_math", "n": 10_000}, "licence": "MIT"}}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    recipe = {
        "stage": "killed",
        "method": "sft",
        "model": {"from": "scratch", "config": CONFIG, "tokenizer": "tokenizer"},
        "data": {"mix": "mix.yaml", "max_length": 512, "packing": "none", "decontaminate": False},
        "trainer": {
            "learning_rate": 1e-2, "global_batch": 4, "max_steps": 12, "logging_steps": 1, "save_steps": 2,
            "activation_checkpointing": False, "dataloader_num_workers": 1,
        },
        "output": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def killed_with_workers(recipe: Path, reached: Callable[[], bool], count: int) -> list[int]:
    """Start a run and kill it when `reached` holds while it has `count` workers: their process ids."""
    command = [sys.executable, "-m", "hymba_tune.cli", "run", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        workers: list[int] = []
        while not (reached() and len(workers := forked_by(run.pid)) >= count):
            assert run.poll() is None, "the run ended without having had so many workers"
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    return workers


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core the run encodes in its own process")
def test_a_run_killed_among_its_workers_leaves_none_and_the_same_command_ends_it(recipe_file: Path) -> None:
    run = RunDir(load_recipe(recipe_file).output.dir)
    encoding = run.rows.with_name(f"{run.rows.name}.unfinished") / "scratch"
    assert gone(killed_with_workers(recipe_file, encoding.exists, count=2), seconds=10)
    assert not run.rows.exists(), "killed in datasets.map"

    def has_trained() -> bool:
        return run.metrics.exists() and run.metrics.read_text().count("\n") >= 3

    assert gone(killed_with_workers(recipe_file, has_trained, count=1), seconds=10)
    assert "training" not in run.read_json(run.state)["finished"]
    run_stage(load_recipe(recipe_file))
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == list(range(1, 13))
    whole = run_stage(load_recipe(recipe_file, [f"output.dir={recipe_file.parent / 'whole'}"]))
    expected, found = (load_file(one.model / "model.safetensors") for one in (whole, run))
    for name, value in expected.items():
        assert value.equal(found[name]), name
