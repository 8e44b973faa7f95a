"""What a training run tells while it goes on: metrics.jsonl, the progress bar, and what must stop it.

Everything here hangs on TRL's trainers as transformers callbacks and serves every method.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_tune.model.adapter import GradientAudit
from hymba_tune.run_dir import RunDir
from hymba_tune.training.distributed import processes, summed


class TokenMeter:
    """Counts the tokens that go through a trainer, over all its processes; a resumed run counts on."""

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised = 0
        self.seconds = 0.0
        self._own = [0, 0]

    def count(self, labels: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """labels (B, L), -100 where nothing is learned; attention_mask (B, L) where there is padding."""
        self._own[0] += int(labels.numel() if attention_mask is None else attention_mask.sum())
        self._own[1] += int((labels != -100).sum())

    def add_up(self, device: torch.device) -> None:
        """Take what every process has counted since the last time into the totals. All processes call it together."""
        tokens, supervised = summed(*self._own, device=device)
        self.tokens += tokens
        self.supervised += supervised
        self._own = [0, 0]

    @property
    def about(self) -> int:
        """The tokens with those not added up yet, as if every process had met as many as this one."""
        return self.tokens + self._own[0] * processes()


class MetricsFile(TrainerCallback):
    """Appends one line a logging step to metrics.jsonl.

    A resumed run first cuts the file back to its checkpoint, so that there are no gaps and no doubles. For that every
    step that is saved or evaluated is logged: the trainer's running sums are empty when a checkpoint is written.
    """

    def __init__(self, path: Path, meter: TokenMeter) -> None:
        self.path = path
        self.meter = meter
        self._mark: tuple[float, int, int] | None = None
        self._sources: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        lines = read_metrics(self.path, up_to_step=state.global_step)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        trained = [line for line in lines if "loss" in line]
        if trained:
            self.meter.tokens, self.meter.supervised = trained[-1]["tokens"], trained[-1]["supervised_tokens"]
            self.meter.seconds = trained[-1]["seconds"]
        self._start_clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps or control.should_save or control.should_evaluate:
            control.should_log = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if control.should_save or control.should_evaluate:
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs:
            return
        if "loss" in logs:
            self.meter.add_up(args.device)
        if not state.is_world_process_zero:
            return
        if "loss" not in logs:
            self._add_validation(state, logs)
            return
        assert self._mark is not None
        now, (then, tokens, supervised) = time.monotonic(), self._mark
        self.meter.seconds += now - then
        self._start_clock()
        line = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": round(state.epoch or 0.0, 6),
            **{key: logs[key] for key in logs if key not in ("epoch", "step", "num_tokens", "total_flos")},
            "tokens": self.meter.tokens,
            "supervised_tokens": self.meter.supervised,
            "supervised_share": round((self.meter.supervised - supervised) / max(self.meter.tokens - tokens, 1), 6),
            "tokens_per_second": round((self.meter.tokens - tokens) / max(now - then, 1e-9), 1),
            "seconds": round(self.meter.seconds, 3),
            "memory_gib": peak_memory_gib(),
        }
        self._append(line)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start_clock()

    def _add_validation(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Collect the sources' losses of an evaluation; its last log, the loss over all, ends it with one line."""
        found = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        losses = {key.removesuffix("_loss"): value for key, value in found.items() if key.endswith("_loss")}
        self._sources |= losses
        if "loss" not in found:
            return
        epoch = round(state.epoch or 0.0, 6)
        self._append({"step": state.global_step, "epoch": epoch, "eval_loss": found["loss"], "sources": self._sources})
        self._sources = {}
        self._start_clock()

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _start_clock(self) -> None:
        self._mark = (time.monotonic(), self.meter.tokens, self.meter.supervised)


def peak_memory_gib() -> float:
    """The most that this process has held: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def read_metrics(path: Path, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, in order; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if up_to_step is None or line["step"] <= up_to_step:
            lines.append(line)
    return lines


class ProgressBar(TrainerCallback):
    """A rich bar: steps, loss, rate, time left."""

    def __init__(self, title: str, meter: TokenMeter) -> None:
        self.title = title
        self.meter = meter
        self.bar: Progress | None = None
        self._began = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[held]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, loss="", rate="", held="")
        self.bar.start()
        self._began = (time.monotonic(), self.meter.about)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is None:
            return
        began, tokens = self._began
        rate = (self.meter.about - tokens) / max(time.monotonic() - began, 1e-9)
        self.bar.update(self.bar.task_ids[0], completed=state.global_step, rate=f"{rate:,.0f} tokens/s")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            norm = f" norm {logs['grad_norm']:.2f}" if "grad_norm" in logs else ""
            share = self.meter.supervised / max(self.meter.tokens, 1)
            held = f"{share:.0%} supervised, {peak_memory_gib():.1f} GiB"
            self.bar.update(self.bar.task_ids[0], loss=f"loss {logs['loss']:.4f}{norm}", held=held)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also called when training ends by an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class AdapterAudit(TrainerCallback):
    """After the first step of this process: every adapter received a gradient, or the run is refused."""

    def __init__(self) -> None:
        self.audit: GradientAudit | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.audit = GradientAudit(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.audit is not None:
            self.audit.finish()
            self.audit = None


class EarlyWarnings(TrainerCallback):
    """Says once what makes a training pointless: a loss of exactly 0, or a learning rate of 0 after the warm-up."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero or self.run.warned("training"):
            return
        if logs["loss"] == 0:
            self.run.warn("training", f"the loss is 0 at step {state.global_step}: has any token a label?")
        rate, warmup = logs.get("learning_rate"), args.get_warmup_steps(state.max_steps)
        if rate == 0 and state.global_step > warmup + 1:
            self.run.warn("training", f"the learning rate is 0 at step {state.global_step}: nothing is learned")
