"""Preparing the data of a large mix: memory that does not grow with it, time that grows in proportion.

    HYMBA_TUNE_DATA=... python -m benchmarks.data_scale [--millions 12 50 200]

A generated mix of conversations of some 1,500 tokens (10B tokens are 6.5M of them) goes from JSONL to packed rows of
8,192 tokens with the real tokenizer. Each size runs in processes of its own. Reported: the most memory that all of them
held at once without the files they map (which the system takes back when it needs the room), tokens a CPU second and a
wall second. Claims: memory within 10 % and tokens a CPU second within 15 % from a quarter of the largest size to all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write_result

TOKENS_A_CONVERSATION = 1500
MAX_LENGTH = 8192
SAMPLING_SECONDS = 0.25


def write_mix(folder: Path, tokens: int) -> Path:
    """A mix of about so many tokens, in a JSONL file beside it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(tokens // TOKENS_A_CONVERSATION):
            # Random words take about 3.5 tokens each.
            count = min(int(rng.lognormvariate(5.87, 0.6)), 3000)
            text = " ".join(rng.choices(words, k=count))
            half = rng.randint(1, len(text) - 1)
            turns = [
                {"role": "user", "content": text[:half] or "?"},
                {"role": "assistant", "content": text[half:] + "."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    mix = folder / "mix.yaml"
    mix.write_text("sources:\n  chats: {path: chats.jsonl}\ndrop_duplicates: true\n")
    return mix


def prepare(mix: Path, folder: Path) -> None:
    """What a run does before training: convert, shuffle, encode, pack. Prints the counts."""
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.mix import load_mix, realise_mix
    from hymba_tune.data.packing import build_rows

    tokenizer = load_tokenizer(Path(os.environ["HYMBA_TUNE_DATA"]) / "hymba-1.5b")
    dataset, _ = realise_mix(load_mix(mix), seed=0, cache_dir=folder / "cache")
    _, counts = build_rows(dataset, tokenizer, MAX_LENGTH, folder=folder / "rows")
    print(
        json.dumps({"tokens": counts.tokens, "rows": counts.rows, "documents": counts.documents, "fill": counts.fill})
    )


def measure(millions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mix = write_mix(folder, millions * 1_000_000)
        began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.data_scale", "--prepare", str(mix), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        own, mapped, cpu = _watch(psutil.Process(process.pid), process)
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"preparing {millions}M tokens failed")
        seconds = time.monotonic() - began
        counts = json.loads(output.splitlines()[-1])
        return counts | {
            "peak memory, MiB": own / 2**20,
            "peak memory with mapped files, MiB": mapped / 2**20,
            "CPU seconds": cpu,
            "wall seconds": seconds,
            "tokens a CPU second": counts["tokens"] / cpu,
            "tokens a wall second": counts["tokens"] / seconds,
        }


def _watch(root: psutil.Process, process: subprocess.Popen[str]) -> tuple[int, int, float]:
    """(most memory of their own, most memory, CPU seconds) of a process and its children together."""
    own = total = 0
    cpu: dict[int, float] = {}
    while process.poll() is None:
        here_own = here_total = 0
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in family:
            try:
                memory, times = member.memory_info(), member.cpu_times()
            except psutil.NoSuchProcess:
                continue
            here_own += memory.rss - memory.shared
            here_total += memory.rss
            cpu[member.pid] = times.user + times.system
        own, total = max(own, here_own), max(total, here_total)
        time.sleep(SAMPLING_SECONDS)
    return own, total, sum(cpu.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--millions", type=int, nargs="+", default=[12, 50, 200], help="tokens of each mix, in millions"
    )
    parser.add_argument("--prepare", nargs=2, type=Path, metavar=("MIX", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(*arguments.prepare)
        return
    write_result("data_scale", {f"{millions}M tokens": measure(millions) for millions in arguments.millions})


if __name__ == "__main__":
    main()
