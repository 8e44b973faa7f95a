"""The written scripts, run for real: launchers at two addresses, or in two networks, train what one process does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hymba_tune.run_dir import RunDir
from hymba_tune.topology import free_port
from tests import launched
from tests.cluster.conftest import PYTHON, Cluster, run

pytestmark = pytest.mark.full

SECONDS = 900  # two torches on a busy machine


@pytest.fixture(autouse=True)
def real_launchers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", PYTHON)


def write_start(cluster: Cluster, recipe: Path, *hosts: str) -> Path:
    """The script that trains on two hosts."""
    pytest.importorskip("deepspeed")
    (cluster.folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    port = str(free_port())
    run("launch", "hosts", str(recipe), "--hostfile", "hosts", "--port", port, "--out", "start.sh")
    return cluster.folder / "start.sh"


def trained(cluster: Cluster, job: subprocess.Popen[bytes], name: str) -> RunDir:
    assert job.wait(SECONDS) == 0, cluster.output.read_text()
    return RunDir(cluster.folder / name)


def test_hosts_of_a_hostfile_train_what_one_process_does(cluster: Cluster, small_tokenizer: Any) -> None:
    recipe = launched.write_recipe(cluster.folder, small_tokenizer, "multinode_zero2")
    script = write_start(cluster, recipe, "127.0.0.1", "127.0.0.2")
    together = trained(cluster, cluster.start(script), "multinode_zero2")
    assert [call.split()[3] for call in cluster.called("ssh")] == ["127.0.0.1", "127.0.0.2"]
    alone = launched.run(launched.write_recipe(cluster.folder, small_tokenizer, "single", 1))
    launched.assert_same_training(together, alone)


def test_hosts_in_two_networks_train_what_one_process_does(cluster: Cluster, small_tokenizer: Any) -> None:
    more = {"NODES": "10.77.0.1 10.77.0.2", "GLOO_SOCKET_IFNAME": "cable"}
    apart = cluster.commands / "two_networks"
    if subprocess.run([apart, "true"], env=cluster.environment(**more), check=False).returncode:
        pytest.skip("this machine makes no networks for its users")
    recipe = launched.write_recipe(cluster.folder, small_tokenizer, "zero3")  # the one that shards a small model
    script = write_start(cluster, recipe, "10.77.0.1", "10.77.0.2")
    together = trained(cluster, cluster.start(apart, "bash", str(script), more=more), "zero3")
    alone = launched.run(launched.write_recipe(cluster.folder, small_tokenizer, "single", 1))
    launched.assert_same_training(together, alone)


def test_a_slurm_job_that_is_queued_again_trains_what_one_process_does(
    cluster: Cluster, small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launched, "STEPS", 40)  # long enough to be cut
    recipe = launched.write_recipe(cluster.folder, small_tokenizer, "ddp")
    run("launch", "slurm", str(recipe), "--nodes", "2", "--gpus", "1", "--out", "job.sh")
    more = {"NODES": "127.0.0.1 127.0.0.2", "SLURM_JOB_ID": str(os.getpid())}
    job = cluster.start(cluster.folder / "job.sh", more=more)
    checkpoints = RunDir(cluster.folder / "ddp").checkpoints
    deadline = time.monotonic() + SECONDS
    while not list(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert job.poll() is None, cluster.output.read_text()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    cut = trained(cluster, job, "ddp")
    assert cluster.called("scontrol")[0] == f"requeue {os.getpid()}"
    assert not cut.model.exists()
    again = cluster.start(cluster.folder / "job.sh", more={**more, "SLURM_RESTART_COUNT": "1"})
    together = trained(cluster, again, "ddp")
    alone = launched.run(launched.write_recipe(cluster.folder, small_tokenizer, "single", 1))
    launched.assert_same_training(together, alone)
