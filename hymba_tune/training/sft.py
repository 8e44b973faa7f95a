"""Supervised fine-tuning and pretraining with TRL's SFTTrainer, on rows that are packed and masked already.

The two differ in their data alone: what a document is and where its labels are (data/packing.py), and how long the
decay of the learning rate is, which is the recipe's.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from hymba_tune.errors import UserError
from hymba_tune.recipe import Recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.training.trainer import MeteredTrainer, make_arguments, run_training


class HymbaSFTTrainer(MeteredTrainer, SFTTrainer):
    """TRL's trainer, metered."""


def train_sft(
    recipe: Recipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    validation: Dataset | dict[str, Dataset] | None,
    run: RunDir,
) -> Any:
    """Train `model` (full weights or with an adapter) on `rows` and return it.

    Args:
        rows: input_ids, labels (-100 where nothing is learned) and seq_lengths of each packed row; see data/packing.py.
        run: where to write; a cut run goes on from the last whole checkpoint there.

    Raises:
        UserError: the settings contradict each other, an adapter gets no gradient, or the loss is no number.
    """
    try:
        arguments = make_arguments(
            SFTConfig,
            recipe,
            run,
            # Rows are made: TRL only collates them, flat and without padding, with every document's boundaries.
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=True,
            packing_strategy="bfd",
            max_length=recipe.data.max_length,
        )
        trainer = HymbaSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=validation,
            processing_class=tokenizer,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    run_training(trainer, recipe, run)
    return trainer.model
