"""What a script starts: one command, the same on every machine, and the script itself as a file.

Each machine runs `hymba-tune run` on the recipe; see machines.py for how they find each other.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hymba_tune.errors import UserError
from hymba_tune.launch import check_packages
from hymba_tune.pipeline import load_pipeline

WORD = re.compile(r"[A-Za-z0-9@:._,+=/%\[\]()&|*-]+")
"""What a value of SLURM looks like: it holds no space, quote or control character, so a #SBATCH line keeps it whole."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_HERE = ("launch.machines", "launch.processes")


@dataclass(frozen=True)
class Job:
    """A run on several machines.

    command: what each executes, in `folder`. processes: on each machine. output: the run directory, or the pipeline's
    folder. variables: of the environment, written into the script.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    machines: int
    processes: int
    output: Path
    variables: dict[str, str]


def make_job(
    recipe: str,
    overrides: Sequence[str],
    *,
    machines: int,
    processes: int,
    config: str | None = None,
    tiny: bool = False,
    variables: Sequence[str] = (),
) -> Job:
    """The job that runs a recipe or pipeline, checked as a run would.

    Args:
        processes: on each machine.
        config: of accelerate, for all stages; None takes what the recipe says, and ZeRO-2 where it says `single`.
        variables: names of variables of this environment, which the machines are to have too.

    Raises:
        UserError: the recipe is wrong, or can't be shared out so.
    """
    given = [text for text in overrides if text.split("=")[0] in _SET_HERE]
    if given:
        raise UserError(f"{given[0]}: the number of machines and of processes on each decides it; leave it out")
    config = config or _config(recipe, overrides, tiny, machines, processes)
    settings = [f"launch.machines={machines}", f"launch.processes={machines * processes}"]
    settings += [] if config is None else [f"launch.config={config}"]
    pipeline = load_pipeline(recipe, [*settings, *overrides], tiny)
    for stage in pipeline.stages:
        check_packages(stage)
    folder = pipeline.folder
    name = pipeline.stages[0].stage if folder is None else Path(recipe).stem
    return Job(
        name=name,
        command=(
            *(sys.executable, "-m", "hymba_tune.cli", "run", recipe),
            *(["--tiny"] if tiny else []),
            *settings,
            *overrides,
        ),
        folder=Path.cwd(),
        machines=machines,
        processes=processes,
        output=Path(pipeline.stages[0].output.dir) if folder is None else folder,
        variables={name: _value(name) for name in variables},
    )


def _config(recipe: str, overrides: Sequence[str], tiny: bool, machines: int, processes: int) -> str | None:
    stages = load_pipeline(recipe, overrides, tiny).stages
    if machines * processes == 1 or any(stage.launch.config != "single" for stage in stages):
        return None
    return "multinode_zero2" if machines > 1 else "zero2"


def _value(name: str) -> str:
    if not _VARIABLE.fullmatch(name) or name not in os.environ:
        raise UserError(f"--env: {name}: not set here; export {name}=VALUE first, or leave it out")
    return os.environ[name]


def render_script(template: str, **values: Any) -> str:
    """A template of templates/; what it prints is quoted for the shell."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hymba_tune.cluster", "templates"),
        autoescape=False,  # a shell has its own rules: see `_quoted`
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def _quoted(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, (list, tuple)) else shlex.quote(str(value))


def write_script(file: Path, text: str, job: Job) -> Path:
    """Write a script, for no other user's eyes if it holds variables of the environment; one that was edited is kept.

    Raises:
        UserError: another text is there, or the folder can't be written.
    """
    try:
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise UserError(f"{file}: is there, and is another script; delete it, or name another file with --out")
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        draft.touch(0o700 if job.variables else 0o755)
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise UserError(f"--out: {file} can't be written ({error.strerror}); name another file") from None
    return file
