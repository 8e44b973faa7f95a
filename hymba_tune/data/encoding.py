"""What all kinds of rows need: a mix encoded by several processes, and a folder written whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

EXAMPLES_A_WORKER = 5000
"""Fewer are encoded faster than another process starts."""

TOKENS = datasets.List(datasets.Value("int32"))


@contextmanager
def written_whole(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(draft, scratch): two empty folders. The draft takes the place of `folder` if the block ends without an error."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    draft, scratch = unfinished / "draft", unfinished / "scratch"
    try:
        draft.mkdir(parents=True)
        scratch.mkdir()
        yield draft, scratch
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def encode_all(
    dataset: datasets.Dataset,
    encode: Callable[..., dict[str, list[Any]]],
    features: datasets.Features,
    file: Path,
    workers: int | None,
) -> datasets.Dataset:
    """`encode` over batches of a realised mix, written to `file`; the same with any number of workers.

    workers: processes (None: up to one a core, as far as there is work for them).
    """
    workers = workers or min(len(os.sched_getaffinity(0)), 1 + len(dataset) // EXAMPLES_A_WORKER)
    return dataset.map(
        encode,
        batched=True,
        batch_size=100,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(file),
        new_fingerprint="encoded",
        desc="Encoding",
    )
