"""Keeps the benchmarks' test items out of training data: conversations that repeat one are listed and dropped.

Texts are compared as words: Unicode NFKC, case folded, without punctuation; a Chinese, Japanese or Korean character is
a word. A conversation overlaps with an item in one of two ways:

- exact: a message, or a paragraph of one, is the item's text, of EXACT_WORDS words or more;
- ngram: a message shares NGRAM_WORDS consecutive words with it, or, of an item of SHORT_WORDS to NGRAM_WORDS - 1
  words, has all of it. `share` is how much of the item's n-grams the message has.

Boilerplate is no contamination (GPT-3's rule, arXiv 2005.14165, appendix C): where more than BOILERPLATE_CONVERSATIONS
share less than BOILERPLATE_SHARE of the same item, as a tool's stock description in a question, those overlaps are
counted, not dropped.

N-grams are found by 64-bit hashes (numpy, one pass over a text's words) and then compared word for word.
"""

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np

from hymba_tune.data.benchmark_texts import BenchmarkText, benchmark_texts

EXACT_WORDS = 5
SHORT_WORDS = 8
NGRAM_WORDS = 13
BOILERPLATE_CONVERSATIONS = 10
BOILERPLATE_SHARE = 0.5

CONVERSATIONS_A_WORKER = 5000
"""Fewer are compared faster than another process starts."""

UNSHOWN = frozenset({"gpqa"})
"""Benchmarks whose authors ask that no item stand anywhere in plain text."""
SHOWN_CHARS = 200

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_TURNS = ("prompt", "messages", "chosen", "rejected", "text")

Kind = Literal["exact", "ngram"]


class Overlap(NamedTuple):
    """How a message overlaps with an item: words they share (the first of them), and how much of the item."""

    kind: Kind
    words: str
    share: float


@dataclass(frozen=True)
class Hit:
    """One conversation (the row-th of its source) repeats one test item.

    text: what they share, or None where it may not be shown.
    """

    row: int
    source: str
    message: str
    benchmark: str
    item: str
    kind: Kind
    share: float
    text: str | None


@dataclass
class Contamination:
    """What was compared (conversations, texts by benchmark) and what was found.

    boilerplate: (benchmark, item) -> conversations that share a smaller part of it, too many to be copies.
    """

    conversations: int = 0
    items: dict[str, int] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)
    boilerplate: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """The conversations with hits, in order."""
        return sorted({hit.row for hit in self.hits})

    @property
    def dropped(self) -> int:
        """How many conversations have hits, over all sources."""
        return len({(hit.source, hit.row) for hit in self.hits})

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Contamination":
        """What to_json wrote."""
        boilerplate = {tuple(item.split("/", 1)): count for item, count in record["boilerplate"].items()}
        hits = [Hit(**hit) for hit in record["hits"]]
        return Contamination(record["conversations"], record["test_items"], hits, boilerplate)

    def to_json(self) -> dict[str, Any]:
        """Counts by benchmark and kind, the rules, and every hit."""
        counts: dict[str, Counter[str]] = {}
        for hit in self.hits:
            counts.setdefault(hit.benchmark, Counter())[hit.kind] += 1
        return {
            "rules": {
                "exact_words": EXACT_WORDS,
                "short_words": SHORT_WORDS,
                "ngram_words": NGRAM_WORDS,
                "boilerplate_conversations": BOILERPLATE_CONVERSATIONS,
                "boilerplate_share": BOILERPLATE_SHARE,
            },
            "conversations": self.conversations,
            "dropped": self.dropped,
            "test_items": self.items,
            "hits_by_benchmark": {name: dict(count) for name, count in sorted(counts.items())},
            "boilerplate": {f"{benchmark}/{item}": n for (benchmark, item), n in self.boilerplate.items()},
            "hits": [asdict(hit) for hit in self.hits],
        }


