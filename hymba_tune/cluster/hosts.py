"""A recipe on hosts without a scheduler: a hostfile as DeepSpeed and MPI read it, and one script for all hosts.

# a host a line; slots: processes on it, as many on each
node1 slots=8
node2 slots=8
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from hymba_tune.cluster.job import Job, render_script
from hymba_tune.errors import UserError

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_SLOTS = re.compile(r"slots=([1-9][0-9]*)")


@dataclass(frozen=True)
class Hosts:
    """names: the first leads. processes: on each."""

    names: tuple[str, ...]
    processes: int


def read_hostfile(file: Path, processes: int | None = None) -> Hosts:
    """The hosts of a hostfile.

    Args:
        processes: on each host whose line says no `slots`.

    Raises:
        UserError: with the line that is wrong.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile: {file} can't be read ({error}); give a file with a host a line") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            name, count = _read_line(words, processes)
            if name in slots:
                raise UserError(f"{name} is there already; name each host once")
            if slots and count != (first := next(iter(slots.values()))):
                raise UserError(f"slots={count}: the hosts before have {first}; all need as many")
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from None
        slots[name] = count
    if not slots:
        raise UserError(f"--hostfile: {file} names no host; write one a line: node1 slots=8")
    return Hosts(tuple(slots), next(iter(slots.values())))


def _read_line(words: list[str], processes: int | None) -> tuple[str, int]:
    name, *rest = words
    if not _HOST.fullmatch(name):
        raise UserError(f"{name!r} is no host's name or address")
    if len(rest) > 1 or (rest and not _SLOTS.fullmatch(rest[0])):
        raise UserError(f"{' '.join(rest)!r}: after a host only slots=N may stand, with N processes")
    if not rest and processes is None:
        raise UserError(f"{name}: how many processes? write {name} slots=8, or pass --gpus 8")
    found = _SLOTS.fullmatch(rest[0]) if rest else None
    count = int(found[1]) if found else processes
    assert count is not None
    return name, count


def hosts_script(job: Job, hosts: Hosts, port: int, file: Path) -> str:
    """The script that starts a job on all hosts, and that is each host's share of it.

    Args:
        port: where they meet, on the first.
        file: where the script will lie, on every host.
    """
    return render_script(
        "hosts.sh.jinja",
        job=job,
        hosts=hosts.names,
        address=hosts.names[0],
        port=port,
        remote=shlex.quote(str(file)),
    )
