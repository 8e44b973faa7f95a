"""The benchmarks' own items: read once here for scoring and for keeping them out of training data.

A folder named by `data` (recipe: `eval.data`) or by HYMBA_TUNE_DATA holds the published files, as SOURCES lists them;
without one, rows come from the hub. Rows are the publisher's, in the published order and unchanged (MMLU's files, which
have no header, get the hub's column names).
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError

ENVIRONMENT = "HYMBA_TUNE_DATA"

Row = dict[str, Any]
Reader = Callable[[Path, str], Iterator[Row]]


class BenchmarkNotFound(UserError):
    """A benchmark's rows are neither in the data folder nor on a reachable hub; the message says how to get them."""


def read_jsonl(path: Path, split: str = "") -> Iterator[Row]:
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


def _read_csv(path: Path, split: str) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _read_mmlu(path: Path, split: str) -> Iterator[Row]:
    """All subjects of a split in alphabetical order: question, subject, choices (4), answer (0 to 3)."""
    end = f"_{'val' if split == 'validation' else split}.csv"
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(end)):
                subject = Path(name).name.removesuffix(end)
                text = io.StringIO(archive.read(name).decode("utf-8"), newline="")
                for number, cells in enumerate(csv.reader(text), 1):
                    yield _mmlu_row(f"{path}:{name}:{number}", subject, cells)
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; get it again") from None


def _mmlu_row(place: str, subject: str, cells: list[str]) -> Row:
    if len(cells) != 6 or cells[5] not in tuple("ABCD"):
        raise UserError(f"{place}: {len(cells)} cells where question, four choices and A to D are needed; repair it")
    return {"question": cells[0], "subject": subject, "choices": cells[1:5], "answer": "ABCD".index(cells[5])}


@dataclass(frozen=True)
class Source:
    """Where a benchmark's splits lie.

    files: below the data folder, by split. hub: data set and subset. get: how to get the files. hub_split: the hub's
    name of all splits, where it differs.
    """

    files: dict[str, str]
    hub: tuple[str, str | None]
    get: str
    read: Reader = read_jsonl
    hub_split: str | None = None


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        ("openai/gsm8k", "main"),
        "github.com/openai/grade-school-math, folder grade_school_math/data",
    ),
    "mmlu": Source(
        dict.fromkeys(("dev", "validation", "test"), "mmlu/mmlu.zip"),
        ("cais/mmlu", "all"),
        "github.com/hiyouga/LLaMA-Factory, file evaluation/mmlu/mmlu.zip",
        _read_mmlu,
    ),
    "ifeval": Source(
        {"test": "ifeval/input_data.jsonl"},
        ("google/IFEval", None),
        "github.com/google-research/google-research, folder instruction_following_eval/data",
        hub_split="train",
    ),
    "gpqa": Source(
        {"test": "gpqa/gpqa_main.csv"},
        ("Idavidrein/gpqa", "gpqa_main"),
        "huggingface.co/datasets/Idavidrein/gpqa (its authors ask you to agree to their terms first)",
        _read_csv,
        hub_split="train",
    ),
}


def benchmark_rows(name: str, split: str, data: str | Path | None = None) -> list[Row]:
    """All rows of a benchmark's split, in the published order.

    Raises BenchmarkNotFound where there is neither file nor hub, UserError for a broken file (with its line).
    """
    folder = data_folder(data)
    if folder is None:
        return _hub_rows(name, split)
    source = SOURCES[name]
    path = folder / source.files[split]
    if not path.is_file():
        raise BenchmarkNotFound(f"{name}: {path} is missing; get it from {source.get}")
    return list(source.read(path, split))


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


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets

    source = SOURCES[name]
    path, subset = source.hub
    try:
        return list(datasets.load_dataset(path, subset, split=source.hub_split or split))
    except Exception as error:  # the hub client raises its own errors, its HTTP library's and the system's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BenchmarkNotFound(
            f"{name}: hub data set {path} cannot be loaded ({reason}); get its files from {source.get} and name their "
            f"folder in eval.data or {ENVIRONMENT}"
        ) from None