def words_of(text: str) -> list[str]:
    """The words that are compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class BenchmarkIndex:
    """All test items, ready to be looked up: whole texts by their words, n-grams by their hashes."""

    def __init__(self, texts: Iterable[BenchmarkText]) -> None:
        self.items: list[tuple[str, str]] = []
        self._texts: list[str] = []
        self._whole: dict[str, list[int]] = {}
        hashes: dict[int, list[np.ndarray]] = {n: [] for n in range(SHORT_WORDS, NGRAM_WORDS + 1)}
        owners: dict[int, list[np.ndarray]] = {n: [] for n in hashes}
        for number, (benchmark, item, text) in enumerate(texts):
            words = words_of(text)
            self.items.append((benchmark, item))
            self._texts.append(f" {' '.join(words)} ")
            if len(words) >= EXACT_WORDS:
                self._whole.setdefault(" ".join(words), []).append(number)
            n = min(len(words), NGRAM_WORDS)
            if n in hashes:
                found = _ngram_hashes(words)[n]
                hashes[n].append(found)
                owners[n].append(np.full(len(found), number, dtype=np.int32))
        self._ngrams = {n: _sorted_pairs(hashes[n], owners[n]) for n in hashes if hashes[n]}

    def counts(self) -> dict[str, int]:
        """Texts by benchmark."""
        return dict(Counter(benchmark for benchmark, _ in self.items))

    def overlaps(self, text: str) -> dict[int, Overlap]:
        """Item number -> how a message overlaps with it."""
        found: dict[int, Overlap] = {}
        for part in dict.fromkeys([text, *text.split("\n\n")]):
            whole = " ".join(words_of(part))
            found.update(dict.fromkeys(self._whole.get(whole, ()), Overlap("exact", whole, 1.0)))
        words = words_of(text)
        for n, hashes in _ngram_hashes(words).items():
            shared: dict[int, dict[str, None]] = {}
            for place, number in self._candidates(n, hashes):
                ngram = " ".join(words[place : place + n])
                if number not in found and f" {ngram} " in self._texts[number]:
                    shared.setdefault(number, {})[ngram] = None
            for number, ngrams in shared.items():
                of_item = max(self._texts[number].count(" ") - n, 1)
                found[number] = Overlap("ngram", next(iter(ngrams)), len(ngrams) / of_item)
        return found

    def _candidates(self, n: int, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
        """(place in the text, item number) of every n-gram whose hash an item has."""
        if n not in self._ngrams:
            return
        known, owners = self._ngrams[n]
        left, right = np.searchsorted(known, hashes, "left"), np.searchsorted(known, hashes, "right")
        for place in np.flatnonzero(right > left):
            for number in owners[left[place] : right[place]]:
                yield int(place), int(number)


def _sorted_pairs(hashes: Sequence[np.ndarray], owners: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes in ascending order, and the item of each; an item's repeated n-gram stands once."""
    pairs = np.unique(np.stack([np.concatenate(hashes), np.concatenate(owners).astype(np.uint64)]), axis=1)
    return pairs[0], pairs[1].astype(np.int32)


def _ngram_hashes(words: Sequence[str]) -> dict[int, np.ndarray]:
    """n -> (len(words) - n + 1,) uint64 polynomial hashes, for n from SHORT_WORDS to NGRAM_WORDS."""
    if len(words) < SHORT_WORDS:
        return {}
    single = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    found, hashes = {}, single
    for n in range(2, min(len(words), NGRAM_WORDS) + 1):
        hashes = hashes[:-1] * _BASE + single[n - 1 :]
        if n >= SHORT_WORDS:
            found[n] = hashes
    return found


@lru_cache(maxsize=1_000_000)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def find_contamination(conversations: Iterable[tuple[str, dict[str, Any]]], index: BenchmarkIndex) -> Contamination:
    """The overlaps of (source, conversation or preference pair) with the index's items, at most one hit an item."""
    result = Contamination(items=index.counts())
    for row, (source, conversation) in enumerate(conversations):
        result.conversations += 1
        result.hits += _hits(row, source, conversation, index)
    return _without_boilerplate(result)


def _hits(row: int, source: str, conversation: dict[str, Any], index: BenchmarkIndex) -> Iterator[Hit]:
    best: dict[int, tuple[str, Overlap]] = {}
    for message, text in _messages(conversation):
        for number, overlap in index.overlaps(text).items():
            if number not in best or overlap.share > best[number][1].share:
                best[number] = message, overlap
    for number, (message, overlap) in best.items():
        benchmark, item = index.items[number]
        shown = None if benchmark in UNSHOWN else overlap.words[:SHOWN_CHARS]
        yield Hit(row, source, message, benchmark, item, overlap.kind, round(overlap.share, 3), shown)


