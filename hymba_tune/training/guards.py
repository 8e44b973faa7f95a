"""What stops a run before it does harm: a loss or a gradient that is no number, and a disk without room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase

from hymba_tune.errors import UserError
from hymba_tune.run_dir import RunDir, require_space

# Adam keeps two moments of every trained parameter, in float32.
_MOMENT_BYTES = 2 * 4


class FiniteSteps:
    """Looks at every step's losses and gradient norm before the optimizer takes it.

    All processes stop together: each says whether its own numbers are finite, and each keeps its own bad batches.
    """

    def __init__(self, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self._batches: list[tuple[dict[str, Any], torch.Tensor]] = []

    def saw(self, batch: dict[str, Any], loss: torch.Tensor) -> None:
        """Remember a micro-batch of the step that is being computed, and its loss."""
        self._batches.append((batch, loss.detach()))

    def check(self, trainer: Any, norm: Any) -> None:
        """Raise UserError if a loss or the gradient norm of the step is no number; the bad batch is kept then."""
        batches, self._batches = self._batches, []
        losses = [float(loss) for _, loss in batches]
        norm = None if norm is None else float(norm)
        bad = not all(map(math.isfinite, losses)) or (norm is not None and not math.isfinite(norm))
        if not _any_process(trainer, bad):
            return
        step = trainer.state.global_step + 1
        if bad:
            wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
            rows = [row for i in wrong for row in self._readable(batches[i][0])]
            record = {"step": step, "losses": [str(loss) for loss in losses], "grad_norm": str(norm), "rows": rows}
            self.run.write_json(self.run.bad_batch(trainer.args.process_index), record)
        what = f"the loss is {next((x for x in losses if not math.isfinite(x)), losses[-1] if losses else None)}"
        raise UserError(
            f"training: {what}, the gradient norm {norm} at step {step}; the last good checkpoint is kept in "
            f"{self.run.checkpoints}, the batch in {self.run.bad_batch(trainer.args.process_index)}: look at its text, "
            "or lower trainer.learning_rate"
        )

    def _readable(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Each document of a batch: token ids, labels (None where nothing is learned) and text."""
        ids = batch["input_ids"]
        labels = batch["labels"] if "labels" in batch else ids.masked_fill(batch["completion_mask"] == 0, -100)
        found = []
        for row in range(len(ids)):
            tokens, targets = ids[row].tolist(), labels[row].tolist()
            for start, end in _documents(batch, row, len(tokens)):
                found.append(
                    {
                        "input_ids": tokens[start:end],
                        "labels": [None if label == -100 else label for label in targets[start:end]],
                        "text": self.tokenizer.decode(tokens[start:end]),
                    }
                )
        return found


def require_checkpoint_space(trainer: Any, checkpoints: Path) -> None:
    """Raise UserError, in all processes, if the next checkpoint does not fit the disk; the last one is intact."""
    problem: list[str | None] = [None]
    if trainer.is_world_process_zero():
        try:
            require_space(checkpoints, checkpoint_bytes(trainer.model), "the next checkpoint")
        except UserError as error:
            problem = [str(error)]
    if trainer.args.world_size > 1:
        broadcast_object_list(problem, from_process=0)
    if problem[0] is not None:
        raise UserError(problem[0])


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint: the weights that are saved (only the adapter's where there is one), and Adam's moments."""
    trained = [value for value in model.parameters() if value.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    weights = sum(value.numel() * value.element_size() for value in saved)
    return weights + sum(value.numel() for value in trained) * _MOMENT_BYTES


def _documents(batch: dict[str, Any], row: int, length: int) -> Sequence[tuple[int, int]]:
    """(start, end) of a row's documents: where positions start again, and without the padding."""
    if batch.get("attention_mask") is not None:
        return [(0, int(batch["attention_mask"][row].sum()))]
    if batch.get("position_ids") is None:
        return [(0, length)]
    starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
    return list(zip(starts, [*starts[1:], length], strict=True))


def _any_process(trainer: Any, bad: bool) -> bool:
    if trainer.args.world_size == 1:
        return bad
    flags = trainer.accelerator.gather(torch.tensor([bad], device=trainer.accelerator.device))
    return bool(flags.any())
