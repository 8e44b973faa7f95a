"""A killed run leaves no worker behind, whoever forked it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
