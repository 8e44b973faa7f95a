"""Several processes for one piece of work: `accelerate launch`, watched, and ended with everything below it.

    this process -> one that runs accelerate (rank.py, host) -> the ranks (rank.py, work) -> a function of ours

Rank 0 prints to this terminal, the others to files. Whatever goes wrong comes back as one error: that of the rank that
failed first. However this process ends, nothing that it started stays: the kernel ends each process with its parent.
With several machines each has such a tree; machines.py holds them together.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError
from hymba_tune.machines import Alone, Failure, PartnerEnded, Partners
from hymba_tune.provenance import gpus, version
from hymba_tune.recipe import Recipe
from hymba_tune.topology import Topology

# What torchrun waits between asking ranks to end and ending them, and some.
PATIENCE_SECONDS = 40.0
_CHECK_SECONDS = 0.5
# Part of an optimizer's name -> the package that brings it; the first that fits.
_OPTIMIZER_PACKAGES = {
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "lomo": "lomo-optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "torch-optimi",
    **dict.fromkeys(("torch_4bit", "torch_8bit"), "torchao"),
    **dict.fromkeys(("8bit", "paged", "bnb", "lion", "ademamix"), "bitsandbytes"),
}
# A rank that another's failure ended: by torchrun (SIGTERM), or by a connection that broke.
_ENDED_BY_US = {-signal.SIGTERM, -signal.SIGINT}


class RankFailed(Exception):
    """A rank ended by an error that is no mistake of the user's; the message names rank, error and log."""


def check_launch(recipe: Recipe) -> None:
    """What this machine lacks for the recipe's `launch` section.

    Raises:
        UserError: naming it, and what to install or to take instead.
    """
    launch = recipe.launch
    sharing = launch.sharing
    devices = len(gpus())
    if sharing.kind == "fsdp" and not devices:
        raise UserError(
            f"launch.config: {launch.config}: FSDP2 needs GPUs, and there is none here (on a CPU accelerate would run "
            "plain DDP and not say so); use ddp, zero2 or zero3"
        )
    check_packages(recipe)
    if sharing.kind == "deepspeed" and (sharing.offload or not devices):
        _check_compiling(launch.config)
    if devices and launch.processes > devices * launch.machines:
        most = devices * launch.machines
        where = "here" if launch.machines == 1 else f"on each of launch.machines: {launch.machines}"
        raise UserError(f"launch.processes: {launch.processes}, but there are {devices} GPUs {where}; set it to {most}")


def check_packages(recipe: Recipe) -> None:
    """That this Python has what the recipe's `launch` section and its optimizer need, whatever the machine.

    Raises:
        UserError: with what to install.
    """
    if recipe.launch.sharing.kind == "deepspeed" and version("deepspeed") is None:
        raise UserError(f"launch.config: {recipe.launch.config} needs DeepSpeed: pip install 'hymba-tune[deepspeed]'")
    optimizer = str(recipe.trainer_arguments.get("optim", "adamw_torch"))
    package = next((package for part, package in _OPTIMIZER_PACKAGES.items() if part in optimizer), None)
    if package is not None and version(package) is None:
        raise UserError(f"trainer.optim: {optimizer} needs {package}: pip install {package}, or use adamw_torch")


def _check_compiling(config: str) -> None:
    """DeepSpeed builds CPU Adam for offloading, and a shared-memory operation for processes on a CPU."""
    for tools, remedy in ((("c++", "g++"), "install g++"), (("ninja",), "pip install ninja")):
        if not any(shutil.which(tool, path=_environment()["PATH"]) for tool in tools):
            raise UserError(f"launch.config: {config}: DeepSpeed compiles here and finds no {tools[-1]}; {remedy}")


