"""Run directories: one run at a time, files whole or absent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hymba_tune import run_dir
from hymba_tune.errors import UserError
from hymba_tune.run_dir import RunDir, provenance

HOLDER = """
import sys, time
from hymba_tune.run_dir import RunDir
with RunDir(sys.argv[1]).locked():
    print("locked", flush=True)
    time.sleep(60)
"""

# Forks a worker that lives on for so many seconds, prints its process id and dies without a word.
LEAVER = """
import os, sys, time
from hymba_tune.run_dir import RunDir
with RunDir(sys.argv[1]).locked():
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    else:
        time.sleep(float(sys.argv[2]))
    os._exit(0)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run directory tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_making_the_object_touches_no_disk(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.evaluation("before") == tmp_path / "run" / "eval" / "before"
    assert not run.path.exists()


def test_a_second_run_is_refused_with_pid_and_host(tmp_path, holder):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {os.uname().nodename}; wait for it"):
        RunDir(tmp_path / "run").locked().__enter__()


def test_a_killed_run_leaves_the_directory_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDir(tmp_path / "run").locked() as run:
        assert json.loads(run.lock.read_text())["pid"] == os.getpid()


def test_a_process_left_over_is_told_apart_from_a_live_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "LEFTOVER_SECONDS", 0.2)
    command = [sys.executable, "-c", LEAVER, str(tmp_path / "run"), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.wait()
        try:
            with pytest.raises(UserError, match="is gone, but one that it started still holds the directory"):
                RunDir(tmp_path / "run").locked().__enter__()
        finally:
            os.kill(child, signal.SIGKILL)


def test_workers_of_a_killed_run_are_waited_for(tmp_path):
    command = [sys.executable, "-c", LEAVER, str(tmp_path / "run"), "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.wait()
        with RunDir(tmp_path / "run").locked() as run:
            assert run.path.exists()


def test_the_lock_is_free_again_after_the_run(tmp_path):
    run = RunDir(tmp_path / "run")
    for _ in range(2):
        with run.locked():
            assert run.lock.read_text()
    assert run.lock.read_text() == ""


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        RunDir(tmp_path / "file" / "run").locked().__enter__()


def test_json_comes_back_and_missing_files_are_none(tmp_path):
    run = RunDir(tmp_path)
    run.write_json("eval/before/gsm8k.json", {"ä": [1, None]})
    assert run.read_json(run.evaluation("before") / "gsm8k.json") == {"ä": [1, None]}
    assert run.read_json(run.state) is None


def test_a_failed_write_keeps_the_old_file_and_leaves_no_draft(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_json(run.state, {"done": []})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write_json(run.state, {"done": ["train"]})
    monkeypatch.undo()
    assert run.read_json(run.state) == {"done": []}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        RunDir(tmp_path).write_json("state.json", float("nan"))


def test_broken_json_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: not valid JSON"):
        RunDir(tmp_path).read_json("state.json")


def test_a_reader_never_sees_half_a_file(tmp_path):
    run = RunDir(tmp_path)
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom hymba_tune.run_dir import RunDir\nrun = RunDir(sys.argv[1])\n"
            "for i in range(10**6): run.write_json('state.json', [i] * 20000)",
            str(tmp_path),
        ]
    )
    try:
        until = time.monotonic() + 1.0
        seen: set[int] = set()
        while time.monotonic() < until or not seen:
            value = run.read_json("state.json")
            if value is not None:
                assert len(value) == 20000
                seen.add(value[0])
    finally:
        writer.kill()
        writer.wait()
    assert len(run.read_json("state.json")) == 20000


def test_provenance_names_code_packages_and_machine(tmp_path):
    run = RunDir(tmp_path)
    record = json.loads(run.write_environment().read_text())
    assert record.keys() == provenance().keys()
    assert "torch" in record["packages"]
    assert record["hardware"]["cores"] >= 1
    assert Path(run.environment).name == "environment.json"
