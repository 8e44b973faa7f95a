"""The batch script: what SLURM reads of it, what it runs on each node, and what it does at its time limit."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, refused, run


def write(cluster: Cluster, *arguments: str) -> Path:
    run("launch", "slurm", "one.yaml", "--nodes", "2", "--gpus", "4", "--out", "job.sh", *arguments)
    return cluster.folder / "job.sh"


def options(file: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in file.read_text().splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_was_asked_for(cluster: Cluster) -> None:
    file = write(cluster, "--time", "2-12:00:00", "--partition", "gpu", "--account", "me", "--option", "qos=high&low")
    assert options(file) == [
        "--job-name=one",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--cpus-per-task=32",
        "--partition=gpu",
        "--account=me",
        "--time=2-12:00:00",
        "--qos='high&low'",
        f"--output='{cluster.folder}/runs/one-%j.log'",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@180",
    ]
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_each_node_runs_one_launcher_of_the_same_run_and_knows_its_rank(cluster: Cluster) -> None:
    job = cluster.start(write(cluster, "trainer.learning_rate=1e-4", "eval.suites=[a b, 'c$HOME']"))
    assert job.wait(60) == 0
    command = (
        f"node0 10077 {cluster.folder} -m hymba_tune.cli run one.yaml launch.machines=2 launch.processes=8 "
        "launch.config=multinode_zero2 trainer.learning_rate=1e-4 eval.suites=[a b, 'c$HOME']"
    )
    assert cluster.called("launcher") == [f"0 {command}", f"1 {command}"]
    assert cluster.called("scontrol") == ["show hostnames node[0-1]"]
    (srun,) = cluster.called("srun")
    assert srun.startswith(
        "--ntasks-per-node=1 --cpus-per-task=32 --kill-on-bad-exit=1 bash -c NODE_RANK=$SLURM_NODEID"
    )


def test_what_fails_ends_the_job_and_is_not_queued_again(cluster: Cluster) -> None:
    assert cluster.start(write(cluster), more={"CODE": "2"}).wait(60) == 2
    assert cluster.called("scontrol") == ["show hostnames node[0-1]"]


@pytest.mark.parametrize(("count", "code", "again"), [("0", 0, ["requeue 77"]), ("3", 1, [])])
def test_before_its_time_limit_the_job_ends_its_processes_and_is_queued_again(
    cluster: Cluster, count: str, code: int, again: list[str]
) -> None:
    file = write(cluster, "--restarts", "3")
    hold = str(cluster.folder / "hold")
    job = cluster.start(file, more={"HOLD": hold, "SLURM_RESTART_COUNT": count})
    cluster.await_launchers(hold)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    assert cluster.called("ended") == ["0", "1"]
    assert [call for call in cluster.called("scontrol") if call.startswith("requeue")] == again


def test_submit_hands_the_script_in(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    run("launch", "slurm", "one.yaml", "--submit")
    file = cluster.folder / "runs" / "one.sbatch"
    assert capsys.readouterr().out == f"{file}\njob 4711\n"
    assert cluster.called("sbatch") == [f"--parsable {file}"]
    assert "launch.config=zero2" in file.read_text()
    monkeypatch.setenv("REFUSAL", "invalid partition specified: gpu")
    said = refused(capsys, "launch", "slurm", "one.yaml", "--submit")
    assert said == f"hymba-tune: sbatch refuses {file}: sbatch: error: invalid partition specified: gpu\n"


def test_without_sbatch_nothing_is_written(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "--submit: no sbatch on PATH" in refused(capsys, "launch", "slurm", "one.yaml", "--submit")
    assert not (cluster.folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "zero9"], "launch.config: no configuration zero9; use ddp, "),
        (["--time", "soon"], "--time: 'soon': write MINUTES"),
        (["--partition", "a b"], "--partition: 'a b': no value that SLURM takes"),
        (["--account", "a\nrm -rf /"], "--account: 'a\\nrm -rf /': no value"),
        (["--option", "nodes=3"], "--option nodes=3: the script says nodes already"),
        (["--option", "-x"], "--option -x: write NAME=VALUE"),
        (["--nodes", "3", "--gpus", "1"], "trainer.global_batch: 8 is not a multiple of"),
        (["launch.processes=3"], "launch.processes=3: the number of machines and of processes on each decides it"),
        (["--env", "NOT_SET_ANYWHERE"], "--env: NOT_SET_ANYWHERE: not set here"),
        (["trainer.learning_rat=1"], "trainer.learning_rat: unknown key"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, "launch", "slurm", "one.yaml", *arguments)
    assert sorted(path.name for path in cluster.folder.iterdir()) == ["mix.yaml", "one.yaml"]


def test_a_script_that_was_changed_is_kept(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(cluster)
    assert write(cluster) == file
    file.write_text("mine")
    assert "is there, and is another script" in refused(capsys, "launch", "slurm", "one.yaml", "--out", str(file))
    assert file.read_text() == "mine"


def test_variables_are_written_quoted_and_for_the_user_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "a b; 'c' $(touch never)")
    file = write(cluster, "--env", "PLACE")
    assert file.stat().st_mode & 0o777 == 0o700 & ~_umask()
    assert cluster.start(file).wait(60) == 0
    assert not (cluster.folder / "never").exists()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_configuration_that_the_recipe_names_stays(cluster: Cluster) -> None:
    (cluster.folder / "one.yaml").write_text((cluster.folder / "one.yaml").read_text() + "launch: {config: zero3}\n")
    assert "launch.config" not in write(cluster).read_text()


def test_one_process_on_one_node_needs_no_configuration(cluster: Cluster) -> None:
    run("launch", "slurm", "one.yaml", "--nodes", "1", "--gpus", "1", "--out", "job.sh")
    assert "launch.config" not in (cluster.folder / "job.sh").read_text()
