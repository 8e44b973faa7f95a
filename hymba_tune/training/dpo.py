"""Direct preference optimisation with TRL's DPOTrainer, on pairs that are tokenised already.

The reference is the model as it is handed in: the policy before its first step, in all three cases.

- full weights, and by default adapters too: its log-probabilities of every pair are computed once before training
  (precompute_ref_log_probs) and kept next to the rows, part by part, so that no second model is held and a resumed run
  reads them;
- precompute_ref_log_probs: false with a fresh adapter: the same model with the adapter switched off, at every step;
- with an adapter that was trained before: a frozen copy of that adapter; with full weights: a frozen copy of the model.

Rows are padded on the right by TRL's collator; the model drops the padding before it computes anything.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from hymba_tune.errors import UserError
from hymba_tune.recipe import Recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.training.trainer import MeteredTrainer, make_arguments, run_training

# TRL's name for the frozen copy of an adapter.
REFERENCE_ADAPTER = "ref"

REFERENCE_PART = 2048
"""Pairs whose reference log-probabilities are written at once: what a kill can cost."""


class HymbaDPOTrainer(MeteredTrainer, DPOTrainer):
    """TRL's trainer, metered, on prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's own, part by part: it keeps what it computed beside the rows, by fingerprint, so a cut run goes on."""
        size, parts = max(REFERENCE_PART // batch_size, 1) * batch_size, []
        for start in range(0, len(dataset), size):
            part = dataset.select(range(start, min(start + size, len(dataset))))
            parts.append(super()._precompute_ref_logps(part, name, batch_size))
        return concatenate_datasets(parts)

    def count_tokens(self, inputs: dict[str, Any]) -> None:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        self.meter.count(labels, inputs["attention_mask"])


def train_dpo(
    recipe: Recipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    validation: Dataset | dict[str, Dataset] | None,
    run: RunDir,
) -> Any:
    """Train `model` (full weights or with an adapter) on preference pairs and return it.

    Args:
        rows: prompt_ids, chosen_ids and rejected_ids of each pair; see data/pairs.py.
        run: where to write; a cut run goes on from the last whole checkpoint there.

    Raises:
        UserError: the settings contradict each other, an adapter gets no gradient, or the loss is no number.
    """
    model.eval()  # no dropout in the reference's log-probabilities
    try:
        arguments = make_arguments(
            DPOConfig,
            recipe,
            run,
            precompute_ref_log_probs=True,
            max_length=None,  # data/pairs.py has dropped or cut what is too long
        )
        trainer = HymbaDPOTrainer(
            model=model,
            ref_model=_reference_model(model, arguments),
            args=arguments,
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    if arguments.precompute_ref_log_probs or _is_fresh(model):
        _forget_reference_adapter(model)
    run_training(trainer, recipe, run)
    _forget_reference_adapter(model)
    return trainer.model


def _reference_model(model: Any, arguments: DPOConfig) -> Any:
    """A frozen copy, where neither precomputed log-probabilities nor an adapter make it unnecessary."""
    if arguments.precompute_ref_log_probs or hasattr(model, "peft_config"):
        return None
    return copy.deepcopy(model).requires_grad_(False)


def _is_fresh(model: nn.Module) -> bool:
    """Whether a model's adapter changes nothing yet: every LoRA B is zero."""
    return not any(bool(torch.any(value)) for name, value in model.named_parameters() if "lora_B" in name)


def _forget_reference_adapter(model: Any) -> None:
    """Without its frozen copy TRL takes the adapter switched off as the reference; and it is not to be saved."""
    if REFERENCE_ADAPTER in getattr(model, "peft_config", {}):
        model.delete_adapter(REFERENCE_ADAPTER)
