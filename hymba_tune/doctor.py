"""What this machine has: versions against what the code is written for, devices, compilers, and the backend of each
operation with the reason why not the others."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hymba_tune.provenance import hardware, version

OPTIONAL = {
    "deepspeed": "training on several GPUs with ZeRO: pip install -e '.[deepspeed]'",
    "lm-eval": "GSM8K, IFEval and GPQA by their standard protocols: pip install -e '.[eval]'",
    "mamba-ssm": "model.backend: packages, one document: pip install --no-build-isolation -e '.[cuda]'",
    "causal-conv1d": "model.backend: packages, one document; installed with mamba-ssm",
    "flash-attn": "model.backend: packages, documents within the window, so global layers; installed with mamba-ssm",
}
"""Packages that nothing needs, what each is for and how it comes."""


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and whether that is right (None: absent, and not needed)."""

    subject: str
    found: str
    ok: bool | None = True


_MARKS = {True: "[green]ok[/]", None: "-", False: "[bold red]no[/]"}


def examine(console: Console | None = None) -> bool:
    """Print every finding; False if one of them keeps runs from working."""
    console = console or Console()
    sections = {
        "Machine": machine(),
        "Packages": packages(),
        "Optional packages": optional_packages(),
        "Data": [data_folder()],
        "Backends": backends(),
    }
    for title, findings in sections.items():
        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in findings:
            table.add_row(_MARKS[finding.ok], finding.subject, escape(finding.found))
        console.print(f"[bold]{title}[/]", table, "", sep="\n")
    return all(finding.ok is not False for findings in sections.values() for finding in findings)


def machine() -> list[Finding]:
    """Python, CPU, GPUs and what compiles the kernels."""
    facts = hardware()
    gpus = facts["gpus"]
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    nvcc = shutil.which("nvcc")
    return [
        Finding("Python", platform.python_version()),
        Finding("system", facts["system"]),
        Finding("CPU", f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB"),
        *[Finding("GPU", gpu) for gpu in gpus],
        *([] if gpus else [Finding("GPU", "none: everything runs on the CPU", None)]),
        Finding("C compiler", compiler or "none: the fast CPU kernels can't be built", bool(compiler) or None),
        Finding("nvcc", nvcc or "none: needed only to build the cuda extra", bool(nvcc) or None),
    ]


def packages() -> list[Finding]:
    """Every required package against the range that the code is written for."""
    return [_package(requirement) for requirement in _requirements() if requirement.marker is None]


def optional_packages() -> list[Finding]:
    """Packages of the extras: the version, or what is missing without them."""
    ranges = {requirement.name: requirement for requirement in _requirements() if requirement.marker is not None}
    return [
        _package(ranges[name]) if version(name) else Finding(name, f"absent. {purpose}", None)
        for name, purpose in OPTIONAL.items()
    ]


def data_folder() -> Finding:
    """HYMBA_TUNE_DATA, where recipes on local files look for data."""
    folder = os.environ.get("HYMBA_TUNE_DATA")
    if not folder:
        return Finding("HYMBA_TUNE_DATA", "not set: recipes on local files (sft1_files) and some tests need it", None)
    if not Path(folder).is_dir():
        return Finding(
            "HYMBA_TUNE_DATA", f"{folder} is no folder; set it to the folder with hymba-1.5b/ and data/", False
        )
    return Finding("HYMBA_TUNE_DATA", folder)


def backends() -> list[Finding]:
    """For each operation the backend that `auto` takes here, and why not the others."""
    from hymba_tune.model import ops

    findings: dict[str, list[str]] = {}
    for choice in ops.explain():
        state = "" if choice.available else "not "
        findings.setdefault(choice.op, []).append(f"{choice.backend}: {state}available ({choice.reason})")
    return [Finding(op, "\n".join(lines)) for op, lines in findings.items()]


def _requirements() -> Iterable[Requirement]:
    return [Requirement(text) for text in requires("hymba-tune") or []]


def _package(requirement: Requirement) -> Finding:
    found = version(requirement.name)
    if found is None:
        return Finding(
            requirement.name, f"absent, {requirement.specifier} is needed: pip install '{requirement}'", False
        )
    public = re.sub(r"\+.*", "", found)  # torch's 2.13.0+cpu is 2.13.0
    if not requirement.specifier.contains(public, prereleases=True):
        return Finding(requirement.name, f"{found}, but {requirement.specifier} is supported", False)
    return Finding(requirement.name, f"{found} ({requirement.specifier})")
