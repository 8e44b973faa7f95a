"""Training in two processes against training in one: the same losses and the same weights, in float32 on this CPU.

    python -m benchmarks.parity_matrix [METHOD...]

METHOD: those of METHODS; all without. Each trains the small model a few steps of four rows, in one process and in two
under each configuration of SHARINGS. What was measured is written after every cell, and in the end all cells that were
ever measured as the table of docs/distributed.md. Needs DeepSpeed, g++ and ninja.

    loss        the largest difference of a step's loss
    weights     the norm of the difference of all trained weights, as a share of the norm of how far training moved them
                (of an adapter: of its weights)

One process keeps activations; two recompute them where the method says so. ZeRO-3 keeps parameters below a threshold
whole in every process, and so all of a small model: here it is 0.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from benchmarks.record import RESULTS, write_result
from hymba_tune.errors import UserError
from hymba_tune.launch import RankFailed
from hymba_tune.paths import REPOSITORY
from hymba_tune.recipe import load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage
from hymba_tune.tiny import tiny_path
from hymba_tune.topology import find_config

STEPS, ROWS = 4, 4
SHARINGS = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
SHARDED = ("zero3", "zero3_offload")
_DORA = {"adapter": {"type": "dora", "r": 4, "alpha": 8}}
_RECOMPUTED = {"gradient_checkpointing": True}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft_recomputed": {"trainer": _RECOMPUTED},
    "dora": _DORA,
    "dora_recomputed": {**_DORA, "trainer": _RECOMPUTED},
    "dpo": {"method": "dpo"},
    "dpo_dora": {"method": "dpo", **_DORA},
}
TABLE = REPOSITORY / "docs" / "distributed.md"


def main() -> None:
    figures: dict[str, Any] = {}
    if sys.argv[1:]:
        figures = json.loads((RESULTS / "parity_matrix.json").read_text(encoding="utf-8"))["figures"]["cells"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for method in sys.argv[1:] or METHODS:
            alone = train(folder, method, "single")
            for sharing in SHARINGS:
                figures[f"{method} {sharing}"] = measured(folder, method, sharing, alone)
                write_result("parity_matrix", {"steps": STEPS, "rows_a_step": ROWS, "processes": 2, "cells": figures})
    write_table(figures)


def measured(folder: Path, method: str, sharing: str, alone: RunDir) -> dict[str, Any]:
    """A cell. An error that a user would see is a finding; any other is a mistake here."""
    try:
        return difference(alone, train(folder, method, sharing))
    except (UserError, RankFailed) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def write_data(folder: Path) -> None:
    """The weights all runs start from, chats, preferences, their mixes, and ZeRO-3 with a threshold of 0."""
    shutil.copytree(tiny_path(), folder / "start")  # the package's own may change while this runs
    rows = [(f"What is {i} plus {i % 7}?", f"It is {i + i % 7}.", "I do not know." * (1 + i % 3)) for i in range(64)]
    chats = [{"messages": [*_said("user", question), *_said("assistant", good)]} for question, good, _ in rows]
    pairs = [
        {"prompt": _said("user", question), "chosen": _said("assistant", good), "rejected": _said("assistant", bad)}
        for question, good, bad in rows
    ]
    for name, kind, form, lines in (("sft", "chats", "messages", chats), ("dpo", "preferences", "preference", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        source = {"path": f"{name}.jsonl", "format": form, "licence": "MIT"}
        mix = {"sources": {"own": source}} | ({"kind": kind} if kind == "preferences" else {})
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(mix), encoding="utf-8")
    for sharing in SHARDED:
        _write_sharded(folder, sharing)


def _write_sharded(folder: Path, sharing: str) -> None:
    """A shipped ZeRO-3 configuration with a threshold of 0; accelerate takes that from a DeepSpeed file alone."""
    shipped = yaml.safe_load(find_config(sharing).read_text(encoding="utf-8"))
    section = shipped["deepspeed_config"]
    devices = {part: {"device": section[f"offload_{part}_device"]} for part in ("optimizer", "param")}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **{f"offload_{k}": v for k, v in devices.items()}}
    automatic = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    settings = dict.fromkeys(automatic, "auto") | {"zero_optimization": zero}
    (folder / f"{sharing}.json").write_text(json.dumps(settings), encoding="utf-8")
    del shipped["mixed_precision"]  # accelerate wants it in DeepSpeed's own file
    shipped["deepspeed_config"] = {
        "deepspeed_config_file": str(folder / f"{sharing}.json"),
        "zero3_init_flag": section["zero3_init_flag"],
    }
    (folder / f"sharded-{sharing}.yaml").write_text(yaml.safe_dump(shipped), encoding="utf-8")


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def train(folder: Path, method: str, sharing: str) -> RunDir:
    """A run of `method` under `sharing`, in two processes but for `single`."""
    path = folder / f"{method}-{sharing}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, method, sharing)), encoding="utf-8")
    return run_stage(load_recipe(path))


def recipe_of(folder: Path, method: str, sharing: str) -> dict[str, Any]:
    settings = {"method": "sft", **METHODS[method]}
    config = str(folder / f"sharded-{sharing}.yaml") if sharing in SHARDED else sharing
    trainer = {
        "learning_rate": 1e-3, "global_batch": ROWS, "per_device_train_batch_size": ROWS // 2, "max_steps": STEPS,
        "logging_steps": 1, "lr_scheduler_type": "constant", "gradient_checkpointing": False,
        **settings.pop("trainer", {}),
    }  # fmt: skip
    if sharing == "single":
        trainer["gradient_checkpointing"] = False
    return {
        **settings,
        "stage": f"{method}-{sharing}",
        "model": {"from": str(folder / "start"), "dtype": "float32"},
        "data": {"mix": str(folder / f"{settings['method']}.yaml"), "max_length": 128, "packing": "none"},
        "trainer": trainer,
        "launch": {"config": config, "processes": 1 if sharing == "single" else 2},
        "eval": {"suites": []},
        "output": {"dir": str(folder / f"run-{method}-{sharing}")},
    }


def difference(alone: RunDir, together: RunDir) -> dict[str, float]:
    one, two = (losses(run) for run in (alone, together))
    return {
        "loss": max(abs(a - b) for a, b in zip(one, two, strict=True)),
        "weights": _share(weights(alone), weights(together), start(alone)),
        "last_loss": one[-1],
        "moved_loss": one[0] - one[-1],
    }


def losses(run: RunDir) -> list[float]:
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    folder, name = (run.adapter, "adapter_model") if run.adapter.exists() else (run.model, "model")
    return load_file(folder / f"{name}.safetensors")


def start(run: RunDir) -> dict[str, torch.Tensor]:
    """What a full training began with; nothing for an adapter, whose own norm is the measure."""
    return {} if run.adapter.exists() else load_file(run.path.with_name("start") / "model.safetensors")


def _share(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], begun: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys(), f"other weights: {sorted(one.keys() ^ two.keys())}"
    apart = math.fsum(_square(one[name], two[name]) for name in one)
    moved = math.fsum(_square(value, begun.get(name, torch.zeros_like(value))) for name, value in one.items())
    return math.sqrt(apart / moved)


def _square(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.double() - two.double()).square().sum())


def write_table(figures: dict[str, Any]) -> None:
    """The cells as Markdown, a method a line and a configuration a column, in place of the table that is there."""
    lines = [f"| loss, weights | {' | '.join(SHARINGS)} |", "|---" + "|---:" * len(SHARINGS) + "|"]
    for method in METHODS:
        cells = [_cell(figures.get(f"{method} {sharing}")) for sharing in SHARINGS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    text = TABLE.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- parity -->\n")
    _, _, after = rest.partition("<!-- end of parity -->")
    table = "\n".join(lines)
    TABLE.write_text(f"{before}<!-- parity -->\n{table}\n<!-- end of parity -->{after}", encoding="utf-8")


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not measured"
    return "failed" if "error" in cell else f"{cell['loss']:.1e}, {cell['weights']:.1e}"


if __name__ == "__main__":
    main()
