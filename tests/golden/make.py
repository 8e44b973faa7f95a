"""Golden arrays: what the reference backend computes for one tiny random model.

`python -m tests.golden.make` remakes them. A change of these numbers is a change of the model: only where one is meant.
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


def inputs() -> dict[str, Tensor]:
    """Documents of four lengths packed in a row, whose first tokens are not scored; two left-padded prompts; a turn."""
    documents = random_documents(LENGTHS)
    labels = [document.clone().index_fill(0, torch.tensor(0), -100) for document in documents]
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :8] = 0
    return {
        "packed.input_ids": torch.cat(documents)[None],
        "packed.position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "packed.labels": torch.cat(labels)[None],
        "prompt.input_ids": random_ids(2, 11, seed=1),
        "prompt.attention_mask": mask,
        "turn.input_ids": random_ids(2, 5, seed=2),
    }


def computed(model: HymbaForCausalLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, loss and gradients of the packed row; logits of the prompts and the turn, and the cache between them."""
    packed = model(**{name: inputs[f"packed.{name}"] for name in ("input_ids", "position_ids", "labels")})
    arrays = {"packed.logits": packed.logits.detach(), "packed.loss": packed.loss.detach()[None]}
    arrays |= {f"packed.gradient.{name}": value for name, value in gradients(model, packed.loss).items()}

    cache, mask = HymbaCache(model.config, max_length=16), inputs["prompt.attention_mask"]
    with torch.no_grad():
        arrays["prompt.logits"] = model(inputs["prompt.input_ids"], mask, past_key_values=cache).logits
        for layer, held in enumerate(cache.layers):
            arrays |= {f"cache.{layer}.{name}": value.clone() for name, value in held.tensors().items()}
        mask = torch.nn.functional.pad(mask, (0, 5), value=1)
        arrays["turn.logits"] = model(inputs["turn.input_ids"], mask, past_key_values=cache).logits
    return arrays


def main() -> None:
    model, given = random_model(tiny_config(CONFIGURATION), dtype=torch.float32), inputs()
    with ops.use_backend("reference"):
        arrays = computed(model, given)
    weights = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    save_file({name: value.contiguous() for name, value in (weights | given | arrays).items()}, FILE)
    print(f"{FILE.name}: {len(weights)} weights, {len(arrays)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
