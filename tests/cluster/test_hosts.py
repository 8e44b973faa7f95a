"""The script for hosts without a scheduler: what runs on which, and that all end together."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, refused, run


def write(
    cluster: Cluster, *arguments: str, hostfile: str = "# two\nnode0 slots=4\n\nnode1 slots=4  # the second\n"
) -> Path:
    (cluster.folder / "hosts").write_text(hostfile)
    run("launch", "hosts", "one.yaml", "--hostfile", "hosts", "--out", "a b.sh", *arguments)
    return cluster.folder / "a b.sh"


def expected(cluster: Cluster, number: int) -> str:
    return (
        f"{number} node0 29500 {cluster.folder} -m hymba_tune.cli run one.yaml launch.machines=2 launch.processes=8 "
        "launch.config=multinode_zero2"
    )


def test_every_host_runs_its_share_of_the_same_run(cluster: Cluster) -> None:
    file = write(cluster)
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert cluster.start(file).wait(60) == 0
    assert cluster.called("launcher") == [expected(cluster, 0), expected(cluster, 1)]
    assert [call.split(" bash")[0] for call in cluster.called("ssh")] == [
        "-tt -o BatchMode=yes node0",
        "-tt -o BatchMode=yes node1",
    ]


def test_one_hosts_share_can_be_started_by_other_means(cluster: Cluster) -> None:
    file = write(cluster)
    assert cluster.start(file, "node1").wait(60) == 0
    assert cluster.calls == [f"launcher {expected(cluster, 1)}"]
    assert cluster.start(file, "node7").wait(60) == 2
    assert "no host node7 in this file; it has node0 node1" in cluster.output.read_text()


@pytest.mark.parametrize("reason", ["fails", "unreachable"])
def test_when_one_host_fails_all_end(cluster: Cluster, reason: str) -> None:
    file = write(cluster)
    hold = str(cluster.folder / "hold")
    if reason == "fails":
        assert cluster.start(file, more={"CODE": "2"}).wait(60) == 1
    else:
        job = cluster.start(file, more={"HOLD": hold, "UNREACHABLE": "node1"})
        assert job.wait(60) == 1
        assert [call.split()[1] for call in cluster.calls if call.startswith("launcher")] in (["0"], [])
    assert "ended with an error" in cluster.output.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ending_the_script_ends_all_hosts(cluster: Cluster, number: signal.Signals, code: int) -> None:
    file = write(cluster)
    hold = str(cluster.folder / "hold")
    job = cluster.start(file, more={"HOLD": hold})
    cluster.await_launchers(hold)
    job.send_signal(number)
    assert job.wait(60) == code
    deadline = time.monotonic() + 20
    while cluster.called("ended") != ["0", "1"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cluster.called("ended") == ["0", "1"]


@pytest.mark.parametrize(
    ("hostfile", "message"),
    [
        ("", "--hostfile: hosts names no host"),
        ("node0 slots=4\nnode1 slot=4\n", "hosts:2: 'slot=4': after a host only slots=N may stand"),
        ("node0 slots=0\n", "hosts:1: 'slots=0'"),
        ("node0 slots=4 slots=4\n", "hosts:1: 'slots=4 slots=4'"),
        ("# x\n-oProxyCommand=x slots=4\n", "hosts:2: '-oProxyCommand=x' is no host's name"),
        ("$(reboot) slots=4\n", "hosts:1: '$(reboot)' is no host's name"),
        ("node0 slots=4\nnode0 slots=4\n", "hosts:2: node0 is there already"),
        ("node0 slots=4\nnode1 slots=8\n", "hosts:2: slots=8: the hosts before have 4; all need as many"),
        ("node0\n", "hosts:1: node0: how many processes? write node0 slots=8, or pass --gpus 8"),
    ],
)
def test_a_malformed_hostfile_is_refused_with_its_line(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], hostfile: str, message: str
) -> None:
    (cluster.folder / "hosts").write_text(hostfile)
    assert message in refused(capsys, "launch", "hosts", "one.yaml", "--hostfile", "hosts")
    assert sorted(path.name for path in cluster.folder.iterdir()) == ["hosts", "mix.yaml", "one.yaml"]


def test_a_hostfile_that_is_not_there_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--hostfile: none can't be read" in refused(capsys, "launch", "hosts", "one.yaml", "--hostfile", "none")


def test_gpus_fills_in_what_the_hostfile_does_not_say(cluster: Cluster) -> None:
    file = write(cluster, "--gpus", "2", "--port", "1234", hostfile="node0\nnode1\n")
    assert cluster.start(file, "node0").wait(60) == 0
    assert cluster.called("launcher") == [
        expected(cluster, 0).replace("29500", "1234").replace("processes=8", "processes=4")
    ]


def test_the_default_place_is_beside_the_run(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    run("launch", "hosts", "one.yaml", "--hostfile", "hosts")
    file = Path(capsys.readouterr().out.splitlines()[0])
    assert file == cluster.folder / "runs" / "one.hosts.sh"
    assert file.is_file()