def launch(
    function: str, arguments: Sequence[str], topology: Topology, reports: Path, partners: Partners | None = None
) -> None:
    """Call a function in every process of a topology, and return when all have returned.

    Args:
        function: `package.module:name`; it finds rank and world size in the environment, as torchrun sets them.
        arguments: texts that it is called with.
        reports: a folder for what ranks other than 0 print and for errors; emptied first. All machines share it.
        partners: the other machines; the topology is what their `prepare` said.

    Raises:
        UserError: a rank raised one, or was killed; the message is that of the first.
        RankFailed: a rank raised something else first.
        PartnerEnded: the ranks of this machine were ended because another's failed, which the first machine tells.
        KeyboardInterrupt, SystemExit: this process got SIGINT, or SIGTERM; the ranks were told.
    """
    partners = partners or Alone()
    _empty(reports, topology.machine)
    command = [sys.executable, "-m", "hymba_tune.rank", "host", str(os.getpid()), str(reports)]
    command += [*topology.arguments(), "-m", "hymba_tune.rank", "work", str(reports), function, *arguments]
    partners.begin()
    process = subprocess.Popen(command, env=_environment(), start_new_session=True)
    stopped, code = False, 0
    with _forwarded_signals(process) as received:
        try:
            code = _wait(process, partners)
        except PartnerEnded:
            stopped = True
        finally:
            _end(process)
    failures = partners.end(_failures(reports, code))
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
    if failures:
        first = min(failures, key=lambda failure: failure.time)
        raise (UserError if first.user_error else RankFailed)(first.message)
    if stopped:
        raise PartnerEnded


def _wait(process: subprocess.Popen[bytes], partners: Partners) -> int:
    """The exit code of a process; raises PartnerEnded where it is to end instead."""
    while True:
        try:
            return process.wait(_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            partners.check()


def _empty(reports: Path, machine: int) -> None:
    if machine == 0:
        shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True, exist_ok=True)


def _environment() -> dict[str, str]:
    """This process' environment, in which this package and this Python's commands (ninja) are found first."""
    package, commands = str(Path(__file__).resolve().parents[1]), str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PYTHONPATH": _joined(package, os.environ.get("PYTHONPATH", "")),
        "PATH": _joined(commands, os.environ.get("PATH", os.defpath)),
    }


def _joined(first: str, others: str) -> str:
    return os.pathsep.join(dict.fromkeys(filter(None, [first, *others.split(os.pathsep)])))


@contextmanager
def _forwarded_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM of this process end the ranks in order; yields those that came.

    A second one ends them at once.
    """
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a process that is running still."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failures(reports: Path, code: int) -> list[Failure]:
    """What ranks and hosts left in the reports of a launch that ended with a code; nothing where that is 0."""
    if not code:
        return []
    hosts = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("host-*.json")]
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("rank-*.json")]
    failures = [_killed(int(rank), code, reports) for host in hosts for rank, code in host["exit_codes"].items()]
    hung = [rank for rank in ranks if "hang" in rank]
    if hung:
        failures.append(Failure(min(rank["time"] for rank in hung), _hang(hung, reports), user_error=True))
    failed = [rank for rank in ranks if "hang" not in rank]
    for left in (*failed, *(host for host in hosts if "message" in host)):
        where = f"rank {left['rank']} ({reports / 'rank-'}{left['rank']}.log)" if "rank" in left else "the launcher"
        message = left["message"] if left["user_error"] else f"{left['type']} in {where}: {left['message']}"
        failures.append(Failure(left.get("time", math.inf), message, left["user_error"]))
    silent = Failure(math.inf, f"the processes ended with code {code} and left no error; logs in {reports}")
    return [failure for failure in failures if failure] or [silent]


def _killed(rank: int, code: int, reports: Path) -> Failure | None:
    """That a signal not of ours ended a rank: what others then say follows from it."""
    if code >= 0 or code in _ENDED_BY_US:
        return None
    name = signal.Signals(-code).name
    hint = " (out of memory, as a rule: a run takes less with a lower trainer.per_device_train_batch_size or "
    hint += "data.max_length or another launch.config, an evaluation with a lower --batch-tokens)"
    return Failure(
        0, f"rank {rank} was ended by {name}{hint if name == 'SIGKILL' else ''}; logs in {reports}", user_error=True
    )


def _hang(hung: Sequence[Mapping[str, Any]], reports: Path) -> str:
    """Where each rank waits: that of the fewest first, who as a rule keep the others waiting."""
    places: dict[str, list[int]] = {}
    for rank in hung:
        places.setdefault(f"after step {rank['step']} in {rank['hang']}", []).append(rank["rank"])
    silent = sorted({*range(hung[0]["processes"])} - {rank["rank"] for rank in hung})
    if silent:
        places["silent (stopped, or its machine is)"] = silent
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(rank["since"] for rank in hung)))
    told = [f"{_named(ranks)} {place}" for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))]
    return (
        f"training: no step since {since}: {'; '.join(told)}. Each one's stack lies in {reports}; if a step takes that "
        "long, raise launch.step_timeout"
    )


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
