"""One source of a mix: its settings, its rows with their places, and its conversations as an Arrow file.

A row's place is what a message shows: `train.jsonl:17`, `rows.parquet: row 3`, `owner/name: row 5`.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import datasets
import numpy as np
import pyarrow.parquet
from datasets.arrow_writer import ArrowWriter
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from hymba_tune.data import formats, plain_text, preferences, synthetic
from hymba_tune.data.formats import FORMATS, BadRow, Row, mapped
from hymba_tune.data.plain_text import TEXTS
from hymba_tune.data.preferences import PREFERENCES, ROWS_TOGETHER, NoPreference
from hymba_tune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
FEATURES = datasets.Features(
    {"conversation": datasets.Value("string"), "source": datasets.Value("string"), "key": datasets.Value("int64")}
)

Kind = Literal["conversations", "preferences", "documents"]
"""What a mix holds: conversations to learn from, pairs of a preferred and a rejected reply, or plain text."""

READERS: dict[Kind, dict[str, Callable[[Row], Row]]] = {
    "conversations": FORMATS,
    "preferences": PREFERENCES,
    "documents": TEXTS,
}
"""The formats of each kind, by name."""

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "conversations": ("user", "assistant", "messages", "conversations", "system", "tools"),
    "preferences": ("prompt", "chosen", "rejected", "conversations", "system", "tools"),
    "documents": ("text",),
}
"""What `map` may make for the formats of each kind."""

GENERATORS: dict[Kind, tuple[str, ...]] = {
    "conversations": tuple(name for name in synthetic.GENERATORS if name not in synthetic.OF_PAIRS),
    "preferences": synthetic.OF_PAIRS,
    "documents": tuple(synthetic.DOCUMENT_GENERATORS),
}
"""The names of the embedded generators of each kind."""

Scalar = str | int | float | bool
Placed = tuple[str, Row | BadRow]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HubDataset(_Settings):
    """A dataset of the Hugging Face hub, as `datasets.load_dataset` names it; `data_files`: these files of it alone."""

    id: str
    subset: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None


class Generated(_Settings):
    """`n` rows of an embedded generator."""

    name: str
    n: PositiveInt
    seed: int = 0


class Range(_Settings):
    """Numbers from `min` to `max`, both included; a text column is read as a number."""

    min: float | None = None
    max: float | None = None


class Source(_Settings):
    """Where conversations come from (`path`, `hub` or `generator`), how a row becomes one, and how many are used.

    path:      a file, a pattern (`chat-*.jsonl`) or a list of them; `${NAME}` is filled in from the environment
    map:       new column: old column, or a text with {columns} in it; done before `format`
    format:    a function of formats.py (`single_turn` where `user` is mapped, else `messages`) or, for a mix of
               preferences, of preferences.py (`preference`); documents have one, `text`
    filter:    column: value, list of values, or {min, max}; rows that don't match are left out and counted
    take:      at most so many conversations (a random choice); `weight`: so many times all of them, 0.5 or 3;
               `share`: this share of the mix. Only one of the three; none means all, once
    epochs:    with `share`: how often each conversation may stand in the mix to fill it (default 1)
    on_bad_row: error stops at the first bad row; skip leaves bad rows out and counts them (default: the mix's)
    """

    path: str | list[str] | None = None
    hub: HubDataset | None = None
    generator: Generated | None = None
    map: dict[str, str] | None = None
    format: str | None = None
    filter: dict[str, Range | list[Scalar] | Scalar] | None = None
    licence: str | None = None
    take: PositiveInt | None = None
    weight: PositiveFloat | None = None
    share: float | None = Field(default=None, gt=0, le=1)
    epochs: PositiveFloat | None = None
    on_bad_row: Literal["error", "skip"] | None = None

    def format_name(self, kind: Kind) -> str:
        """The format in use, given or by default."""
        if kind != "conversations":
            return self.format or {"preferences": "preference", "documents": "text"}[kind]
        return self.format or ("single_turn" if self.map and "user" in self.map else "messages")


@dataclass(frozen=True)
class Conversion:
    """What became of a source's rows: read = kept + filtered + ties + skipped. ties: rows that prefer neither reply."""

    read: int
    kept: int
    filtered: int
    ties: int
    skipped: int
    first_skipped: str | None


def fingerprint(source: Source, kind: Kind, skip: bool, seed: int) -> str:
    """Changes with whatever changes the source's conversations: settings, files' bytes, the code that reads them."""
    how_many = set() if source.hub else {"take"}
    settings = source.model_dump(exclude={"licence", "weight", "share", "epochs", "on_bad_row", "path", *how_many})
    code = [_file_hash(file) for file in (formats.__file__, preferences.__file__, plain_text.__file__, __file__)]
    parts: list[Any] = [settings, kind, skip, [_file_hash(path) for path in source.path or []], code]
    if source.hub and source.take:
        parts.append(seed)
    if source.generator:
        parts.append([_file_hash(str(file)) for file in sorted(Path(synthetic.__file__).parent.glob("*.py"))])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def convert(
    source: Source, kind: Kind, name: str, place: str, skip: bool, seed: int, folder: Path
) -> tuple[datasets.Dataset, Conversion]:
    """The source's conversations or pairs, memory-mapped: `conversation` (JSON), `source`, `key` (content hash).

    Written once into `folder`, under the source's fingerprint; `place` says where the mix defines the source.
    """
    stem = folder / f"{name}-{fingerprint(source, kind, skip, seed)[:20]}"
    arrow, counts = stem.with_suffix(".arrow"), stem.with_suffix(".json")
    if not counts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = stem.with_suffix(f".{os.getpid()}.tmp")
        try:
            conversion = _write(source, kind, name, place, skip, _rows(source, kind, place, seed), unfinished)
            unfinished.replace(arrow)
            unfinished.write_text(json.dumps(asdict(conversion)))
            unfinished.replace(counts)
        finally:
            unfinished.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(arrow)), Conversion(**json.loads(counts.read_text()))


