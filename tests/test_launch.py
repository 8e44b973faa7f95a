"""Processes that launch.py starts: they all run, the first error comes back, and none outlives its launcher."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hymba_tune.errors import UserError
from hymba_tune.launch import RankFailed, launch
from hymba_tune.machines import Follower, Lead, Place
from hymba_tune.rank import report_hang
from hymba_tune.topology import Topology, config_names, find_config, free_port, read_sharing

HERE = Path(__file__)


def greet(text: str) -> None:
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {text}")


def fail(kind: str) -> None:
    if os.environ["RANK"] == "0" and kind == "bug beside a stopped rank":
        os.kill(os.getpid(), signal.SIGSTOP)
    if os.environ["RANK"] == "1":
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("trainer.x: 5: too much") if kind == "user" else ValueError("a bug")
    time.sleep(60)


def hang_and_fail(reports: str) -> None:
    report_hang(Path(reports), 3, time.time(), traceback.extract_stack())
    raise RuntimeError("Connection closed by peer")


def lead(function: str, argument: str, place: Place, reports: Path) -> None:
    """The first of two machines, and on its port the second."""
    with Lead(place, 60) as partners:
        topology = partners.prepare("stage", Topology(find_config("ddp"), 2, 2))
        launch(f"tests.test_launch:{function}", [argument], topology, reports, partners)


def follow(function: str, argument: str, place: Place, reports: Path) -> None:
    with Follower(replace(place, machine=1), patience=60) as partners:
        assert partners.next_stage() == "stage"
        topology = partners.prepare("stage", Topology(find_config("ddp"), 2, 2))
        launch(f"tests.test_launch:{function}", [argument], topology, reports, partners)


@contextmanager
def second_machine(function: str, argument: str, place: Place, reports: Path) -> Iterator[subprocess.Popen[bytes]]:
    code = f"from tests.test_launch import *\nfollow({function!r}, {argument!r}, {place!r}, Path({str(reports)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parents[1]) as process:
        yield process
        process.wait(60)


def wait(folder: str) -> None:
    (Path(folder) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(120)


def start(function: str, argument: str, reports: Path) -> None:
    launch(f"tests.test_launch:{function}", [argument], Topology(find_config("ddp"), 2), reports)


def test_every_rank_runs_and_only_the_first_prints_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("greet", "hello", tmp_path)
    assert "rank 0 of 2: hello" in capfd.readouterr().out
    assert (tmp_path / "rank-1.log").read_text() == "rank 1 of 2: hello\n"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, r"^trainer\.x: 5: too much$"),
        ("bug", RankFailed, r"ValueError in rank 1 .*rank-1\.log.*: a bug"),
        ("killed", UserError, "rank 1 was ended by SIGKILL"),
        pytest.param("bug beside a stopped rank", RankFailed, "in rank 1 .*: a bug", marks=pytest.mark.full),
    ],
)
def test_the_first_failure_comes_back(tmp_path: Path, kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        start("fail", kind, tmp_path)


def test_that_a_rank_hung_stays_said_when_it_then_loses_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no step since .* after step 3 in .*\.py:\d+ \(hang_and_fail\)"):
        start("hang_and_fail", str(tmp_path), tmp_path)


def test_two_launchers_make_one_world(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = Place(0, 2, "127.0.0.1", free_port())
    with second_machine("greet", "hello", place, tmp_path):
        lead("greet", "hello", place, tmp_path)
    assert "rank 0 of 2: hello" in capfd.readouterr().out
    assert (tmp_path / "rank-1.log").read_text() == "rank 1 of 2: hello\n"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("bug", RankFailed, r"ValueError in rank 1 .*: a bug"), ("killed", UserError, "rank 1 was ended by SIGKILL")],
)
def test_a_failure_on_the_other_machine_comes_back(
    tmp_path: Path, kind: str, error: type[Exception], message: str
) -> None:
    place = Place(0, 2, "127.0.0.1", free_port())
    with second_machine("fail", kind, place, tmp_path) as other, pytest.raises(error, match=message):
        lead("fail", kind, place, tmp_path)
    assert other.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_its_launcher(tmp_path: Path, number: signal.Signals) -> None:
    code = f"from tests.test_launch import *\nstart('wait', {str(tmp_path)!r}, Path({str(tmp_path / 'reports')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parents[1])
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.read_text() or 0) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 2
    process.send_signal(number)
    assert process.wait(60) in (-number, 128 + number)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_configuration_is_understood(name: str) -> None:
    sharing = read_sharing(find_config(name))
    stage = int(name.partition("zero")[2][:1] or 0)
    assert (sharing.stage, sharing.offload) == (stage, name.endswith("offload"))
