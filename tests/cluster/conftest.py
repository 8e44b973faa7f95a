"""A cluster that is this machine, and a small recipe to run on it."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from hymba_tune import cli
from tests.cluster.fakes import write_commands

PYTHON = sys.executable
"""What really runs hymba-tune; the fixture puts the fake launcher in its place."""

RECIPE = """
stage: one
method: sft
model: {from: tiny}
data: {mix: mix.yaml, packing: none}
trainer: {global_batch: 8}
output: {dir: runs/one}
"""


@dataclass(frozen=True)
class Cluster:
    """folder: the working directory, with one.yaml. calls: what commands of the cluster were called with."""

    folder: Path
    commands: Path
    log: Path

    @property
    def launcher(self) -> str:
        return str(self.commands / "launcher")

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.commands}{os.pathsep}{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-1]", "NODES": "node0 node1"}
        return {**os.environ, "PATH": path, "CALLS": str(self.log), **slurm, **more}

    def start(self, file: Path, *arguments: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A script of this project, started as a cluster would; what it says goes to `output`."""
        with self.output.open("wb") as said:
            return subprocess.Popen(
                ["bash", str(file), *arguments],
                env=self.environment(**(more or {})),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def await_launchers(self, hold: str, count: int = 2) -> None:
        """Until so many launchers run that were started with HOLD=hold."""
        deadline = time.monotonic() + 60
        while len(list(Path(hold).parent.glob(f"{Path(hold).name}.*"))) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    @property
    def output(self) -> Path:
        return self.log.with_name("output")

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def called(self, command: str) -> list[str]:
        """The arguments of each call of a command."""
        return sorted(call.partition(" ")[2] for call in self.calls if call.split()[0] == command)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    commands, folder = tmp_path / "bin", tmp_path / "the work"
    commands.mkdir()
    folder.mkdir()
    write_commands(commands)
    (folder / "one.yaml").write_text(RECIPE)
    (folder / "mix.yaml").touch()
    monkeypatch.chdir(folder)
    found = Cluster(folder, commands, tmp_path / "calls")
    monkeypatch.setattr("sys.executable", found.launcher)
    return found


def run(*arguments: str) -> None:
    """A command of hymba-tune in this process. Raises SystemExit where its code is not 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hymba-tune", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    if ended.value.code:
        raise SystemExit(ended.value.code)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that is refused."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err