def _write(
    source: Source, kind: Kind, name: str, place: str, skip: bool, rows: Iterable[Placed], path: Path
) -> Conversion:
    """Convert row by row, in constant memory."""
    make = READERS[kind][source.format_name(kind)]
    enough = source.take if source.hub else None
    read = kept = filtered = ties = skipped = 0
    first_skipped = None
    with ArrowWriter(path=str(path), features=FEATURES) as writer:
        for where, row in rows:
            if kept == enough:
                break
            read += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                if not _matches(row, source.filter or {}):
                    filtered += 1
                    continue
                text = json.dumps(make(mapped(row, source.map or {})), ensure_ascii=False)
                key = _key(text)
            except NoPreference:
                ties += 1
                continue
            except BadRow as error:
                if not skip:
                    raise UserError(f"{where}: {error}\n  fix the row, or set on_bad_row: skip at {place}") from None
                skipped += 1
                first_skipped = first_skipped or f"{where}: {error}"
                continue
            writer.write({"conversation": text, "source": name, "key": key})
            kept += 1
        writer.finalize()
    return Conversion(read, kept, filtered, ties, skipped, first_skipped)


def _key(text: str) -> int:
    try:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
    except UnicodeEncodeError:
        raise BadRow("half a character (a lone surrogate such as \\ud83d) is in the text") from None


def _matches(row: Row, conditions: dict[str, Range | list[Scalar] | Scalar]) -> bool:
    for column, wanted in conditions.items():
        if column not in row:
            raise BadRow(f"filter: no column {column!r} (columns: {', '.join(row)})")
        value = row[column]
        if isinstance(wanted, Range):
            if not _in_range(value, wanted, column):
                return False
        elif value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _in_range(value: Any, wanted: Range, column: str) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"filter: column {column!r} holds {value!r}, no number") from None
    return (wanted.min is None or number >= wanted.min) and (wanted.max is None or number <= wanted.max)


def _rows(source: Source, kind: Kind, place: str, seed: int) -> Iterator[Placed]:
    together = ROWS_TOGETHER.get(source.format_name(kind), 1)
    if source.hub:
        return _together(_hub_rows(source.hub, place, together, seed if source.take else None), together)
    if source.generator:
        return _generated_rows(source.generator)
    return _together((placed for path in source.path or [] for placed in file_rows(Path(path))), together)


def _together(rows: Iterator[Placed], size: int) -> Iterator[Placed]:
    """So many consecutive rows as one, {"rows": [...]}, at the place of the first."""
    if size == 1:
        yield from rows
        return
    while group := list(islice(rows, size)):
        place, (_, found) = group[0][0], zip(*group, strict=True)
        bad = next((row for row in found if isinstance(row, BadRow)), None)
        if len(group) < size:
            bad = BadRow(f"the format takes {size} rows together, and the last ones are missing")
        yield place, bad or {"rows": list(found)}


def file_rows(path: Path) -> Iterator[Placed]:
    """A file's rows with their places; a line that is no JSON object comes as the BadRow that says so."""
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.name.endswith((".json", ".json.gz")) and _first_character(path) == b"[":
        return _array_rows(path)
    return _line_rows(path)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_character(path: Path) -> bytes:
    with _open(path) as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def _line_rows(path: Path) -> Iterator[Placed]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 text (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON ({error.msg}, column {error.colno})")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


def _array_rows(path: Path) -> Iterator[Placed]:
    with _open(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not valid JSON ({error}); repair the file") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row if isinstance(row, dict) else BadRow("not a JSON object")


def _parquet_rows(path: Path) -> Iterator[Placed]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", row


def _hub_rows(hub: HubDataset, place: str, together: int, seed: int | None) -> Iterator[Placed]:
    """Rows in order, or, with a seed, in a random order (so that the first few are a fair choice).

    Groups of `together` rows stay as they are.
    """
    try:
        rows = datasets.load_dataset(
            hub.id, hub.subset, data_files=hub.data_files, split=hub.split, revision=hub.revision
        )
    except Exception as error:  # whatever it is (network, gate, name, split), the user has to know which dataset
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise UserError(
            f"{place}.hub: {hub.id}: {reason}\n  without a network: give its files as `path:`, or load it once where "
            "there is one and copy the cache (HF_HOME)"
        ) from error
    groups = np.arange(len(rows) // together * together).reshape(-1, together)
    if seed is not None:
        groups = np.random.default_rng(seed).permutation(groups)
    for index in (*groups.flat, *range(groups.size, len(rows))):
        yield f"{hub.id}: row {index + 1}", rows[int(index)]


def _generated_rows(generated: Generated) -> Iterator[Placed]:
    rows = synthetic.conversations(generated.name, generated.n, generated.seed)
    for number, row in enumerate(rows, start=1):
        yield f"{generated.name}: row {number}", row


def _file_hash(path: str) -> str:
    status = Path(path).stat()
    return _content_hash(path, status.st_size, status.st_mtime_ns)


@cache
def _content_hash(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
