"""What all kinds of rows need: a mix encoded by several processes in parts, into a folder written whole or not at all.

    dataset (memory-mapped)   0 ......... PART ......... 2 PART .... n
                              encode       encode        encode        several processes, Arrow on disk
    folder                    rows-00000   rows-00001    rows-00002    .arrow, and counts.json, fingerprint

What is held in memory is bounded by one part, however large the mix, but for a few numbers a conversation. A part that
is finished stays when the work is cut off: the next start with the same fingerprint goes on with the next part.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerFast

from hymba_tune.errors import UserError

PART = 50_000
"""Examples of a part: enough to fill rows well and to keep the processes busy, a few hundred megabytes of token ids."""

EXAMPLES_A_WORKER = 5000
"""Fewer are encoded faster than another process starts."""

TOKENS = datasets.List(datasets.Value("int32"))

Counts = dict[str, Any]

_LARGEST = ("longest", "max_length")


def encode_parts(
    dataset: datasets.Dataset,
    encode: Callable[..., dict[str, list[Any]]],
    features: datasets.Features,
    draft: Path,
    write: Callable[[datasets.Dataset, Path], Counts],
    workers: int | None = None,
) -> Iterator[Counts]:
    """What `write` counted in each part of a realised mix, in order; finished parts in `draft` are not made again.

    Args:
        encode: batches of conversations -> columns of `features`; run by `workers` processes (None: up to one a core,
            as far as there is work for them), with the same result for any number.
        write: (an encoded part, the file for its rows) -> counts as JSON values. A part without rows needs no file.
    """
    parts = range(0, len(dataset), PART)
    for number, start in enumerate(parts):
        finished = draft / f"part-{number:05}.json"
        if not finished.exists():
            part = dataset.select(range(start, min(start + PART, len(dataset))))
            title = f"Encoding, part {number + 1} of {len(parts)}" if len(parts) > 1 else "Encoding"
            counts = _encode_part(part, encode, features, draft, number, write, workers, title)
            _write_whole(finished, json.dumps(counts))
        yield json.loads(finished.read_text())


def added_up(parts: Iterable[Counts]) -> Counts:
    """The counts of all parts together: sums, at any depth; `longest` and `max_length` are the largest."""
    together: Counts = {}
    for part in parts:
        for name, value in part.items():
            if name not in together:
                together[name] = value
            elif isinstance(value, dict):
                together[name] = added_up([together[name], value])
            else:
                together[name] = max(together[name], value) if name in _LARGEST else together[name] + value
    return together


@contextmanager
def resumable(folder: Path, fingerprint: str) -> Iterator[Path]:
    """A draft that takes the place of `folder` if the block ends without an error.

    What an earlier attempt with the same fingerprint left in the draft is still there. After a UserError nothing stays.
    """
    draft = folder.with_name(f"{folder.name}.unfinished")
    mark = draft / "fingerprint"
    if not (mark.exists() and mark.read_text() == fingerprint):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write_whole(mark, fingerprint)
    try:
        yield draft
    except UserError:
        shutil.rmtree(draft)
        raise
    for part in draft.glob("part-*.json"):
        part.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def content_fingerprint(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> str:
    """Changes with whatever changes the rows: realised mix, tokenizer, settings, and the code that makes them."""
    here = Path(__file__).parent
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(here.glob("*.py"))]
    parts = [dataset._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, code, settings, PART]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_parts(folder: Path) -> datasets.Dataset:
    """The rows of a finished folder, memory-mapped."""
    return datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(file)) for file in sorted(folder.glob("rows-*.arrow"))]
    )


def _encode_part(
    part: datasets.Dataset,
    encode: Callable[..., dict[str, list[Any]]],
    features: datasets.Features,
    draft: Path,
    number: int,
    write: Callable[[datasets.Dataset, Path], Counts],
    workers: int | None,
    title: str,
) -> Counts:
    scratch = draft / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    workers = workers or min(len(os.sched_getaffinity(0)), 1 + len(part) // EXAMPLES_A_WORKER)
    encoded = part.map(
        encode,
        batched=True,
        batch_size=100,
        remove_columns=part.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(scratch / "encoded.arrow"),
        new_fingerprint="encoded",
        desc=title,
    )
    counts = write(encoded, draft / f"rows-{number:05}.arrow")
    shutil.rmtree(scratch)
    return counts


def _write_whole(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(text)
    draft.replace(file)