def _hits_of_batch(batch: dict[str, list[str]], rows: list[int], index: BenchmarkIndex) -> dict[str, list[str]]:
    """The hits of some rows of a source as JSON texts: what crosses from a worker to us."""
    pairs = zip(rows, batch["source"], batch["conversation"], strict=True)
    found = [hit for row, source, text in pairs for hit in _hits(row, source, json.loads(text), index)]
    return {"hit": [json.dumps(asdict(hit)) for hit in found]}


def _without_boilerplate(found: Contamination) -> Contamination:
    partial = Counter((hit.benchmark, hit.item) for hit in found.hits if hit.share < BOILERPLATE_SHARE)
    found.boilerplate = {item: n for item, n in partial.items() if n > BOILERPLATE_CONVERSATIONS}
    found.hits = [
        hit
        for hit in found.hits
        if hit.share >= BOILERPLATE_SHARE or (hit.benchmark, hit.item) not in found.boilerplate
    ]
    return found


def _messages(conversation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, text) of every message of a conversation or a preference pair."""
    for key in _TURNS:
        turns = conversation.get(key) or []
        for number, turn in enumerate([{"content": turns}] if isinstance(turns, str) else turns):
            if turn.get("content"):
                yield f"{key}[{number}]", turn["content"]


class KeptOut:
    """Test items to keep out of training data, and {benchmark: why} of those that are not here (`missing`).

    The index is built when a source is first looked at.
    """

    def __init__(self, texts: Sequence[BenchmarkText], missing: dict[str, str] | None = None) -> None:
        self.texts = texts
        self.missing = missing or {}

    @cached_property
    def index(self) -> BenchmarkIndex:
        return BenchmarkIndex(self.texts)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the items, the rules and the code that compares."""
        digest = hashlib.sha256(Path(__file__).read_bytes())
        digest.update(json.dumps(self.texts).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Texts by benchmark."""
        return dict(Counter(benchmark for benchmark, _, _ in self.texts))

    def found_in(self, rows: datasets.Dataset, cached: Path, workers: int | None = None) -> Contamination:
        """The overlaps of a source's rows (`conversation`, JSON text, and `source`), found once and kept in a file.

        Rows are read one by one: what is held in memory is the index and the hits. `workers` processes share them
        (None: up to one a core, as far as there is work for them), with the same result for any number.
        """
        if cached.exists():
            return Contamination.from_json(json.loads(cached.read_text(encoding="utf-8")))
        found = Contamination(len(rows), self.index.counts(), self._hits_in(rows, cached.parent, workers))
        draft = cached.with_name(f".{cached.name}.{os.getpid()}")
        draft.write_text(json.dumps(_without_boilerplate(found).to_json(), ensure_ascii=True), encoding="utf-8")
        draft.replace(cached)
        return found

    def _hits_in(self, rows: datasets.Dataset, folder: Path, workers: int | None) -> list[Hit]:
        workers = workers or min(len(os.sched_getaffinity(0)), 1 + len(rows) // CONVERSATIONS_A_WORKER)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".scan-") as scratch:
            found = rows.map(
                partial(_hits_of_batch, index=self.index),
                with_indices=True,
                batched=True,
                batch_size=100,
                remove_columns=rows.column_names,
                features=datasets.Features({"hit": datasets.Value("string")}),
                num_proc=workers if workers > 1 else None,
                cache_file_name=str(Path(scratch) / "hits.arrow"),
                new_fingerprint="hits",
                desc="Comparing with benchmarks",
            )
            return [Hit(**json.loads(text)) for text in found["hit"]]


def kept_out(benchmarks: bool | Sequence[str] = True, data: str | Path | None = None) -> KeptOut | None:
    """The test items of benchmarks (True: all) that are here: in `data`, else HYMBA_TUNE_DATA, else on the hub.

    None where no benchmark is to be kept out.
    """
    if not benchmarks:
        return None
    return KeptOut(*benchmark_texts(data, None if benchmarks is True else benchmarks))


def combined(parts: Iterable[Contamination]) -> Contamination:
    """Several sources' as one."""
    whole = Contamination()
    for part in parts:
        whole.conversations += part.conversations
        whole.items |= part.items
        whole.hits += part.hits
        for item, count in part.boilerplate.items():
            whole.boilerplate[item] = whole.boilerplate.get(item, 0) + count
    return whole
