"""Comparing a mix with the benchmarks' test items: conversations a second, in one process and in several.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.contamination_scan [--mix sft2_files]

Claim: the same overlaps for any number of processes. `processor` counts the seconds of all processes together. Sources
are converted, and the index of test items is built, before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets

from benchmarks.record import write_result
from hymba_tune.data.decontaminate import Contamination, KeptOut, kept_out
from hymba_tune.data.mix import load_mix, realise_mix


def scan(rows: datasets.Dataset, items: KeptOut, workers: int, folder: Path) -> tuple[Contamination, dict[str, float]]:
    """The overlaps, and seconds on the clock and of all processes together."""
    clock, before = time.perf_counter(), os.times()
    found = items.found_in(rows, folder / f"{workers}.json", workers)
    spent = [after - start for after, start in zip(os.times()[:4], before[:4], strict=True)]
    return found, {"clock": time.perf_counter() - clock, "processor": sum(spent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", default="sft2_files")
    mix = parser.parse_args().mix
    items = kept_out()
    assert items is not None
    rows, _ = realise_mix(load_mix(mix), 0)
    rows = rows.flatten_indices()
    figures: dict[str, Any] = {"mix": mix, "conversations": len(rows), "test_items": sum(items.index.counts().values())}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, *([count] if (count := len(os.sched_getaffinity(0))) > 1 else [])):
            found, seconds = scan(rows, items, workers, Path(folder))
            results.append(found)
            figures[f"processes_{workers}"] = {
                "seconds": seconds,
                "conversations_a_second": len(rows) / seconds["clock"],
            }
    figures |= {"overlaps": len(results[0].hits), "equal": all(found == results[0] for found in results)}
    write_result("contamination_scan", figures)


if __name__ == "__main__":
    main()
