"""A mix: several sources, each with its amount -> one shuffled dataset of conversations, and a count of every source.

    sources:
      math:
        path: ${HYMBA_TUNE_DATA}/data/gsm8k/train.jsonl
        map: {user: question, assistant: answer}
        licence: MIT
      mine:
        path: my_chats.jsonl              # next to the mix file
        weight: 2                         # each conversation twice
    on_bad_row: error

With `kind: preferences` it holds preference pairs (preferences.py) instead, for DPO, with `kind: documents` plain text
(plain_text.py), for pretraining: what is said of conversations below holds for them. The same mix, seed and files give
the same conversations in the same order, on every machine.
"""

import difflib
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from hymba_tune.data.decontaminate import Contamination, KeptOut, combined, kept_out
from hymba_tune.data.sources import (
    COLUMNS,
    GENERATORS,
    READERS,
    SUFFIXES,
    Conversion,
    Kind,
    Source,
    convert,
    fingerprint,
)
from hymba_tune.errors import UserError
from hymba_tune.layers import Origin
from hymba_tune.paths import expand, find
from hymba_tune.yaml_reader import Location, line_of, read_yaml

Ids = np.ndarray
"""(n,) int64: positions in the sources' conversations laid end to end."""


class Mix(BaseModel):
    """A mix file, checked: its files exist, formats and generators are known, amounts don't contradict each other.

    drop_duplicates: a conversation that is byte for byte in an earlier place (or source) is left out and counted
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sources: dict[str, Source] = Field(min_length=1)
    kind: Kind = "conversations"
    on_bad_row: Literal["error", "skip"] = "error"
    drop_duplicates: bool = False
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def place(self, name: str) -> str:
        """Where a source is defined, for messages: `mix.yaml:7: sources.NAME`."""
        return self._places.get(name, f"sources.{name}")

    def skips(self, name: str) -> bool:
        """Whether a source's bad rows are skipped rather than refused."""
        return (self.sources[name].on_bad_row or self.on_bad_row) == "skip"


@dataclass(frozen=True)
class SourceCount:
    """One source of a realised mix. read = kept + filtered + ties + skipped; `conversations` of it are in the split,
    of the rest some are `validation` (held out), some `duplicates`, some `contaminated` (they repeat a benchmark's
    test item), and some were not asked for.
    """

    source: str
    hub: str | None
    licence: str | None
    read: int
    filtered: int
    ties: int
    skipped: int
    first_skipped: str | None
    kept: int
    duplicates: int
    contaminated: int
    validation: int
    conversations: int


def load_mix(path: str | Path, kind: Kind | None = None) -> Mix:
    """Read and check a mix: a file, or the name of one in data_mixes/. UserError lists all problems, one a line.

    kind: what the mix must hold (None: whatever it says).
    """
    found = Path(path) if Path(path).is_file() else find(f"data_mixes/{path}.yaml", [Path.cwd()])
    if found is None:
        raise UserError(f"no mix {path}; give a .yaml file or the name of one in data_mixes/")
    values, lines = read_yaml(found)
    try:
        mix = Mix.model_validate(values)
        problems: list[tuple[Location, str]] = list(_contradictions(mix))
        if kind not in (None, mix.kind):
            problems.append((("kind",), f"{mix.kind}, but {kind} are needed here; name another mix"))
        sources = {name: _with_files(name, source, found, lines, problems) for name, source in mix.sources.items()}
    except ValidationError as error:
        problems = list(_invalid(error))
    if problems:
        texts = [f"{found}:{line_of(lines, at)}: {'.'.join(map(str, at))}: {message}" for at, message in problems]
        raise UserError("\n".join(dict.fromkeys(texts)))
    mix = mix.model_copy(update={"sources": sources})
    mix._places.update({name: f"{found}:{line_of(lines, ('sources', name))}: sources.{name}" for name in sources})
    return mix


