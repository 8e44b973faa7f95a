"""The whole model on a GPU: logits, gradients and generation are those of the CPU's reference in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba_tune.model import HymbaForCausalLM, ops
from tests.model.models import gradients, random_documents, random_model, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Longer than a block of FlexAttention's masks, than a chunk of the scan and than the window; and one of a single token.
LENGTHS = [300, 1, 200, 77]
# Sums in another order, exp2 and division at the GPU's approximate precision.
FLOAT32, BFLOAT16 = 1e-3, 0.15


@pytest.fixture(scope="module")
def reference_model() -> HymbaForCausalLM:
    wide: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 96, "num_attention_heads": 5, "v_head_dim": 32}
    return random_model(tiny_config(**wide, mamba_d_state=16, sliding_window=50, num_memory_tokens=20))


@pytest.fixture(scope="module")
def packed() -> dict[str, Tensor]:
    documents = random_documents(LENGTHS)
    places = torch.cat([torch.arange(len(document)) for document in documents])
    labels = torch.cat(documents).where(places > 0, torch.tensor(-100))
    return {"input_ids": torch.cat(documents)[None], "position_ids": places[None], "labels": labels[None]}


def error(found: Tensor, wanted: Tensor) -> float:
    """Of a tensor as a whole, relative to its size."""
    return float((found.cpu().double() - wanted).norm() / wanted.norm().clamp(min=1e-12))


def on_gpu(model: HymbaForCausalLM) -> Any:
    copied: Any = copy.deepcopy(model)
    return copied.to("cuda", torch.float32)


def loss_and_gradients(model: Any, batch: dict[str, Tensor], device: str, **autocast: Any) -> dict[str, Tensor]:
    with torch.autocast(device, **autocast):
        loss = model(**{name: t.to(device) for name, t in batch.items()}, use_cache=False).loss
    return {"loss": loss.detach().cpu().double(), **gradients(model, loss)}


@pytest.fixture(scope="module")
def truth(reference_model: HymbaForCausalLM, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    with ops.use_backend("reference"):
        return loss_and_gradients(reference_model, packed, "cpu", enabled=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed_again"])
def test_loss_and_every_gradient(reference_model, packed, truth, precision, checkpointing):
    model = on_gpu(reference_model).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bfloat16 = precision == "bfloat16"
    found = loss_and_gradients(model, packed, "cuda", dtype=torch.bfloat16, enabled=bfloat16)
    errors = {name: error(found[name], wanted) for name, wanted in truth.items() if wanted.norm() > 1e-9}
    assert max(errors.values()) < (BFLOAT16 if bfloat16 else FLOAT32), max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_and_every_gradient_of_a_document_on_the_packages(reference_model, packed, precision):
    for package in ("mamba_ssm", "causal_conv1d", "flash_attn"):
        pytest.importorskip(package)
    document, bfloat16 = {name: t[:, : LENGTHS[0]] for name, t in packed.items()}, precision == "bfloat16"
    with ops.use_backend("reference"):
        wanted = loss_and_gradients(reference_model, document, "cpu", enabled=False)
    with ops.use_backend("packages"):
        model = on_gpu(reference_model).train()
        found = loss_and_gradients(model, document, "cuda", dtype=torch.bfloat16, enabled=bfloat16)
    errors = {name: error(found[name], value) for name, value in wanted.items() if value.norm() > 1e-9}
    assert max(errors.values()) < (BFLOAT16 if bfloat16 else FLOAT32), max(errors.items(), key=lambda item: item[1])


def test_a_document_does_not_see_its_neighbours(reference_model, packed):
    """Other tokens in the first document, equal bits in the others."""
    model = on_gpu(reference_model)
    ids, places = packed["input_ids"].cuda(), packed["position_ids"].cuda()
    other = ids.clone()
    other[:, : LENGTHS[0]] = ids[:, : LENGTHS[0]].flip(1)
    with torch.no_grad():
        one, two = (model(input_ids=i, position_ids=places, use_cache=False).logits[0] for i in (ids, other))
    assert torch.equal(one[LENGTHS[0] :], two[LENGTHS[0] :])
    assert not torch.equal(one[: LENGTHS[0]], two[: LENGTHS[0]])


def test_decoding_in_a_cache_is_the_forward(reference_model):
    """Ragged prompts, answers that cross the window: what the cache gives step by step, a forward gives at once."""
    model = on_gpu(reference_model)
    prompts = random_documents([90, 3, 41], seed=5)
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts]).cuda()
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts]).cuda()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=60, min_new_tokens=60, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt.cuda(), out.sequences[row, width:-1]])
        with torch.no_grad():
            alone = model(input_ids=whole[None], use_cache=False).logits[0, len(prompt) - 1 :]
        stepwise = torch.stack([step[row] for step in out.logits])
        assert error(stepwise, alone.cpu().double()) < FLOAT32
