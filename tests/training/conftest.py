"""A Hymba that trains in a second, a tokenizer for it, and packed rows with masks."""

import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from hymba_tune.recipe import Recipe

VOCABULARY = 40
ROWS, DOCUMENTS = 24, 3


@pytest.fixture
def model() -> HymbaForCausalLM:
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, v_head_dim=16, sliding_window=6, global_attn_idx=[0, 3], kv_reuse_group=[[1, 2]],
        num_memory_tokens=4, mamba_d_state=4, mamba_dt_rank=3, rope_type=None, pad_token_id=3, initializer_range=0.1,
    )  # fmt: skip
    return HymbaForCausalLM(config)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "[PAD]": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]"
    )


@pytest.fixture
def rows() -> Dataset:
    """Rows of counting documents: the next token follows from the last, so there is something to learn."""
    rng = random.Random(0)
    made = []
    for _ in range(ROWS):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for _ in range(DOCUMENTS):
            start, length = rng.randrange(4, VOCABULARY), rng.randrange(3, 12)
            ids = [4 + (start + i) % (VOCABULARY - 4) for i in range(length)]
            row["input_ids"] += ids
            row["labels"] += [-100, -100, *ids[2:]]
            row["seq_lengths"].append(length)
        made.append(row)
    return Dataset.from_list(made)


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe()


def make_recipe(adapter: dict[str, object] | None = None, method: str = "sft", **trainer: object) -> Recipe:
    """A recipe of 12 steps, two rows each, logged every other step and saved every fourth."""
    return Recipe.model_validate(
        {
            "stage": "test",
            "method": method,
            "model": {"from": "tiny"},
            "data": {"mix": "none", "max_length": 64, "packing": "none" if method == "dpo" else "bfd"},
            "adapter": adapter,
            "trainer": {
                "learning_rate": 1e-2,
                "num_train_epochs": 1,
                "global_batch": 2,
                "activation_checkpointing": False,
                "logging_steps": 2,
                "save_steps": 4,
                **trainer,
            },
        }
    )