def mix_fingerprint(mix: Mix) -> str:
    """Changes with whatever changes the realised mix, but for the seed: settings, files' bytes, formats' code."""
    parts = {
        name: [
            fingerprint(source, mix.kind, mix.skips(name), seed=0),
            source.take,
            source.weight,
            source.share,
            source.epochs,
        ]
        for name, source in mix.sources.items()
    }
    return hashlib.sha256(json.dumps([list(parts.items()), mix.drop_duplicates]).encode()).hexdigest()


def realise_mix(
    mix: Mix,
    seed: int,
    split: Literal["train", "validation"] = "train",
    *,
    validation: int | None = None,
    limit: int | None = None,
    keep_out: KeptOut | None = None,
    cache_dir: Path | None = None,
) -> tuple[datasets.Dataset, list[SourceCount]]:
    """The conversations of a split, shuffled: columns `conversation` (JSON text) and `source`; and a count a source.

    `validation` conversations are held out of all sources together, in proportion to their sizes; no training
    conversation equals one of them.
    `limit` keeps the first so many of the split. Conversations that repeat one of the test items to `keep_out` are in
    neither split (generators make theirs up and are not looked at). `cache_dir` holds the converted sources (None: in
    datasets' cache).
    """
    folder = _cache(cache_dir)
    converted = _convert_all(mix, seed, folder)
    overlaps = _overlaps(mix, seed, folder, converted, keep_out) if keep_out else {}
    rows = datasets.concatenate_datasets([table for table, _ in converted.values()])
    keys: np.ndarray = rows.data.column("key").to_numpy()
    distinct = _distinct(mix, _numbered(converted), keys)
    clean = {name: _without(ids, _numbered(converted)[name], overlaps.get(name)) for name, ids in distinct.items()}
    for name, ids in clean.items():
        if len(distinct[name]) and not len(ids):
            benchmarks = ", ".join(sorted({hit.benchmark for hit in overlaps[name].hits}))
            raise UserError(
                f"{mix.place(name)}: every one of its conversations repeats a test item of {benchmarks}; take another "
                "source, or list in data.decontaminate the other benchmarks"
            )
    pools = {name: _shuffled(ids, seed, name)[: mix.sources[name].take] for name, ids in clean.items()}
    pools, held = _hold_out(pools, keys, validation or 0)
    chosen = held if split == "validation" else _amounts(mix, pools)
    ids = _shuffled(np.concatenate(list(chosen.values())), seed, split)[:limit]
    return rows.select(ids).remove_columns("key"), _counts(mix, converted, distinct, clean, held, ids)


def mix_contamination(mix: Mix, seed: int, keep_out: KeptOut, cache_dir: Path | None = None) -> Contamination:
    """The overlaps of all conversations of a mix's sources with the test items, as realise_mix leaves them out."""
    folder = _cache(cache_dir)
    return combined(_overlaps(mix, seed, folder, _convert_all(mix, seed, folder), keep_out).values())


def mix_kept_out(mix: Mix, benchmarks: bool | Sequence[str] = True, data: str | None = None) -> KeptOut | None:
    """What decontaminate.kept_out gives; None too for a mix of generators only, which is not looked at."""
    if all(source.generator for source in mix.sources.values()):
        return None
    return kept_out(benchmarks, data)


def _cache(cache_dir: Path | None) -> Path:
    return cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hymba_tune"


def _overlaps(
    mix: Mix, seed: int, folder: Path, converted: dict[str, tuple[datasets.Dataset, Conversion]], keep_out: KeptOut
) -> dict[str, Contamination]:
    """The overlaps of each source but generators; kept under the fingerprints of the source and of the items."""
    found = {}
    for name, (table, _) in converted.items():
        source = mix.sources[name]
        if source.generator is None:
            mine = fingerprint(source, mix.kind, mix.skips(name), seed)
            cached = folder / f"{name}-{mine[:20]}-{keep_out.fingerprint[:20]}.contamination.json"
            found[name] = keep_out.found_in(table, cached)
    return found


def _without(ids: Ids, all_ids: Ids, overlaps: Contamination | None) -> Ids:
    """`ids` but for those that repeat a test item; `all_ids` are those of the source's rows in order."""
    return ids if overlaps is None else ids[~np.isin(ids, all_ids[overlaps.rows])]


