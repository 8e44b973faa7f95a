"""A run directory: the one place that knows every name a run writes.

    lock                        held while a run is alive; names its process and host
    recipe.yaml                 the resolved recipe
    environment.json            code, packages, machine and command of the last start
    state.json                  what is finished, with fingerprints
    data.json                   sources, counts and fingerprint of the data
    contamination.json          conversations that repeat a benchmark's test item, and were left out
    rows/, validation-rows/     the tokenised, packed rows (Arrow)
    initial/                    the random weights that a `from: scratch` run starts from
    metrics.jsonl               one line a logging step, and one an evaluation on held-out rows
    warnings.json               what looked wrong: a list of {"stage_step", "message"}
    bad-batch-N.json            the batch that stopped the run: token ids, labels, text (N: the process that had it)
    logs/                       what trainer.report_to writes on this machine
    checkpoints/checkpoint-N/   what an interrupted run goes on from
    ranks/                      what processes other than the first printed, and errors (training in several)
    model/ or adapter/          the result: a checkpoint for from_pretrained, or a PEFT adapter
    eval/before/TASK.json       scores, samples and settings of one task, before and after the stage
    eval/after/TASK.json
    results.json, report.md, report.html    the report

The folder of a pipeline holds a run directory a stage, environment.json, pipeline.json (its stages in order) and the
report of the whole.

Files are replaced whole: a reader or a crash sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from hymba_tune.errors import UserError
from hymba_tune.provenance import provenance

Moment = Literal["before", "after"]

# A data loader's workers look every 5 seconds whether their run is still there.
LEFTOVER_SECONDS = 10.0

SPARE_BYTES = 64 * 2**20
"""What stays free on the disk beside what is written: states, logs, the file system's own needs."""


class RunDir:
    """The names in a run directory, and safe writing under them. Making one touches no disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = self.path / "lock"
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.state = self.path / "state.json"
        self.data = self.path / "data.json"
        self.contamination = self.path / "contamination.json"
        self.rows = self.path / "rows"
        self.validation_rows = self.path / "validation-rows"
        self.initial = self.path / "initial"
        self.metrics = self.path / "metrics.jsonl"
        self.warnings = self.path / "warnings.json"
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.ranks = self.path / "ranks"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.eval = self.path / "eval"
        self.results = self.path / "results.json"
        self.report = self.path / "report.md"
        self.page = self.path / "report.html"
        self.pipeline = self.path / "pipeline.json"

    def evaluation(self, moment: Moment) -> Path:
        """The folder with one file a task."""
        return self.eval / moment

    def bad_batch(self, process: int) -> Path:
        """What a process keeps of a batch whose loss or gradient is no number."""
        return self.path / f"bad-batch-{process}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunDir]:
        """Hold the directory for this process; it is made if need be.

        The lock dies with the process, however it ends. Raises UserError if another run holds it.
        """
        _make_folder(self.path)
        with _open_lock(self.lock) as file:
            _take_lock(file, self.path)
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
            file.flush()
            try:
                yield self
            finally:
                file.truncate(0)

    def is_held(self) -> bool:
        """Whether a run is alive in the directory. The lock is tried only where a run has left its name in it."""
        try:
            with self.lock.open(encoding="utf-8") as file:
                if not file.read():
                    return False
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def write_text(self, name: str | Path, text: str) -> Path:
        """Replace `name` (relative to the run directory, or a path in it) as a whole."""
        target = self.path / name
        _make_folder(target.parent)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return target

    def write_json(self, name: str | Path, value: Any) -> Path:
        """write_text with indented JSON; NaN and infinity, which JSON does not know, are refused."""
        return self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str | Path) -> Any:
        """What write_json wrote, None if it is not there. Raises UserError if it was broken from outside."""
        target = self.path / name
        try:
            return json.loads(target.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{target}: not valid JSON ({error}); delete it to have it made again") from None

    def warn(self, stage_step: str, message: str) -> None:
        """Print a warning and keep it in warnings.json; one that is there already is neither printed nor added."""
        warning = {"stage_step": stage_step, "message": message}
        known = self.read_json(self.warnings) or []
        if warning not in known:
            self.write_json(self.warnings, [*known, warning])
            print(f"warning: {stage_step}: {message}", file=sys.stderr)

    def warned(self, stage_step: str) -> bool:
        """Whether a step of the run has given a warning already."""
        return any(warning["stage_step"] == stage_step for warning in self.read_json(self.warnings) or [])

    def clear(self) -> None:
        """Empty the directory of an earlier run; if that is cut, the state left there is no recipe's."""
        self.write_json(self.state, {"fingerprint": "cleared", "recipe": {}, "finished": []})
        for entry in self.path.iterdir():
            if entry not in (self.lock, self.state):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write_environment(self) -> Path:
        """Record code, packages, machine and command of this start."""
        return self.write_json(self.environment, provenance())


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if the disk of `folder` (or of what exists above it) has less than `needed` bytes and some spare.

    what: what is to be written, for the message.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: {what} needs {_size(needed)}, but {_size(free)} are free on its disk; nothing was written. "
            "Free some and run the same command: it goes on from the last checkpoint"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output.dir: {path} cannot be made ({error.strerror}); set another output.dir") from None


def _open_lock(path: Path) -> IO[str]:
    try:
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output.dir: {path} cannot be written ({error.strerror}); set another output.dir") from None


def _take_lock(file: IO[str], path: Path) -> None:
    """Lock the file or raise UserError. A killed run's last workers get some seconds to notice and leave."""
    patience = time.monotonic() + LEFTOVER_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            holder = _holder(file)
        if isinstance(holder, str):
            raise UserError(f"{path}: in use by {holder}; wait for it, or set another output.dir")
        if time.monotonic() > patience:
            raise UserError(
                f"{path}: process {holder} is gone, but one that it started still holds the directory; "
                f"end it (`fuser {file.name}` shows it)"
            )
        time.sleep(0.1)


def _holder(file: IO[str]) -> str | int:
    """Who holds the lock, in words; only its process id if that process is gone from this machine."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        pid, host = int(holder["pid"]), str(holder["host"])
    except (ValueError, KeyError, TypeError):
        return "another run"
    gone = host == socket.gethostname() and not Path(f"/proc/{pid}").exists()
    return pid if gone else f"process {pid} on {host}"


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
