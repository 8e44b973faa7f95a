"""What every method adds to TRL: arguments, weight decay by name, token counts, checkpoints to resume from."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import trl.trainer.utils
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.trainer_callback import PrinterCallback

from hymba_tune.recipe import Recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.training.callbacks import AdapterAudit, EarlyWarnings, MetricsFile, ProgressBar, TokenMeter
from hymba_tune.training.distributed import set_up_deepspeed
from hymba_tune.training.guards import FiniteSteps, require_checkpoint_space
from hymba_tune.training.watchdog import TIMEOUT_MARGIN_SECONDS, StepWatchdog

# Decay pulls towards zero: wrong for decay rates, skips, norms, biases and the learned meta tokens.
_NOT_DECAYED = re.compile(r"(A_log|(^|\.)D\.\d|norm|bias|memory_tokens|lora_magnitude)")

# Where trackers write on this machine, but for those that the user has set; read when a trainer is made.
_LOG_FOLDERS = {"TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "TRACKIO_DIR"} - os.environ.keys()

_uses_triton = trl.trainer.utils._use_triton


def _scores_labels_only(device: torch.device) -> bool:
    return device.type == "cpu" or _uses_triton(device)


# Where Triton can't run, TRL projects every position onto the vocabulary, for the sake of devices that compile for each
# shape. On a CPU only the tokens with a label are worth it: a DPO step is 2.8 times as fast, with the same values.
trl.trainer.utils._use_triton = _scores_labels_only


class MeteredTrainer(Trainer):
    """A mixin in front of one of TRL's trainers: counts tokens, decays by name, writes no model card of its own."""

    meter: TokenMeter
    steps: FiniteSteps
    # Set where accelerate's own mixed precision would cast every parameter: operations choose their dtype instead.
    autocasts = False

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        contexts = super().compute_loss_context_manager()
        if self.autocasts:
            contexts.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return contexts

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.count_tokens(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.steps.saw(inputs, loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.steps.check(self, norm)
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        require_checkpoint_space(self, Path(str(self.args.output_dir)))
        super()._save_checkpoint(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Each source's held-out rows on their own (eval_SOURCE_loss), and the mean over all rows (eval_loss)."""
        parts: Any = self.eval_dataset
        if eval_dataset is not None or not isinstance(parts, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        found: dict[str, Any] = {}
        loss, rows = 0.0, sum(map(len, parts.values()))
        for name, part in parts.items():
            prefix, part_name = f"{metric_key_prefix}_{name}", cast(Any, name)  # transformers takes a name, untyped
            found |= super().evaluate(part_name, ignore_keys, prefix)
            loss += found[f"{prefix}_loss"] * len(part) / rows
        together = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(together))
        return found | together

    def count_tokens(self, inputs: dict[str, Any]) -> None:
        """Meter a batch before its step; what it holds depends on the method."""
        self.meter.count(inputs["labels"], inputs.get("attention_mask"))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if not _NOT_DECAYED.search(name)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """transformers' own schedules; as its warmup_steps, num_decay_steps below 1 is a share of all steps."""
        kwargs = self.args.lr_scheduler_kwargs
        optimizer = optimizer or self.optimizer
        if (
            optimizer
            and self.lr_scheduler is None
            and isinstance(kwargs, dict)
            and 0 < kwargs.get("num_decay_steps", 0) < 1
        ):
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                {**kwargs, "num_decay_steps": math.ceil(num_training_steps * kwargs["num_decay_steps"])},
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, but a run that was cut after its last step takes no further one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """All processes write theirs before the trainer's state says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card says nothing about data or scores; export writes a real one."""


def make_arguments(kind: type, recipe: Recipe, run: RunDir, **own: Any) -> Any:
    """TRL's config class `kind`: the recipe's keys over `own` and our defaults, and what a run decides itself."""
    _log_into(run)
    on_gpu, sharing = torch.cuda.is_available(), recipe.launch.sharing
    saved = recipe.trainer_arguments.get("save_steps", 100)
    arguments: dict[str, Any] = {
        "activation_checkpointing": True,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": "none",
        "ddp_timeout": math.ceil(60 * recipe.launch.step_timeout) + TIMEOUT_MARGIN_SECONDS,
        **own,
        "seed": recipe.data.seed,
        "per_device_eval_batch_size": recipe.trainer.per_device_train_batch_size,
        **({"eval_strategy": "steps", "eval_steps": saved} if recipe.data.validation else {}),
        **recipe.trainer_arguments,
        "output_dir": str(run.checkpoints),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # FiniteSteps looks at every step; the filter would hide one in the log
        "use_cpu": not on_gpu,
        "bf16": computes_in_bfloat16(recipe) and sharing.kind not in ("deepspeed", "fsdp"),
    }
    made = kind(**arguments)
    set_up_deepspeed(made, computes_in_bfloat16(recipe))
    return made


def computes_in_bfloat16(recipe: Recipe) -> bool:
    """Whether operations that stand it run in bfloat16; weights are float32 always."""
    return recipe.model.dtype == "bfloat16" or (recipe.model.dtype == "auto" and torch.cuda.is_available())


def run_training(trainer: Any, recipe: Recipe, run: RunDir) -> None:
    """Train to the end, going on from the last whole checkpoint if there is one."""
    trainer.meter = TokenMeter()
    trainer.steps = FiniteSteps(run, trainer.processing_class)
    trainer.autocasts = recipe.launch.sharing.kind == "fsdp" and computes_in_bfloat16(recipe)
    bar = ProgressBar(recipe.stage, trainer.meter)
    trainer.remove_callback(PrinterCallback)
    watchdog = StepWatchdog(recipe.launch.step_timeout)
    for callback in (MetricsFile(run.metrics, trainer.meter), EarlyWarnings(run), bar, watchdog):
        trainer.add_callback(callback)
    if recipe.adapter is not None:
        trainer.add_callback(AdapterAudit())
    last = last_whole_checkpoint(run.checkpoints)
    watchdog.start()
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        watchdog.stop()
        bar.close()


def _log_into(run: RunDir) -> None:
    """What trainer.report_to writes on this machine lies in the run's directory, unless the user says otherwise."""
    os.environ.update(dict.fromkeys(_LOG_FOLDERS, str(run.logs)))


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end; broken ones are removed.

    The trainer's state is the last file that a checkpoint gets, so a checkpoint whose state can be read is whole.
    """
    found: dict[int, Path] = {}
    for folder in checkpoints.glob("checkpoint-*"):
        state = _state(folder)
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)  # another process may do the same
        else:
            found[int(state["global_step"])] = folder
    return found[max(found)] if found else None


def _state(checkpoint: Path) -> Mapping[str, Any] | None:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None