def _convert_all(mix: Mix, seed: int, folder: Path) -> dict[str, tuple[datasets.Dataset, Conversion]]:
    """Every source converted, hub sources first: a hub that can't be reached is known before other work is done."""
    converted = {}
    for name in sorted(mix.sources, key=lambda name: mix.sources[name].hub is None):
        table, counts = convert(mix.sources[name], mix.kind, name, mix.place(name), mix.skips(name), seed, folder)
        if not counts.kept:
            raise UserError(
                f"{mix.place(name)}: not one of its {mix.kind} can be used (rows read {counts.read}, filtered "
                f"{counts.filtered}, ties {counts.ties}, skipped {counts.skipped}, the first: {counts.first_skipped}); "
                "check format, map and filter"
            )
        converted[name] = table, counts
    return {name: converted[name] for name in mix.sources}


def _numbered(converted: dict[str, tuple[datasets.Dataset, Conversion]]) -> dict[str, Ids]:
    ends = np.cumsum([len(table) for table, _ in converted.values()])
    return {
        name: np.arange(end - len(table), end) for (name, (table, _)), end in zip(converted.items(), ends, strict=True)
    }


def _distinct(mix: Mix, ids: dict[str, Ids], keys: np.ndarray) -> dict[str, Ids]:
    if not mix.drop_duplicates:
        return ids
    first = np.zeros(len(keys), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return {name: part[first[part]] for name, part in ids.items()}


def _shuffled(ids: Ids, seed: int, name: str) -> Ids:
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(ids)


def _hold_out(pools: dict[str, Ids], keys: np.ndarray, wanted: int) -> tuple[dict[str, Ids], dict[str, Ids]]:
    """Cut `wanted` ids off the pools, in proportion; then drop what equals one of them from the rest."""
    total = sum(map(len, pools.values()))
    if wanted >= total:
        raise UserError(f"validation: {wanted} of {total} conversations leave none to train on; hold out fewer")
    ends = np.round(np.cumsum([0, *map(len, pools.values())]) * wanted / total).astype(int)
    held = {name: pool[:n] for (name, pool), n in zip(pools.items(), np.diff(ends), strict=True)}
    held_keys = keys[np.concatenate(list(held.values()))]
    rest = {name: pool[len(held[name]) :] for name, pool in pools.items()}
    return {name: part[~np.isin(keys[part], held_keys)] for name, part in rest.items()}, held


def _amounts(mix: Mix, pools: dict[str, Ids]) -> dict[str, Ids]:
    """The ids of each source as often as its `weight` or `share` asks."""
    sizes = {name: round(len(pool) * (mix.sources[name].weight or 1)) for name, pool in pools.items()}
    shares = {name: source.share for name, source in mix.sources.items() if source.share}
    room = {name: round(len(pools[name]) * (mix.sources[name].epochs or 1)) for name in shares}
    fixed = sum(size for name, size in sizes.items() if name not in shares)
    if len(shares) < len(sizes):
        total = fixed / (1 - sum(shares.values()))
    else:
        total = min(room[name] / share for name, share in shares.items())
    for name, share in shares.items():
        sizes[name] = round(share * total)
        if sizes[name] > room[name]:
            raise UserError(
                f"{mix.place(name)}.share: {share} of the mix is {sizes[name]} conversations, but the source has "
                f"{len(pools[name])}; lower the share, or set epochs: {math.ceil(sizes[name] / len(pools[name]))} "
                "to repeat them so often"
            )
    return {name: np.resize(pool, sizes[name]) if len(pool) else pool for name, pool in pools.items()}


def _counts(
    mix: Mix,
    converted: dict[str, tuple[datasets.Dataset, Conversion]],
    distinct: dict[str, Ids],
    clean: dict[str, Ids],
    held: dict[str, Ids],
    ids: Ids,
) -> list[SourceCount]:
    return [
        SourceCount(
            source=name,
            hub=hub.id if (hub := mix.sources[name].hub) else None,
            licence=mix.sources[name].licence,
            read=counts.read,
            filtered=counts.filtered,
            ties=counts.ties,
            skipped=counts.skipped,
            first_skipped=counts.first_skipped,
            kept=counts.kept,
            duplicates=counts.kept - len(distinct[name]),
            contaminated=len(distinct[name]) - len(clean[name]),
            validation=len(held[name]),
            conversations=int(((ids >= numbers[0]) & (ids <= numbers[-1])).sum()),
        )
        for (name, (_, counts)), numbers in zip(converted.items(), _numbered(converted).values(), strict=True)
    ]


def _with_files(
    name: str, source: Source, mix_path: Path, lines: dict[Location, int], problems: list[tuple[Location, str]]
) -> Source:
    """`path` as a list of existing files, absolute; a relative one starts in the mix file's folder."""
    if source.path is None:
        return source
    at: Location = ("sources", name, "path")
    origin = Origin(f"{mix_path}:{line_of(lines, at)}", mix_path.absolute().parent)
    files: list[str] = []
    for text in [source.path] if isinstance(source.path, str) else source.path:
        pattern = origin.folder / expand(text, origin, ".".join(map(str, at)))
        found = [pattern] if pattern.exists() else sorted(pattern.parent.glob(pattern.name))
        if not found:
            problems.append((at, f"no file {pattern}; check the path"))
        unknown = [file for file in found if not file.name.endswith(SUFFIXES)]
        problems += [(at, f"{file}: unknown kind of file; use {', '.join(SUFFIXES)}") for file in unknown]
        files += map(str, found)
    return source.model_copy(update={"path": files})


def _contradictions(mix: Mix) -> Iterator[tuple[Location, str]]:
    for name, source in mix.sources.items():
        at: Location = ("sources", name)
        origins = [key for key in ("path", "hub", "generator") if getattr(source, key) is not None]
        if len(origins) != 1:
            yield at, f"has {' and '.join(origins) or 'no origin'}; give exactly one of path, hub, generator"
        amounts = [key for key in ("take", "weight", "share") if getattr(source, key) is not None]
        if len(amounts) > 1:
            yield (*at, amounts[1]), f"contradicts {amounts[0]}; give one of take, weight, share"
        if source.epochs and not source.share:
            yield (*at, "epochs"), "limits how often a share is filled; give share too, or use weight"
        if source.format_name(mix.kind) not in READERS[mix.kind]:
            known = ", ".join(READERS[mix.kind])
            yield (*at, "format"), f"{source.format!r} is unknown for {mix.kind}; known are {known}"
        columns, generators = COLUMNS[mix.kind], GENERATORS[mix.kind]
        for column in source.map or {}:
            if column not in columns:
                yield (*at, "map", column), f"no format for {mix.kind} reads it; use {', '.join(columns)}"
        if source.generator and source.generator.name not in generators:
            known = ", ".join(generators) or "none"
            yield (*at, "generator", "name"), f"{source.generator.name!r} is unknown for {mix.kind}; known are {known}"
    shares = [source.share for source in mix.sources.values() if source.share]
    if shares and len(shares) == len(mix.sources) and abs(sum(shares) - 1) > 1e-6:
        yield ("sources",), f"all sources have a share, but these sum to {sum(shares):g}; make it 1"
    if shares and len(shares) < len(mix.sources) and sum(shares) >= 1:
        yield ("sources",), f"the shares sum to {sum(shares):g} and leave nothing for the other sources; make it less"


def _invalid(error: ValidationError) -> Iterator[tuple[Location, str]]:
    """pydantic's findings as a user reads them."""
    for found in error.errors(include_url=False):
        location: Location = tuple(found["loc"])
        value: Any = found["input"]
        if found["type"] == "extra_forbidden":
            known = [*Mix.model_fields, *Source.model_fields]
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            yield location, f"unknown key{f'; did you mean {close[0]}?' if close else ''}"
        elif found["type"] == "missing":
            yield location, "missing; add it"
        else:
            yield location, f"{value!r}: {found['msg'][0].lower()}{found['msg'][1:]}"
