"""A small pipeline that kills itself: SFT, DPO and DoRA of a few steps each, ended by the kernel at a chosen moment.

A moment is a number of file operations in the runs' folder, and the seconds since the last of them: what a run does is
the same at every start, so moments mean the same on a slow machine as on a fast one. Each attempt is a fresh process of
a server that has imported everything already.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.test_stage import CONFIG

STAGES = ("first", "second", "third")
PRELOAD = [
    "tests.resume",
    "hymba_tune.stage",
    "hymba_tune.training.sft",
    "hymba_tune.training.dpo",
    "hymba_tune.evaluation.suite",
    "hymba_tune.data.packing",
    "hymba_tune.data.pairs",
    "hymba_tune.report.render",
]
TIMING = ("seconds", "tokens_per_second", "memory_gib")


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the process has begun its `operations`-th file operation."""

    operations: int
    delay: float = 0.0


def write_pipeline(folder: Path, tokenizer: Any) -> Path:
    """The pipeline's file in `folder`, with recipes, data and tokenizer beside it; its runs go to folder/NAME."""
    tokenizer.save_pretrained(folder / "tokenizer")
    chats, pairs = [], []
    for i in range(24):
        question, answer = {"role": "user", "content": f"How many? {i}"}, f"There are {i}."
        chats.append({"messages": [question, {"role": "assistant", "content": answer}]})
        pairs.append(
            {
                "prompt": [question],
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": f"No. {i * 7}"}],
            }
        )
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat_mix = {"sources": {"chats": {"path": "chats.jsonl", "format": "messages", "licence": "MIT"}}}
    pair_mix = {"kind": "preferences", "sources": {"pairs": {"path": "pairs.jsonl", "licence": "MIT"}}}
    for name, mix in (("chats", chat_mix), ("pairs", pair_mix)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(mix))
    trainer = {
        "learning_rate": 1e-2, "global_batch": 4, "num_train_epochs": 2, "logging_steps": 2, "save_steps": 3,
        "gradient_checkpointing": False, "warmup_steps": 2,
    }  # fmt: skip
    common = {"trainer": trainer, "eval": {"suites": ["tiny_math"], "limit": 2, "max_new_tokens": 3}}
    data = {"mix": "chats.yaml", "max_length": 256, "packing": "none", "validation": 4, "decontaminate": False}
    recipes: dict[str, dict[str, Any]] = {
        "first": {"method": "sft", "model": {"from": "scratch", "config": CONFIG, "tokenizer": "tokenizer"}},
        "second": {"method": "dpo", "model": {"from": "stage:first"}, "data": {**data, "mix": "pairs.yaml"}},
        "third": {
            "method": "sft",
            "model": {"from": "stage:second"},
            "adapter": {"type": "dora", "r": 2, "alpha": 4, "dropout": 0.1},
        },
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"stage": name, "data": data, **common, **recipe}))
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stages": [f"{name}.yaml" for name in STAGES]}))
    return path


def start(
    pipeline: Path,
    runs: Path,
    moment: Moment | None = None,
    timeline: Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Run the pipeline in a process of its own, killed at a moment (None: not at all); its exit code, -9 if killed.

    timeline: gets the seconds at which each file operation began, as JSON.
    prepare: a module's function that the process calls first.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    process = server.Process(target=_run, args=(pipeline, runs, moment, timeline, prepare))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def results(runs: Path) -> dict[str, Any]:
    """What must not depend on kills: the final weights' bytes, and metrics without their timing."""
    found: dict[str, Any] = {}
    for name in STAGES:
        for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
            if (runs / name / file).exists():
                found[f"{name}/{file}"] = (runs / name / file).read_bytes()
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        found[f"{name}/metrics"] = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
        scores = json.loads((runs / name / "eval" / "after" / "tiny_math.json").read_text())
        found[f"{name}/answers"] = [item["answer"] for item in scores["items"]]
    return found


def _run(
    pipeline: Path, runs: Path, moment: Moment | None, timeline: Path | None, prepare: Callable[[], None] | None
) -> None:
    import torch

    from hymba_tune.pipeline import load_pipeline, run_pipeline

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    times: list[float] = []
    began, folder = time.monotonic(), f"{runs}{os.sep}"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if not str(arguments[0]).startswith(folder):
            return
        times.append(time.monotonic() - began)
        if moment is not None and len(times) == moment.operations:
            if not moment.delay:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, whatever it is in
            signal.setitimer(signal.ITIMER_REAL, moment.delay)

    sys.addaudithook(watch)
    run_pipeline(load_pipeline(pipeline, [f"output.dir={runs}"]))
    if timeline is not None:
        timeline.write_text(json.dumps(times))
