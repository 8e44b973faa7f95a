"""What runs inside the processes that launch.py starts: one that runs accelerate, and the ranks that it starts.

    python -m hymba_tune.rank host PARENT REPORTS ARGUMENTS    runs `accelerate launch ARGUMENTS`
    python -m hymba_tune.rank work REPORTS FUNCTION ARGUMENTS  runs FUNCTION (module:name) on text arguments

Each dies with the process that started it, however that one ends. Ranks other than 0 write what they print to
REPORTS/rank-N.log; a rank that fails leaves REPORTS/rank-N.json, with its error and when it came, and one that hangs
with where it is.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError

HOST = "HYMBA_TUNE_HOST"
"""Environment variable: the process that runs accelerate, which the ranks must not survive."""
REPORTS = "HYMBA_TUNE_REPORTS"
"""Environment variable of a rank: the folder that its error goes to."""
_PR_SET_PDEATHSIG = 1
_AT_ONCE_SECONDS = 10
"""torchrun asks the other ranks to end when one has failed, and kills those that have not ended 30 seconds later."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent, process id `parent`, has ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def host(parent: int, reports: Path, arguments: Sequence[str]) -> int:
    """Run `accelerate launch`; what it knows of ranks that a signal ended goes to reports/host-NAME-PID.json."""
    die_with_parent(parent)
    report = reports / f"host-{socket.gethostname()}-{os.getpid()}.json"
    os.environ[HOST] = str(os.getpid())
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # torchrun tells every failure at length; launch.py tells the first, once
    try:
        launch_command(launch_command_parser().parse_args(list(arguments)))
    except ChildFailedError as error:
        _write(report, {"exit_codes": _exit_codes(error.failures)})
        return 1
    except Exception as error:
        _write(report, {"exit_codes": {}, **_described(error)})
        return 1
    return 0


def _exit_codes(failures: Mapping[int, Any]) -> dict[int, int]:
    """By rank, of torchrun's failures: without ranks that it killed itself, since they did not end when asked."""
    first = min(failure.timestamp for failure in failures.values())
    return {rank: found.exitcode for rank, found in failures.items() if found.timestamp < first + _AT_ONCE_SECONDS}


def work(reports: Path, function: str, arguments: Sequence[str]) -> int:
    """Run one rank's share."""
    die_with_parent(int(os.environ[HOST]))
    rank = int(os.environ.get("RANK", "0"))
    log = reports / f"rank-{rank}.log"
    os.environ[REPORTS] = str(reports)
    if rank:
        _print_to(log)
    try:
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(*arguments)
        _leave_groups()
    except Exception as error:
        report_failure(reports, error)
        return 1
    return 0


def _leave_groups() -> None:
    """End torch's process groups in time: threads that they still have as the process ends may abort it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def report_failure(reports: Path, error: BaseException) -> None:
    """Leave this rank's error where launch.py looks for it, and the traceback in its log.

    That it hung stays said: as ranks that hang end one by one, the others lose their connection to them.
    """
    rank = int(os.environ.get("RANK", "0"))
    with (reports / f"rank-{rank}.log").open("a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    report = reports / f"rank-{rank}.json"
    if not report.exists():
        _write(report, {"rank": rank, "time": time.time(), **_described(error)})


def report_hang(reports: Path, step: int, since: float, stack: traceback.StackSummary) -> None:
    """Leave in the reports that this rank has waited since a time (Unix seconds) after a step, and its whole stack."""
    rank, place = int(os.environ.get("RANK", "0")), stack[-1]
    with (reports / f"rank-{rank}.log").open("a", encoding="utf-8") as file:
        file.write("".join(["no step any more; this process is here:\n", *stack.format()]))
    where = f"{place.filename}:{place.lineno} ({place.name})"
    processes = int(os.environ["WORLD_SIZE"])
    left = {"rank": rank, "time": time.time(), "hang": where, "step": step, "since": since, "processes": processes}
    _write(reports / f"rank-{rank}.json", left)


def _described(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    return {"user_error": isinstance(error, UserError), "type": kind.__name__, "message": str(error)}


def _write(path: Path, value: Any) -> None:
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(value), encoding="utf-8")
    draft.replace(path)


def _print_to(path: Path) -> None:
    """Everything that this process and its children print, also from C, goes to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def main(arguments: Sequence[str]) -> int:
    role, *rest = arguments
    if role == "host":
        return host(int(rest[0]), Path(rest[1]), rest[2:])
    return work(Path(rest[0]), rest[1], rest[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
