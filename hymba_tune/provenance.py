"""Where a result came from: the code, the packages, the machine, the command, the time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hymba_tune import __version__
from hymba_tune.paths import REPOSITORY

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "deepspeed",
    "lm-eval",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
)
"""The packages whose version can change a number."""


def provenance() -> dict[str, Any]:
    """One JSON-ready record; unknown facts are null."""
    return {
        "hymba_tune": __version__,
        "git": git_state(REPOSITORY),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "hardware": hardware(),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None if it is absent. Imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a clone and whether its tracked files were changed since; None where there is no clone."""
    if not (folder / ".git").exists():
        return None
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changes = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "changed": bool(changes) if changes is not None else None}


def hardware() -> dict[str, Any]:
    """CPU, memory and GPUs of this machine, asked without importing torch."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """`name, memory, driver` of each NVIDIA GPU."""
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    return listed.splitlines() if listed else []


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
