"""Stages that train in several processes: their recipes, and ranks that sleep, die or tell what they hold.

A function here that takes a run's folder runs inside each rank, in place of hymba_tune.stage.train_rank.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers.trainer
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hymba_tune.training.trainer
from hymba_tune.launch import launch
from hymba_tune.model import ops
from hymba_tune.model.norm import RMSNorm
from hymba_tune.rank import HOST
from hymba_tune.recipe import load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage, train_rank
from hymba_tune.topology import find_config
from hymba_tune.training.watchdog import StepWatchdog
from tests.test_stage import CONFIG

STEPS = 4
IMPATIENCE_SECONDS = 4.0
# What float32 sums in another order and four steps of Adam may change, as a share of a weight's norm.
NOISE = 1e-4


def write_recipe(folder: Path, tokenizer: Any, config: str, processes: int = 2, **sections: Any) -> Path:
    """A few steps of four rows on a model made of random weights, two rows a process and micro-batch.

    Args:
        config: the name of a configuration; ZeRO-3 shares out every weight here, however small.
        sections: recipe sections, whose keys are laid over those below; `name` is the run's.
    """
    name = sections.pop("name", config)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [
        [{"role": "user", "content": f"How many? {i}"}, {"role": "assistant", "content": "one " * (1 + i % 5)}]
        for i in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    mix = {"sources": {"chats": {"path": "chats.jsonl", "format": "messages", "licence": "MIT"}}}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    recipe: dict[str, Any] = {
        "stage": "count",
        "method": "sft",
        "model": {"from": "scratch", "config": CONFIG, "tokenizer": "tokenizer", "dtype": "float32"},
        "data": {"mix": "mix.yaml", "max_length": 64, "packing": "none", "decontaminate": False},
        "trainer": {
            "learning_rate": 1e-2, "global_batch": 4, "per_device_train_batch_size": 2, "max_steps": STEPS,
            "logging_steps": 1, "save_steps": 2, "lr_scheduler_type": "constant", "gradient_checkpointing": False,
        },
        "launch": {"config": _shared(folder, config), "processes": processes},
        "eval": {"suites": []},
        "output": {"dir": str(folder / name)},
    }  # fmt: skip
    for section, values in sections.items():
        recipe[section] = {**(recipe.get(section) or {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _shared(folder: Path, config: str) -> str:
    """ZeRO-3 keeps parameters below a threshold whole, and so all of a small model: here it is 0."""
    if config != "zero3":
        return config
    shipped = yaml.safe_load(find_config(config).read_text())
    del shipped["mixed_precision"]  # accelerate wants it in DeepSpeed's own file
    settings: dict[str, Any] = dict.fromkeys(
        ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"), "auto"
    )
    settings["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": False}
    (folder / "sharded.yaml").write_text(yaml.safe_dump(shipped))
    return str(folder / "sharded.yaml")


def run(path: Path) -> RunDir:
    return run_stage(load_recipe(path))


def run_with(path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The stage, its ranks running a function of this module."""
    with monkeypatch.context() as patch:
        patch.setattr("hymba_tune.stage.launch", lambda _, *rest: launch(f"tests.launched:{function}", *rest))
        return run(path)


def metrics(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    adapter = run.adapter / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run.model / "model.safetensors")


