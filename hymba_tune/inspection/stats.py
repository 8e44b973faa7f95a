"""What is in a mix, by source: lengths, turns, tokens, share with loss, languages of code, duplicates."""

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.data.mix import load_mix, realise_mix
from hymba_tune.data.packing import encode_example
from hymba_tune.data.pairs import encode_pair
from hymba_tune.weights import find_weights

_FENCE = re.compile(r"^ {0,3}```([^\n`]*)\n.*?^ {0,3}```", re.MULTILINE | re.DOTALL)
PLAIN = "unnamed"
"""A code fence without a language."""


@dataclass(frozen=True)
class SourceStats:
    """One source. lengths: tokens of each conversation (of both together for a pair); learned: those with loss.

    turns: messages of each (1 for plain text); languages: code fences by language; repeated: conversations that were
    there before, in this or another source (a weight above 1 repeats on purpose)
    """

    source: str
    lengths: list[int]
    learned: int
    turns: list[int]
    with_system: int
    with_tools: int
    languages: dict[str, int]
    repeated: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def learned_share(self) -> float:
        """Of the tokens, those with loss."""
        return self.learned / max(self.tokens, 1)

    def length_at(self, share: float) -> int:
        """The length that this share of the conversations does not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    @property
    def mean_turns(self) -> float:
        return statistics.fmean(self.turns)


@dataclass(frozen=True)
class MixStats:
    """looked_at: conversations or pairs (`kind`) that were counted; complete: whether the mix holds no more."""

    mix: str
    kind: str
    tokenizer: str
    looked_at: int
    complete: bool
    sources: list[SourceStats]


def mix_stats(mix_name: str, tokenizer_name: str = "tiny", *, limit: int = 5000, seed: int = 0) -> MixStats:
    """Count up to `limit` conversations of a mix, which come in a random order.

    Raises UserError for a mix or tokenizer that can't be used.
    """
    mix = load_mix(mix_name)
    tokenizer = load_tokenizer(find_weights(tokenizer_name).source)
    rows, _ = realise_mix(mix, seed, limit=limit + 1)
    complete = len(rows) <= limit
    rows = rows.select(range(min(limit, len(rows))))
    seen: set[str] = set()
    by_source: dict[str, list[dict[str, Any]]] = {name: [] for name in mix.sources}
    for text, source in zip(rows["conversation"], rows["source"], strict=True):
        by_source[source].append(_count(tokenizer, json.loads(text)) | {"repeated": text in seen})
        seen.add(text)
    sources = [_together(name, counts) for name, counts in by_source.items() if counts]
    return MixStats(mix_name, mix.kind, tokenizer_name, len(rows), complete, sources)


def _count(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> dict[str, Any]:
    if "prompt" not in row:
        document = encode_example(tokenizer, row)
        length, learned = len(document.input_ids), sum(document.loss_mask)
        messages = row.get("messages") or [{"role": "text", "content": row["text"]}]
    else:
        prompt, chosen, rejected = encode_pair(tokenizer, row)
        length, learned = 2 * len(prompt) + len(chosen) + len(rejected), len(chosen) + len(rejected)
        messages = [*row["prompt"], *row["chosen"], *row["rejected"]]
    return {
        "length": length,
        "learned": learned,
        "turns": len(messages),
        "system": messages[0]["role"] == "system",
        "tools": bool(row.get("tools")),
        "languages": fence_languages(message.get("content") for message in messages),
    }


def fence_languages(texts: Iterable[Any]) -> Counter[str]:
    """Languages of the code fences in texts; the first word after the backticks."""
    found: Counter[str] = Counter()
    for text in texts:
        for info in _FENCE.findall(text) if isinstance(text, str) else ():
            found[(info.split() or [PLAIN])[0].lower()] += 1
    return found


def _together(name: str, counts: Sequence[dict[str, Any]]) -> SourceStats:
    languages: dict[str, int] = defaultdict(int)
    for count in counts:
        for language, number in count["languages"].items():
            languages[language] += number
    return SourceStats(
        source=name,
        lengths=[count["length"] for count in counts],
        learned=sum(count["learned"] for count in counts),
        turns=[count["turns"] for count in counts],
        with_system=sum(count["system"] for count in counts),
        with_tools=sum(count["tools"] for count in counts),
        languages=dict(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
        repeated=sum(count["repeated"] for count in counts),
    )
