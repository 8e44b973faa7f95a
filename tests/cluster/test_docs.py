"""The commands of docs/distributed.md, run as they stand, and the Dockerfile's pins."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hymba_tune.paths import REPOSITORY
from tests.cluster.conftest import Cluster, run

TEXT = (REPOSITORY / "docs" / "distributed.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    hymba-tune (launch .*)$", TEXT, re.MULTILINE)


def test_there_are_commands_to_run() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"slurm", "hosts"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_writes_a_script_that_starts_every_machine(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (cluster.folder / "hosts").write_text("\n".join(re.findall(r"^    (\S+ slots=\d+)$", TEXT, re.MULTILINE)))
    for name, value in cluster.environment(HF_HOME="/a disk").items():
        monkeypatch.setenv(name, value)
    words = shlex.split(command)
    run(*words)
    said = capsys.readouterr().out
    assert ("job 4711" in said) == ("--submit" in words)
    nodes = int(words[words.index("--nodes") + 1]) if "slurm" in words else 2
    job = cluster.start(Path(said.splitlines()[0]), more={"NODES": " ".join(f"node{n}" for n in range(nodes))})
    assert job.wait(60) == 0
    launched = cluster.called("launcher")
    assert [int(call.split()[0]) for call in launched] == list(range(nodes))
    assert all(f"launch.machines={nodes} " in call for call in launched)


def test_the_image_builds_what_the_project_asks_for() -> None:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    built = dict(re.findall(r"/wheels ([a-z0-9-]+)==(\S+)$", text, re.MULTILINE))
    wanted = {found.name: found.specifier for found in map(Requirement, project["optional-dependencies"]["cuda"])}
    assert built.keys() == wanted.keys()
    assert all(wanted[name].contains(version) for name, version in built.items())
    for name, version in built.items():
        assert f"{name} {version}" in TEXT.replace("\n", " ")


def test_the_image_runs_as_a_user_and_holds_no_secret() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0")
    assert not [line for line in lines if re.match(r"(ARG|ENV) .*(TOKEN|KEY|SECRET|PASSWORD)", line)]
