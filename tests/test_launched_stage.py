"""A stage whose training runs in two processes: what one process would have learned."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hymba_tune.recipe import load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage

STEPS = 3


def recipe_of(folder: Path, config: str) -> Path:
    """A few steps of four rows on the small model, two rows a process and micro-batch."""
    rows = [
        [{"role": "user", "content": f"How many? {i}"}, {"role": "assistant", "content": "one " * (1 + i % 5)}]
        for i in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    mix = {"sources": {"chats": {"path": "chats.jsonl", "format": "messages", "licence": "MIT"}}}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    recipe = {
        "stage": "count",
        "method": "sft",
        "model": {"from": "tiny", "dtype": "float32"},
        "data": {"mix": "mix.yaml", "max_length": 64, "packing": "none"},
        "trainer": {
            "learning_rate": 1e-3, "global_batch": 4, "per_device_train_batch_size": 2, "max_steps": STEPS,
            "logging_steps": 1, "lr_scheduler_type": "constant", "gradient_checkpointing": False,
        },
        "launch": {"config": config, "processes": 1 if config == "single" else 2},
        "eval": {"suites": []},
        "output": {"dir": str(folder / config)},
    }  # fmt: skip
    path = folder / f"{config}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def trained(folder: Path, config: str) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """(losses, weights, tokens) of a run."""
    run: RunDir = run_stage(load_recipe(recipe_of(folder, config)))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return (
        [line["loss"] for line in lines],
        load_file(run.model / "model.safetensors"),
        [line["tokens"] for line in lines],
    )


@pytest.mark.parametrize("config", ["ddp", pytest.param("zero2", marks=pytest.mark.full)])
def test_two_processes_learn_what_one_does(tmp_path: Path, config: str) -> None:
    if config != "ddp":
        pytest.importorskip("deepspeed")
    losses, weights, tokens = trained(tmp_path, "single")
    shared_losses, shared_weights, shared_tokens = trained(tmp_path, config)
    assert len(losses) == STEPS
    assert shared_tokens == tokens
    torch.testing.assert_close(torch.tensor(shared_losses), torch.tensor(losses), atol=1e-4, rtol=0)
    assert shared_weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert float((shared_weights[name] - weight).norm()) <= 1e-3 * float(weight.norm()) + 1e-6, name
