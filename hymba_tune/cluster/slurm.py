"""A recipe as a SLURM job: the batch script, and handing it in."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hymba_tune.cluster.job import WORD, Job, render_script
from hymba_tune.errors import UserError

CPUS_A_GPU = 8
SIGNAL_SECONDS = 180
"""How long before its time limit a job is told: ranks get 40 s to end, and SLURM may send the signal 60 s late."""
RESTARTS = 50

_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
_NAME = re.compile(r"[a-z][a-z-]*")
# What the script itself says.
_OURS = {"job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "open-mode", "requeue"}
_OURS |= {"signal", "output", "chdir"}


@dataclass(frozen=True)
class Request:
    """What a job asks SLURM for besides nodes and GPUs.

    cpus: on each node. restarts: how often it goes back into the queue at its time limit. options: of sbatch, by their
    long names without `--`.
    """

    cpus: int
    restarts: int = RESTARTS
    options: Mapping[str, str] | None = None


def read_options(named: Mapping[str, str | None], others: Sequence[str]) -> dict[str, str]:
    """Options of sbatch from those with a name of their own here and from `name=value` texts.

    Raises:
        UserError: one can't be, or is what the script itself says.
    """
    options = {name: value for name, value in named.items() if value is not None}
    for text in others:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise UserError(f"--option {text}: write NAME=VALUE, with a long option of sbatch: constraint=h100")
        if name in _OURS or name in options:
            raise UserError(f"--option {text}: the script says {name} already; change it there")
        options[name] = value
    for name, value in options.items():
        if not WORD.fullmatch(value):
            raise UserError(f"--{name}: {value!r}: no value that SLURM takes (letters, digits, no spaces)")
    if "time" in options and not _TIME.fullmatch(options["time"]):
        raise UserError(f"--time: {options['time']!r}: write MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    return options


def slurm_script(job: Job, request: Request) -> str:
    """The batch script of a job, for sbatch."""
    options = {
        "job-name": job.name,
        "nodes": job.machines,
        "ntasks-per-node": 1,
        "gpus-per-node": job.processes,
        "cpus-per-task": request.cpus,
        **(request.options or {}),
        "output": f"{str(job.output).replace('%', '%%')}-%j.log",
    }
    return render_script(
        "slurm.sh.jinja",
        job=job,
        options=options,
        cpus=request.cpus,
        seconds=SIGNAL_SECONDS,
        restarts=request.restarts,
    )


def find_sbatch() -> str:
    """The command that takes jobs. Raises UserError where there is none."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError("--submit: no sbatch on PATH; run this on a login node of the cluster, or leave --submit out")
    return sbatch


def submit(file: Path, sbatch: str) -> str:
    """Hand a script in; returns the job's number.

    Raises:
        UserError: SLURM refuses it, with what it says.
    """
    done = subprocess.run([sbatch, "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refuses {file}: {' '.join(done.stderr.split()) or f'code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]
