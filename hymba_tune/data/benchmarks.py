"""The benchmarks' own items: read once here for scoring and for keeping them out of training data.

A folder named by `data` (recipe: `eval.data`) or by HYMBA_TUNE_DATA holds the published files, as SOURCES lists them;
without one, rows come from the hub. Rows are the publisher's, unchanged.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError

ENVIRONMENT = "HYMBA_TUNE_DATA"

Row = dict[str, Any]


class BenchmarkNotFound(UserError):
    """A benchmark's rows are neither in the data folder nor on a reachable hub; the message says how to get them."""


@dataclass(frozen=True)
class Source:
    """Where a benchmark's splits lie: files below the data folder, and the hub's data set."""

    files: dict[str, str]
    hub: tuple[str, str | None]
    get: str
    """how to get the files"""


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        ("openai/gsm8k", "main"),
        "github.com/openai/grade-school-math, folder grade_school_math/data",
    ),
}


def data_folder(data: str | Path | None = None) -> Path | None:
    """The folder with benchmark files: `data`, else HYMBA_TUNE_DATA (or its subfolder data/), else None (the hub)."""
    named = data or os.environ.get(ENVIRONMENT)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{'eval.data' if data else ENVIRONMENT}: {folder} is not a folder; name one with benchmark files"
        )
    return folder / "data" if (folder / "data").is_dir() else folder


def benchmark_file(name: str, split: str, data: str | Path | None = None) -> Path | None:
    """The split's file, or None where rows come from the hub.

    Raises BenchmarkNotFound if a data folder is named and the file is not in it.
    """
    folder = data_folder(data)
    if folder is None:
        return None
    source = SOURCES[name]
    path = folder / source.files[split]
    if not path.is_file():
        raise BenchmarkNotFound(f"{name}: {path} is missing; get it from {source.get}")
    return path


def benchmark_rows(name: str, split: str, data: str | Path | None = None) -> list[Row]:
    """All rows of a benchmark's split, in the published order.

    Raises BenchmarkNotFound where there is neither file nor hub, UserError for a broken file (with its line).
    """
    path = benchmark_file(name, split, data)
    return list(read_jsonl(path)) if path is not None else _hub_rows(name, split)


def read_jsonl(path: Path) -> Iterator[Row]:
    """One object a line; blank lines are skipped.

    Raises UserError with file and line for anything else.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); repair or remove the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: {type(row).__name__} where an object is needed; repair the line")
            yield row


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets

    source = SOURCES[name]
    path, subset = source.hub
    try:
        return list(datasets.load_dataset(path, subset, split=split))
    except Exception as error:  # the hub client raises its own, requests', and OS errors alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BenchmarkNotFound(
            f"{name}: hub data set {path} not reachable ({reason}); get {source.get} and name its folder in eval.data "
            f"or {ENVIRONMENT}"
        ) from None
