"""Training in two processes against training in one: the same losses and the same weights, in float32 on this CPU.

    python -m benchmarks.parity_matrix [METHOD...]

METHOD: sft, dora or dpo; all without. Each trains the small model a few steps of four rows, in one process and in two
under each configuration of SHARINGS. What was measured is written after every cell. Needs DeepSpeed, g++ and ninja.

    loss        the largest difference of a step's loss
    weights     the norm of the difference of all trained weights, as a share of the norm of how far training moved them
                (of an adapter: of its weights)

ZeRO-3 keeps parameters below a threshold whole in every process, and so all of a small model: here it is 0.
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

from benchmarks.record import write_result
from hymba_tune.errors import UserError
from hymba_tune.launch import RankFailed
from hymba_tune.recipe import Recipe, load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage
from hymba_tune.tiny import tiny_path
from hymba_tune.topology import find_config

STEPS, ROWS = 4, 4
SHARINGS = ("zero3", "ddp", "zero2", "zero1")
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dora": {"adapter": {"type": "dora", "r": 4, "alpha": 8}},
    "dpo": {"method": "dpo"},
}


def main() -> None:
    figures: dict[str, Any] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for method in sys.argv[1:] or METHODS:
            alone = train(folder, method, "single")
            for sharing in SHARINGS:
                cell: dict[str, Any]
                try:
                    cell = difference(alone, train(folder, method, sharing))
                except (
                    UserError,
                    RankFailed,
                ) as error:  # a finding; anything else is a mistake here
                    cell = {"error": f"{type(error).__name__}: {error}"}
                figures[f"{method} {sharing}"] = cell
                write_result("parity_matrix", {"steps": STEPS, "rows_a_step": ROWS, "processes": 2, "cells": figures})
    print(table(figures))


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
    automatic = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    settings = dict.fromkeys(automatic, "auto") | {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    (folder / "zero3.json").write_text(json.dumps(settings), encoding="utf-8")
    shipped = yaml.safe_load(find_config("zero3").read_text(encoding="utf-8"))
    del shipped["mixed_precision"]  # accelerate wants it in DeepSpeed's own file
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": False}
    (folder / "sharded.yaml").write_text(yaml.safe_dump(shipped), encoding="utf-8")


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def train(folder: Path, method: str, sharing: str) -> RunDir:
    """A run of `method` under `sharing`, in two processes but for `single`."""
    path = folder / f"{method}-{sharing}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, method, sharing)), encoding="utf-8")
    recipe: Recipe = load_recipe(path)
    return run_stage(recipe)


def recipe_of(folder: Path, method: str, sharing: str) -> dict[str, Any]:
    settings = {"method": "sft", **METHODS[method]}
    config = str(folder / "sharded.yaml") if sharing == "zero3" else sharing
    return {
        **settings,
        "stage": f"{method}-{sharing}",
        "model": {"from": str(folder / "start"), "dtype": "float32"},
        "data": {"mix": str(folder / f"{settings['method']}.yaml"), "max_length": 128, "packing": "none"},
        "trainer": {
            "learning_rate": 1e-3, "global_batch": ROWS, "per_device_train_batch_size": ROWS // 2, "max_steps": STEPS,
            "logging_steps": 1, "lr_scheduler_type": "constant", "gradient_checkpointing": False,
        },
        "launch": {"config": config, "processes": 1 if sharing == "single" else 2},
        "eval": {"suites": []},
        "output": {"dir": str(folder / f"run-{method}-{sharing}")},
    }  # fmt: skip


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
    apart = math.fsum(float((one[name].double() - two[name].double()).square().sum()) for name in one)
    moved = math.fsum(
        float((value.double() - begun[name].double() if name in begun else value.double()).square().sum())
        for name, value in one.items()
    )
    return math.sqrt(apart / moved)


def table(figures: dict[str, Any]) -> str:
    """The cells as Markdown: a method a line, a configuration a column."""
    methods = list(dict.fromkeys(name.split()[0] for name in figures))
    lines = ["| | " + " | ".join(SHARINGS) + " |", "|---" * (len(SHARINGS) + 1) + "|"]
    for method in methods:
        cells = [figures.get(f"{method} {sharing}", {}) for sharing in SHARINGS]
        lines.append(f"| {method} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> str:
    if "error" in cell:
        return "failed"
    return f"{cell['loss']:.1e}, {cell['weights']:.1e}" if cell else "not measured"


if __name__ == "__main__":
    main()
