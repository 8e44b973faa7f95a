"""Conversations or plain text -> rows of at most `max_length` tokens, whole documents side by side, with exact labels.

    documents in mix order   AAAAA  BBB  CCCCCCCCC  DD  EEEE  F          max_length 8, too_long: drop (C)
    packing: bfd             AAAAABBB   DDEEEEF                          best fit, longest first
    packing: none            AAAAA   BBB   DD   EEEE   F

    row AAAAABBB:   input_ids     a0 a1 a2 a3 a4 b0 b1 b2
                    labels         .  .  . a3 a4  .  . b2                . is -100: no loss
                    seq_lengths   [5, 3]                                 where documents end

These are the columns that TRL's SFTTrainer takes with `skip_prepare_dataset`; with `padding_free` its collator makes
position_ids, seq_idx and cu_seq_lens from seq_lengths. A document is never split over rows; `too_long: split` makes
several documents of a text that fits no row (plain_text.py).

Best fit decreasing: the longest document first, each into the fullest row that still has room for it (Ding et al. 2024,
arXiv 2404.10830). Documents stand in mix order within a row, rows in the order of their first document.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from hymba_tune.data.chat import Document, encode_conversation
from hymba_tune.data.encoding import (
    TOKENS,
    Counts,
    added_up,
    content_fingerprint,
    encode_parts,
    load_parts,
    resumable,
)
from hymba_tune.data.plain_text import encode_text, pieces
from hymba_tune.errors import UserError

TooLong = Literal["drop", "truncate", "split"]

IGNORED = -100
"""The label of a token without loss, as torch's cross-entropy and TRL have it."""

ROWS_A_BATCH = 256

