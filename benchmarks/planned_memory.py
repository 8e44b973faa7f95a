"""What `hymba-tune plan` says of memory against the peak of real training steps on this CPU, for three sizes of model.

    python -m benchmarks.planned_memory [size]

Each size trains a few steps in a process of its own, through the trainer that recipes use, on random tokens. Measured
is the highest resident memory (VmHWM) less what the process holds once its libraries are loaded and have trained a tiny
model: that share, `libraries_mb`, is no part of the plan.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.record import write_result
from hymba_tune.geometry import Geometry, parameters
from hymba_tune.paths import REPOSITORY
from hymba_tune.plan import memory_bytes
from hymba_tune.recipe import Recipe
from hymba_tune.run_dir import RunDir

STEPS = 4
_SHARED = {"v_head_dim": 64, "mamba_d_state": 16, "num_memory_tokens": 128, "sliding_window": 1024}
CASES: dict[str, dict[str, Any]] = {
    "5M": {
        "config": {
            **_SHARED, "vocab_size": 8001, "hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 6,
            "num_attention_heads": 6, "num_key_value_heads": 2, "global_attn_idx": [0, 3, 5],
            "kv_reuse_group": [[1, 2]],
        },
        "length": 1024, "rows": 4, "accumulated": 1, "checkpointing": False,
    },
    "30M": {
        "config": {
            **_SHARED, "vocab_size": 16001, "hidden_size": 384, "intermediate_size": 1280, "num_hidden_layers": 10,
            "num_attention_heads": 12, "num_key_value_heads": 4, "global_attn_idx": [0, 5, 9],
            "kv_reuse_group": [[1, 2], [3, 4], [6, 7]],
        },
        "length": 2048, "rows": 1, "accumulated": 2, "checkpointing": False,
    },
    "100M": {
        "config": {
            **_SHARED, "vocab_size": 32001, "hidden_size": 640, "intermediate_size": 2176, "num_hidden_layers": 14,
            "num_attention_heads": 20, "num_key_value_heads": 4, "global_attn_idx": [0, 7, 13],
            "kv_reuse_group": [[1, 2], [3, 4], [5, 6], [8, 9], [10, 11]],
        },
        "length": 2048, "rows": 2, "accumulated": 1, "checkpointing": True,
    },
}  # fmt: skip


def recipe_of(case: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "stage": "memory",
            "method": "sft",
            "model": {"from": "scratch", "config": case["config"], "tokenizer": "tiny"},
            "data": {"mix": "none", "max_length": case["length"]},
            "trainer": {
                "per_device_train_batch_size": case["rows"],
                "global_batch": case["rows"] * case["accumulated"],
                "gradient_checkpointing": case["checkpointing"],
                "max_steps": STEPS,
                "save_strategy": "no",
                "logging_steps": 1,
            },
        }
    )


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest), in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure(case: dict[str, Any], folder: Path) -> dict[str, int]:
    """Train a few steps in this process. Bytes: of the libraries, and of the peak above them."""
    import torch
    from datasets import Dataset

    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.model import HymbaConfig, HymbaForCausalLM
    from hymba_tune.model.precision import choose_matmul_precision
    from hymba_tune.tiny import tiny_config, tiny_path
    from hymba_tune.training.sft import train_sft

    choose_matmul_precision()
    recipe, tokenizer = recipe_of(case), load_tokenizer(tiny_path())
    ids = torch.randint(3, 1000, (case["rows"] * case["accumulated"], case["length"])).tolist()
    rows = [{"input_ids": row, "labels": row, "seq_lengths": [case["length"]]} for row in ids]

    def train(config: HymbaConfig, name: str) -> None:
        torch.manual_seed(0)
        run = RunDir(folder / name)
        run.path.mkdir()
        train_sft(recipe, HymbaForCausalLM(config), tokenizer, Dataset.from_list(rows), None, run)

    train(tiny_config(), "libraries")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, but would serve the next steps unseen
    libraries = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    train(HymbaConfig(**case["config"]), "measured")
    return {"libraries": libraries, "peak": resident("VmHWM") - libraries}


def compare(name: str) -> dict[str, Any]:
    """One size: measured in a new process, and planned."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.planned_memory", name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ).stdout
    measured = json.loads(answer.splitlines()[-1])
    case, mega = CASES[name], 1e6
    geometry = Geometry.of(case["config"])
    trained = sum(parameters(geometry).values())
    plan = memory_bytes(recipe_of(case), geometry, trained, adapted=False, on_gpu=False)
    return {
        "parameters": trained,
        "tokens_a_micro_batch": case["rows"] * case["length"],
        "gradient_checkpointing": case["checkpointing"],
        "libraries_mb": measured["libraries"] / mega,
        "measured_mb": measured["peak"] / mega,
        "planned_mb": sum(plan.values()) / mega,
        "planned_over_measured": sum(plan.values()) / measured["peak"],
        "plan_mb": {part: count / mega for part, count in plan.items()},
    }


def main() -> None:
    if len(sys.argv) > 1:
        with TemporaryDirectory() as folder:
            print(json.dumps(measure(CASES[sys.argv[1]], Path(folder))))
        return
    write_result("planned_memory", {"steps": STEPS, "sizes": {name: compare(name) for name in CASES}})


if __name__ == "__main__":
    main()
