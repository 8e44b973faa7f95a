"""`python -m tests.golden.make`: what the reference backend computes for one tiny random model, written to hymba.safetensors.

A change of these numbers is a change of the model: make them anew only when one is meant.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hymba_tune.model import HymbaCache, HymbaForCausalLM, ops
from tests.model.models import gradients, random_documents, random_ids, random_model, tiny_config

FILE = Path(__file__).with_name("hymba.safetensors")
CONFIGURATION = "odd_heads_ntk"
LENGTHS = [1, 9, 4, 13]


def packed_row() -> dict[str, Tensor]:
    """Documents of four lengths in one row: input_ids and position_ids (1, 27), labels without their first tokens."""
    documents = random_documents(LENGTHS)
    labels = torch.cat([document.clone().index_fill(0, torch.tensor(0), -100) for document in documents])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return {"input_ids": torch.cat(documents)[None], "position_ids": positions[None], "labels": labels[None]}


def padded_batch() -> dict[str, Tensor]:
    """Prompts of 3 and 11 tokens, padded on the left: input_ids and attention_mask (2, 11)."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :8] = 0
    return {"input_ids": random_ids(2, 11, seed=1), "attention_mask": mask}


def computed(model: HymbaForCausalLM) -> dict[str, Tensor]:
    """Logits, loss and gradients of the packed row; logits, cache and next steps of the padded batch."""
    packed = model(**packed_row())
    arrays = {"packed.logits": packed.logits.detach(), "packed.loss": packed.loss.detach()[None]}
    arrays |= {f"packed.gradient.{name}": value for name, value in gradients(model, packed.loss).items()}

    cache, batch = HymbaCache(model.config, max_length=20), padded_batch()
    with torch.no_grad():
        arrays["prompt.logits"] = model(**batch, past_key_values=cache).logits
        for layer, held in enumerate(cache.layers):
            arrays |= {f"cache.{layer}.{name}": value.clone() for name, value in held.tensors().items()}
        batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1)
        continued = model(random_ids(2, 5, seed=2), batch["attention_mask"], past_key_values=cache)
    return {**arrays, "continued.logits": continued.logits}


def main() -> None:
    model = random_model(tiny_config(CONFIGURATION), dtype=torch.float32)
    with ops.use_backend("reference"):
        arrays = computed(model)
    weights = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    save_file({name: value.contiguous() for name, value in (weights | arrays).items()}, FILE)
    print(f"{FILE}: {len(weights)} weights, {len(arrays)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