_ROW = datasets.Features({"input_ids": TOKENS, "labels": TOKENS, "seq_lengths": TOKENS})
_DOCUMENT = datasets.Features(
    {
        "input_ids": TOKENS,
        "labels": TOKENS,
        "length": datasets.Value("int32"),
        "supervised": datasets.Value("int32"),
        "source": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class TokenCounts:
    """What of one source is in the rows."""

    documents: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class PackingCounts:
    """What became of the documents, and how full the rows are. `longest` is the longest document before any cut.

    documents: those in the rows; each piece of one that was split counts.
    """

    max_length: int
    rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    dropped_too_long: int
    dropped_unsupervised: int
    truncated: int
    split: int
    longest: int
    sources: dict[str, TokenCounts]

    @property
    def fill(self) -> float:
        """The share of the rows' room that holds tokens."""
        return self.tokens / (self.rows * self.max_length)


def build_rows(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    packing: Literal["bfd", "none"] = "bfd",
    too_long: TooLong = "drop",
    *,
    folder: Path,
    workers: int | None = None,
) -> tuple[datasets.Dataset, PackingCounts]:
    """Encode the `conversation` column and pack the documents; the rows are written to `folder`, whole or not at all.

    Documents are packed among the encoding.PART that stand together in the mix, so memory does not grow with it, and
    what is packed stays when the work is cut off (encoding.resumable).

    too_long: a document of more than `max_length` tokens is dropped, cut at the end, or split into pieces; one that has
    no token with loss left is dropped. All are counted. Raises UserError if nothing is left. workers: processes that
    encode (None: up to one a core, as far as there is work for them); the rows are the same with any number.
    """
    encode = partial(_encode, tokenizer=tokenizer, max_length=max_length, too_long=too_long)
    pack = partial(_pack, max_length=max_length, packing=packing, too_long=too_long)
    settings = {"max_length": max_length, "packing": packing, "too_long": too_long}
    with resumable(folder, content_fingerprint(dataset, tokenizer, **settings)) as draft:
        counts = added_up(encode_parts(dataset, encode, _DOCUMENT, draft, pack, workers))
        if not counts["rows"]:
            raise UserError(
                f"data.max_length: {max_length}: none of {len(dataset)} documents fits a row; raise it, or set "
                "data.too_long: truncate"
            )
        (draft / "counts.json").write_text(json.dumps(counts))
    return load_rows(folder)


def load_rows(folder: Path) -> tuple[datasets.Dataset, PackingCounts]:
    """What build_rows wrote, memory-mapped."""
    counts = json.loads((folder / "counts.json").read_text())
    sources = {name: TokenCounts(**part) for name, part in counts.pop("sources").items()}
    return load_parts(folder), PackingCounts(**counts, sources=sources)


def _pack(documents: datasets.Dataset, path: Path, max_length: int, packing: str, too_long: TooLong) -> Counts:
    """Write the rows of encoded documents to a file, and count."""
    lengths = _list_lengths(documents)
    kept = np.flatnonzero(lengths)
    rows = best_fit_decreasing(lengths[kept], max_length) if packing == "bfd" else [[i] for i in range(len(kept))]
    if rows:
        _write_rows(documents, [kept[row] for row in rows], path)
    return asdict(_count(documents, lengths, max_length, too_long, len(rows)))


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Documents (by number) of each row. O(n log n): one bit a free space says whether a row has exactly that much."""
    lengths = np.asarray(lengths)
    rows: list[list[int]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            spaces ^= (not rows_with_space[space]) << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        if space > length:
            rows_with_space[space - length].append(row)
            spaces |= 1 << (space - length)
    return sorted(sorted(row) for row in rows)


def encode_example(tokenizer: PreTrainedTokenizerFast, example: dict[str, Any]) -> Document:
    """What a mix holds, a conversation (`messages`, `tools`) or plain text (`text`), uncut."""
    if "text" in example:
        return encode_text(tokenizer, example["text"])
    return encode_conversation(tokenizer, example["messages"], example.get("tools"))


def fitted(document: Document, max_length: int, too_long: TooLong) -> list[Document]:
    """What of a document goes into rows of `max_length` tokens; nothing where no token with loss is left."""
    fits = len(document.input_ids) <= max_length
    if too_long == "split":
        parts = list(pieces(document, max_length))
    elif fits or too_long == "truncate":
        parts = [Document(document.input_ids[:max_length], document.loss_mask[:max_length])]
    else:
        parts = []
    return [part for part in parts if any(part.loss_mask)]


def _encode(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int, too_long: TooLong
) -> dict[str, list[Any]]:
    """Documents of one batch; a dropped one is empty, and `length` still says how long it was.

    Of a document that was split, the first piece has the length of the whole.
    """
    documents: dict[str, list[Any]] = {name: [] for name in _DOCUMENT}
    for text, source in zip(batch["conversation"], batch["source"], strict=True):
        document = encode_example(tokenizer, json.loads(text))
        whole = len(document.input_ids)
        for number, part in enumerate(fitted(document, max_length, too_long) or [Document([], [])]):
            ids = np.asarray(part.input_ids, dtype=np.int32)
            labels = np.where(np.asarray(part.loss_mask, dtype=bool), ids, np.int32(IGNORED))
            length = len(ids) if number else whole
            values = (ids, labels, length, sum(part.loss_mask), source)
            for column, value in zip(documents.values(), values, strict=True):
                column.append(value)
    return documents


def _list_lengths(documents: datasets.Dataset) -> np.ndarray:
    return pc.list_value_length(documents.data.column("input_ids")).to_numpy()


def _write_rows(documents: datasets.Dataset, rows: list[np.ndarray], path: Path) -> None:
    arrow = documents.with_format("arrow")
    with ArrowWriter(path=str(path), features=_ROW) as writer:
        for start in range(0, len(rows), ROWS_A_BATCH):
            writer.write_table(_joined(arrow, rows[start : start + ROWS_A_BATCH]))
        writer.finalize()


def _joined(documents: datasets.Dataset, rows: list[np.ndarray]) -> pa.Table:
    """One batch of rows: the documents gathered, and list offsets moved from documents' ends to rows' ends."""
    table = documents[np.concatenate(rows)]
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    documents_end = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    tokens_end = np.concatenate([[0], np.cumsum(lengths)])[documents_end].astype(np.int32)
    columns = {
        name: pa.ListArray.from_arrays(tokens_end, table[name].combine_chunks().flatten())
        for name in ("input_ids", "labels")
    }
    columns["seq_lengths"] = pa.ListArray.from_arrays(documents_end, pa.array(lengths, pa.int32()))
    return pa.table(columns)


def _count(
    documents: datasets.Dataset, lengths: np.ndarray, max_length: int, too_long: TooLong, rows: int
) -> PackingCounts:
    full = documents.data.column("length").to_numpy()
    supervised = documents.data.column("supervised").to_numpy()
    kept, over = lengths > 0, full > max_length
    dropped_too_long = over & ~kept if too_long == "drop" else np.zeros_like(kept)
    return PackingCounts(
        max_length=max_length,
        rows=rows,
        documents=int(kept.sum()),
        tokens=int(lengths.sum()),
        supervised_tokens=int(supervised.sum()),
        dropped_too_long=int(dropped_too_long.sum()),
        dropped_unsupervised=int((~kept & ~dropped_too_long).sum()),
        truncated=int((over & kept).sum()) if too_long == "truncate" else 0,
        split=int((over & kept).sum()) if too_long == "split" else 0,
        longest=int(full.max()),
        sources=dict(_count_sources(documents.data.column("source"), lengths, supervised)),
    )


def _count_sources(
    source: pa.ChunkedArray, lengths: np.ndarray, supervised: np.ndarray
) -> Iterator[tuple[str, TokenCounts]]:
    codes = source.dictionary_encode().combine_chunks()
    for code, name in enumerate(codes.dictionary.to_pylist()):
        mine = codes.indices.to_numpy() == code
        yield name, TokenCounts(int((lengths[mine] > 0).sum()), int(lengths[mine].sum()), int(supervised[mine].sum()))
