"""The written scripts, run for real: launchers at two addresses, or in two networks, train what one process does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hymba_tune.recipe import load_recipe
from hymba_tune.stage import run_stage
from hymba_tune.topology import free_port
from tests.cluster.conftest import PYTHON, Cluster, run
from tests.test_launched_stage import recipe_of

pytestmark = pytest.mark.full

SETTINGS = ["trainer.max_steps=8", "trainer.save_steps=2"]
SECONDS = 900  # two torches on a busy machine
# The order of a float32 sum, over so few steps.
RELATIVE = 1e-3


@pytest.fixture
def recipe(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of one process; its run is `single`, that of two hosts `two`."""
    monkeypatch.setattr(sys, "executable", PYTHON)
    return recipe_of(cluster.folder, "single")


def on_two(cluster: Cluster, recipe: Path) -> str:
    """The same recipe with an output of its own."""
    values = yaml.safe_load(recipe.read_text())
    del values["launch"]
    (cluster.folder / "two.yaml").write_text(yaml.safe_dump({**values, "output": {"dir": str(cluster.folder / "two")}}))
    return "two.yaml"


def same_as_alone(cluster: Cluster, recipe: Path) -> None:
    alone = run_stage(load_recipe(recipe, SETTINGS))
    two = cluster.folder / "two"
    losses, theirs = (
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").open()] for path in (alone.path, two)
    )
    assert len(losses) == 8
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(losses), atol=1e-4, rtol=0)
    weights, others = load_file(alone.model / "model.safetensors"), load_file(two / "model" / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert float((others[name] - weight).norm()) <= RELATIVE * float(weight.norm()) + 1e-6, name


def write_start(cluster: Cluster, recipe: Path, config: str, *hosts: str) -> Path:
    """The script that trains on two hosts."""
    pytest.importorskip("deepspeed")
    (cluster.folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    port = str(free_port())
    run(
        *("launch", "hosts", on_two(cluster, recipe), "--hostfile", "hosts", "--config", config, "--port", port),
        *("--out", "start.sh", *SETTINGS),
    )
    return cluster.folder / "start.sh"


def test_hosts_of_a_hostfile_train_what_one_process_does(cluster: Cluster, recipe: Path) -> None:
    job = cluster.start(write_start(cluster, recipe, "multinode_zero2", "127.0.0.1", "127.0.0.2"))
    assert job.wait(SECONDS) == 0, cluster.output.read_text()
    assert [call.split()[3] for call in cluster.called("ssh")] == ["127.0.0.1", "127.0.0.2"]
    same_as_alone(cluster, recipe)


def test_hosts_in_two_networks_train_what_one_process_does(cluster: Cluster, recipe: Path) -> None:
    more = {"NODES": "10.77.0.1 10.77.0.2", "GLOO_SOCKET_IFNAME": "cable"}
    apart = str(cluster.commands / "two_networks")
    if subprocess.run([apart, "true"], env=cluster.environment(**more), check=False).returncode:
        pytest.skip("this machine makes no networks for its users")
    script = write_start(cluster, recipe, "multinode_zero3", "10.77.0.1", "10.77.0.2")
    job = cluster.start(Path(apart), "bash", str(script), more=more)
    assert job.wait(SECONDS) == 0, cluster.output.read_text()
    same_as_alone(cluster, recipe)


def test_a_slurm_job_that_is_queued_again_trains_what_one_process_does(cluster: Cluster, recipe: Path) -> None:
    run(
        *("launch", "slurm", on_two(cluster, recipe), "--nodes", "2", "--gpus", "1", "--config", "ddp"),
        *("--out", "job.sh", *SETTINGS),
    )
    more = {"NODES": "127.0.0.1 127.0.0.2", "SLURM_JOB_ID": str(os.getpid())}
    job = cluster.start(cluster.folder / "job.sh", more=more)
    deadline = time.monotonic() + SECONDS
    while not list((cluster.folder / "two" / "checkpoints").glob("checkpoint-*")) and time.monotonic() < deadline:
        assert job.poll() is None, cluster.output.read_text()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(SECONDS) == 0, cluster.output.read_text()
    assert cluster.called("scontrol")[0] == f"requeue {os.getpid()}"
    assert not (cluster.folder / "two" / "model").exists()
    job = cluster.start(cluster.folder / "job.sh", more={**more, "SLURM_RESTART_COUNT": "1"})
    assert job.wait(SECONDS) == 0, cluster.output.read_text()
    same_as_alone(cluster, recipe)
