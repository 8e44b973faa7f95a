"""Preference pairs -> token ids in the columns that TRL's DPOTrainer collates: one prompt and two replies.

    prompt_ids     <extra_id_0>System ... <extra_id_1>Assistant\\n    context, not scored
    chosen_ids     the preferred reply</s>                           scored, the end of turn included
    rejected_ids   the other reply</s>                               scored

prompt_ids + chosen_ids is the conversation exactly as fine-tuning encodes it, and prompt_ids is what generation starts
from. A pair is as long as its longer conversation; a pair is never packed with another.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from hymba_tune.data.chat import encode_conversation, prompt_ids
from hymba_tune.data.encoding import (
    TOKENS,
    Counts,
    added_up,
    content_fingerprint,
    encode_parts,
    load_parts,
    resumable,
)
from hymba_tune.errors import UserError

ROWS_A_BATCH = 1000

_PAIR = datasets.Features({"prompt_ids": TOKENS, "chosen_ids": TOKENS, "rejected_ids": TOKENS})
_ENCODED = datasets.Features(
    {
        **_PAIR,
        "length": datasets.Value("int32"),
        "same": datasets.Value("bool"),
        "source": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class PairTokens:
    """What of one source is trained on. tokens: of both conversations of each pair, the prompt twice."""

    pairs: int
    tokens: int
    chosen_tokens: int
    rejected_tokens: int


@dataclass(frozen=True)
class PairCounts:
    """What became of the pairs: `rows` are left, the rest was too long or has replies of the same tokens.

    longest: tokens of the longest conversation before any cut.
    """

    max_length: int
    rows: int
    tokens: int
    chosen_tokens: int
    rejected_tokens: int
    dropped_too_long: int
    dropped_same: int
    truncated: int
    longest: int
    sources: dict[str, PairTokens]


def build_pairs(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    too_long: Literal["drop", "truncate"] = "drop",
    *,
    folder: Path,
    workers: int | None = None,
) -> tuple[datasets.Dataset, PairCounts]:
    """Encode a realised mix of pairs, in its order; the rows are written to `folder`, whole or not at all.

    too_long: a pair of which a conversation has more than `max_length` tokens is dropped, or its replies are cut at the
    end; one whose prompt leaves no room for a reply, or whose replies are the same, is dropped. All are counted.
    Raises UserError if nothing is left. workers, and what stays when the work is cut off: as in packing.build_rows.
    """
    encode = partial(_encode, tokenizer=tokenizer, max_length=max_length, too_long=too_long)
    write = partial(_write_pairs, max_length=max_length)
    with resumable(folder, content_fingerprint(dataset, tokenizer, max_length=max_length, too_long=too_long)) as draft:
        counts = added_up(encode_parts(dataset, encode, _ENCODED, draft, write, workers))
        if not counts["rows"]:
            raise UserError(
                f"data.max_length: {max_length}: none of {len(dataset)} pairs fits ({counts['dropped_same']} have "
                "equal replies); raise it, or set data.too_long: truncate"
            )
        (draft / "counts.json").write_text(json.dumps(counts))
    return load_pairs(folder)


def load_pairs(folder: Path) -> tuple[datasets.Dataset, PairCounts]:
    """What build_pairs wrote, memory-mapped."""
    counts = json.loads((folder / "counts.json").read_text())
    sources = {name: PairTokens(**part) for name, part in counts.pop("sources").items()}
    return load_parts(folder), PairCounts(**counts, sources=sources)


def encode_pair(tokenizer: PreTrainedTokenizerFast, pair: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """(prompt_ids, chosen_ids, rejected_ids), uncut."""
    tools = pair.get("tools")
    prompt = prompt_ids(tokenizer, pair["prompt"], tools)
    chosen, rejected = (
        encode_conversation(tokenizer, [*pair["prompt"], *pair[side]], tools).input_ids[len(prompt) :]
        for side in ("chosen", "rejected")
    )
    return prompt, chosen, rejected


def _encode(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast, max_length: int, too_long: str
) -> dict[str, list[Any]]:
    """Pairs of one batch; a dropped one is empty, and `length` and `same` still say why."""
    encoded: dict[str, list[Any]] = {name: [] for name in _ENCODED}
    for text, source in zip(batch["conversation"], batch["source"], strict=True):
        prompt, chosen, rejected = encode_pair(tokenizer, json.loads(text))
        length = len(prompt) + max(len(chosen), len(rejected))
        room = max(max_length - len(prompt), 0) if too_long == "truncate" or length <= max_length else 0
        chosen, rejected = chosen[:room], rejected[:room]
        same = room > 0 and chosen == rejected
        ids = ([], [], []) if same or not room else (prompt, chosen, rejected)
        for column, value in zip(encoded.values(), (*ids, length, same, source), strict=True):
            column.append(value)
    return encoded


def _write_pairs(encoded: datasets.Dataset, path: Path, max_length: int) -> Counts:
    """Write the pairs that are left of encoded ones to a file, and count."""
    kept = np.flatnonzero(_lengths(encoded, "prompt_ids"))
    if len(kept):
        pairs = encoded.select(kept).select_columns(list(_PAIR)).with_format("arrow")
        with ArrowWriter(path=str(path), features=_PAIR) as writer:
            for start in range(0, len(pairs), ROWS_A_BATCH):
                writer.write_table(pairs[start : start + ROWS_A_BATCH])
            writer.finalize()
    return asdict(_count(encoded, max_length))


def _lengths(encoded: datasets.Dataset, column: str) -> np.ndarray:
    return pc.list_value_length(encoded.data.column(column)).to_numpy()


def _count(encoded: datasets.Dataset, max_length: int) -> PairCounts:
    prompt, chosen, rejected = (_lengths(encoded, column) for column in _PAIR)
    full, same = (encoded.data.column(name).to_numpy() for name in ("length", "same"))
    kept = prompt > 0
    tokens = 2 * prompt + chosen + rejected
    return PairCounts(
        max_length=max_length,
        rows=int(kept.sum()),
        tokens=int(tokens.sum()),
        chosen_tokens=int(chosen.sum()),
        rejected_tokens=int(rejected.sum()),
        dropped_too_long=int((~kept & ~same).sum()),
        dropped_same=int(same.sum()),
        truncated=int((kept & (full > max_length)).sum()),
        longest=int(full.max()),
        sources=dict(_count_sources(encoded, tokens, chosen, rejected)),
    )


def _count_sources(
    encoded: datasets.Dataset, tokens: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> Iterator[tuple[str, PairTokens]]:
    codes = encoded.data.column("source").dictionary_encode().combine_chunks()
    for code, name in enumerate(codes.dictionary.to_pylist()):
        mine = codes.indices.to_numpy() == code
        sums = (int(part[mine].sum()) for part in (tokens, chosen, rejected))
        yield name, PairTokens(int((tokens[mine] > 0).sum()), *sums)