def assert_same_training(found: RunDir, expected: RunDir) -> None:
    """The same losses, token counts and weights, but for the noise of float32 sums."""
    ours, theirs = metrics(found), metrics(expected)
    assert [(line["step"], line["tokens"], line["supervised_tokens"]) for line in ours] == [
        (line["step"], line["tokens"], line["supervised_tokens"]) for line in theirs
    ]
    assert len(ours) == STEPS
    losses = [torch.tensor([line["loss"] for line in lines]) for lines in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    mine, other = weights(found), weights(expected)
    assert mine.keys() == other.keys()
    for name, weight in other.items():
        assert float((mine[name] - weight).norm()) <= NOISE * float(weight.norm()) + 1e-6, name


class _At(TrainerCallback):
    """Does something in rank 1 before the step after `step`."""

    step = 3

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if os.environ["RANK"] == "1" and state.global_step == self.step:
            self.act()

    def act(self) -> None:
        raise NotImplementedError


class _Sleeps(_At):
    def act(self) -> None:
        time.sleep(600)


class _IsStopped(_At):
    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class _IsKilled(_At):
    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class _Impatient(StepWatchdog):
    """Grants a few seconds, but only once the first steps are done: those take long on a busy machine."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == _At.step:
            self.seconds = IMPATIENCE_SECONDS


def sleeping(folder: str) -> None:
    _train(folder, _Sleeps(), _Impatient)


def stopped(folder: str) -> None:
    _train(folder, _IsStopped(), _Impatient)


class _KillsLauncher(_At):
    def act(self) -> None:
        host = Path(f"/proc/{os.environ[HOST]}/stat").read_text()
        os.kill(int(host.rpartition(")")[2].split()[1]), signal.SIGKILL)
        time.sleep(600)


def launcher_killed(folder: str) -> None:
    _train(folder, _KillsLauncher())


def killed(folder: str) -> None:
    _train(folder, _IsKilled())


def _train(folder: str, callback: TrainerCallback, watchdog: type[StepWatchdog] = StepWatchdog) -> None:
    cast(Any, transformers.trainer).DEFAULT_CALLBACKS.append(callback)
    cast(Any, hymba_tune.training.trainer).StepWatchdog = watchdog
    train_rank(folder)


class Described(TrainerCallback):
    """Writes description-RANK.json beside the run: what DeepSpeed holds, and what dtypes a forward pass computes in.

    decay: weight decay by parameter's name, of the optimizer's groups.
    parameters: dtype, numel and numel of this rank's share.
    masters: dtypes of the pieces that the optimizer steps on.
    at_use: dtype and numel of a parameter when its module computes, by name.
    scan: dtypes of dt, A, D and the final state in every selective scan.
    projected: dtypes that in_proj gives.
    norm_errors: of every RMSNorm, the largest relative error of an output against float64 on the same input.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder).parent / f"description-{os.environ['RANK']}.json"
        self.found: dict[str, Any] = {"at_use": {}, "scan": [], "projected": [], "norm_errors": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"].optimizer
        names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
        self.found["decay"] = {names[id(p)]: decay for group, decay in _groups(optimizer) for p in group}
        self.found["masters"] = sorted({str(piece.dtype) for piece in _masters(optimizer)})
        self.found["parameters"] = {
            names[id(p)]: [str(p.dtype), getattr(p, "ds_numel", p.numel()), getattr(p, "ds_tensor", p).numel()]
            for p in model.parameters()
        }
        for name, module in model.named_modules():
            if isinstance(module, RMSNorm):
                module.register_forward_hook(lambda m, x, y, name=name: self._norm(name, m, x[0], y))
            if name.endswith("mamba"):
                module.register_forward_pre_hook(lambda m, _, name=name: self._mixer(name, m))
                module.in_proj.register_forward_hook(lambda m, x, y: self.found["projected"].append(str(y.dtype)))
                module.dt_proj[0].register_forward_hook(lambda m, x, y, name=name: self._bias(name, m))
        original = ops.selective_scan

        def scan(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            y, final = original(*inputs)
            self.found["scan"].append([str(t.dtype) for t in (inputs[1], inputs[2], inputs[5], final)])
            return y, final

        cast(Any, ops).selective_scan = scan

    def _norm(self, name: str, module: RMSNorm, x: torch.Tensor, y: torch.Tensor) -> None:
        self.found["at_use"][f"{name}.weight"] = [str(module.weight.dtype), module.weight.numel()]
        wide = x.detach().double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight.detach().double()
        error = ((y.detach().double() - exact).abs() / exact.abs().clamp_min(1e-6)).max()
        self.found["norm_errors"][name] = [str(y.dtype), float(error)]

    def _mixer(self, name: str, mixer: Any) -> None:
        for key in ("A_log", "D"):
            value = getattr(mixer, key)[0]
            self.found["at_use"][f"{name}.{key}.0"] = [str(value.dtype), value.numel()]

    def _bias(self, name: str, projection: Any) -> None:
        self.found["at_use"][f"{name}.dt_proj.0.bias"] = [str(projection.bias.dtype), projection.bias.numel()]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.file.write_text(json.dumps(self.found))


def _groups(optimizer: Any) -> list[tuple[list[torch.nn.Parameter], float]]:
    """The parameters of each group of DeepSpeed's optimizer, and their weight decay."""
    groups = optimizer.optimizer.param_groups
    if hasattr(optimizer, "bit16_groups"):  # ZeRO-1 and 2
        return [(list(ps), group["weight_decay"]) for ps, group in zip(optimizer.bit16_groups, groups, strict=True)]
    of_group = optimizer.sub_group_to_group_id
    return [(list(ps), groups[of_group[i]]["weight_decay"]) for i, ps in enumerate(optimizer.fp16_groups)]


def _masters(optimizer: Any) -> list[torch.Tensor]:
    zero3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return list(optimizer.fp32_partitioned_groups_flat if zero3 else optimizer.single_partition_of_fp32_groups)


def described(folder: str) -> None:
    _train(folder, Described(folder))
