"""`data check`: which conversations of a mix repeat a benchmark's test item, as a table, and as a file if wanted."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hymba_tune.data.decontaminate import Contamination, KeptOut, kept_out
from hymba_tune.data.mix import load_mix, mix_contamination
from hymba_tune.errors import UserError
from hymba_tune.report.text import shortened, visible

SHOWN = 50
"""Overlaps that the table lists; the file has all."""
CHARACTERS = 90


def check_mix(
    mix: str, *, data: Path | None = None, out: Path | None = None, seed: int = 0, console: Console | None = None
) -> Contamination:
    """Print the overlaps of a mix with the benchmarks that are here, and write all of them to `out`.

    Raises UserError for a mix that can't be used, and where no benchmark's items are here.
    """
    items = kept_out(data=data)
    assert items is not None
    if not items.texts:
        reasons = "; ".join(f"{name}: {why}" for name, why in items.missing.items())
        raise UserError(f"no benchmark's test items are here to compare with: {reasons}")
    found = mix_contamination(load_mix(mix), seed, items)
    if out is not None:
        out.write_text(json.dumps(found.to_json(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    _show(found, items, console or Console())
    return found


def _show(found: Contamination, items: KeptOut, console: Console) -> None:
    table = Table("source", "row", "benchmark", "item", "kind", "share", "text in common", box=None, pad_edge=False)
    for hit in found.hits[:SHOWN]:
        text = "not shown" if hit.text is None else visible(shortened(hit.text, CHARACTERS))
        cells = (hit.source, str(hit.row), hit.benchmark, hit.item, hit.kind, f"{hit.share:.0%}", text)
        table.add_row(*map(Text, cells))
    if found.hits:
        console.print(table)
    if len(found.hits) > SHOWN:
        console.print(f"and {len(found.hits) - SHOWN} more overlaps; --out FILE writes all of them")
    for (benchmark, item), count in found.boilerplate.items():
        console.print(Text(f"{count} conversations share a phrase with {benchmark}/{item}: boilerplate, kept"))
    compared = ", ".join(f"{name} {count}" for name, count in items.counts().items())
    console.print(Text(f"{found.dropped} of {found.conversations} conversations repeat a test item; a run drops them"))
    console.print(Text(f"compared with {compared}"))
    for name, why in items.missing.items():
        console.print(Text(f"not compared with {name}: {why}"))
