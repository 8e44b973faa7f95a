"""A mix as the model sees it: the rows that training would read, decoded, each piece marked with what it is.

The rows come from the functions that a run uses, so what is shown is what is trained on: chat markers, special tokens,
the tokens with loss, where one packed document ends and the next begins.
"""

import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerFast

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.data.mix import load_mix, realise_mix
from hymba_tune.data.packing import IGNORED, PackingCounts, TooLong, build_rows
from hymba_tune.data.pairs import PairCounts, build_pairs
from hymba_tune.weights import find_weights

LOOKED_AT = 200
"""Conversations that are encoded and packed with each other to show some rows."""

Kind = Literal["marker", "context", "learned", "rejected"]
"""A turn's header; text without loss; text with loss; a reply that DPO pushes away."""

_HEADER = re.compile(r"(<extra_id_[01]>(?:System|User|Assistant|Tool))")


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind, decoded. special: control tokens of the tokenizer, as </s>."""

    text: str
    kind: Kind
    special: bool = False


@dataclass(frozen=True)
class Part:
    """A document of a row, or one side of a pair. learned: how many of its tokens carry loss."""

    title: str
    tokens: int
    learned: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Row:
    """A packed row or a preference pair."""

    title: str
    parts: list[Part]


@dataclass(frozen=True)
class Preview:
    """Some rows of a mix, and what became of all conversations that were looked at."""

    mix: str
    tokenizer: str
    rows: list[Row]
    counts: PackingCounts | PairCounts


def preview_mix(
    mix_name: str,
    tokenizer_name: str = "tiny",
    *,
    rows: int = 3,
    max_length: int = 2048,
    packing: Literal["bfd", "none"] = "bfd",
    too_long: Literal["drop", "truncate"] = "drop",
    seed: int = 0,
) -> Preview:
    """The first rows of a mix, out of LOOKED_AT conversations or pairs of it.

    tokenizer_name: a folder, a run, a hub id or `tiny`. Plain text that is too long is split. Raises UserError for a
    mix or tokenizer that can't be used.
    """
    mix = load_mix(mix_name)
    tokenizer = load_tokenizer(find_weights(tokenizer_name).source)
    dataset, _ = realise_mix(mix, seed, limit=LOOKED_AT)
    counts: PackingCounts | PairCounts
    with tempfile.TemporaryDirectory() as folder:
        if mix.kind == "preferences":
            pairs, counts = build_pairs(dataset, tokenizer, max_length, too_long, folder=Path(folder) / "rows")
            shown = [_pair(tokenizer, number, row) for number, row in enumerate(_first(pairs, rows), 1)]
        else:
            fit: TooLong = "split" if mix.kind == "documents" else too_long
            packed, counts = build_rows(dataset, tokenizer, max_length, packing, fit, folder=Path(folder) / "rows")
            shown = [_packed(tokenizer, number, row, max_length) for number, row in enumerate(_first(packed, rows), 1)]
    return Preview(mix_name, tokenizer_name, shown, counts)


def _first(dataset: Sequence[dict[str, list[int]]], count: int) -> Iterator[dict[str, list[int]]]:
    return (dataset[index] for index in range(min(count, len(dataset))))


def _packed(tokenizer: PreTrainedTokenizerFast, number: int, row: dict[str, list[int]], room: int) -> Row:
    ends = list(itertools.accumulate(row["seq_lengths"]))
    parts = []
    for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        ids, labels = row["input_ids"][start:end], row["labels"][start:end]
        parts.append(_part(tokenizer, f"document {index} of {len(ends)}", ids, [label != IGNORED for label in labels]))
    return Row(f"row {number}: {len(row['input_ids'])} of {room} tokens", parts)


def _pair(tokenizer: PreTrainedTokenizerFast, number: int, row: dict[str, list[int]]) -> Row:
    parts = []
    for title in ("prompt", "chosen", "rejected"):
        ids = row[f"{title}_ids"]
        loss = [title != "prompt"] * len(ids)
        parts.append(_part(tokenizer, title, ids, loss, "rejected" if title == "rejected" else "learned"))
    longest = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return Row(f"pair {number}: {longest} tokens in its longer conversation", parts)


def _part(
    tokenizer: PreTrainedTokenizerFast, title: str, ids: list[int], loss: list[bool], kind: Kind = "learned"
) -> Part:
    special = set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    for (is_special, learned), group in itertools.groupby(
        zip(ids, loss, strict=True), lambda token: (token[0] in special, token[1])
    ):
        text = _decode(tokenizer, [token for token, _ in group])
        if is_special or learned:
            pieces.append(Piece(text, kind if learned else "context", is_special))
        else:
            pieces += (Piece(part, "marker" if _HEADER.fullmatch(part) else "context") for part in _HEADER.split(text))
    return Part(title, len(ids), sum(loss), [piece for piece in pieces if piece.text])


def _decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of ids inside a document: decoded after an end of turn, so that a leading space is kept."""
    assert tokenizer.eos_token_id is not None
    text = tokenizer.decode([tokenizer.eos_token_id, *ids], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.removeprefix(str(tokenizer.eos_token))
