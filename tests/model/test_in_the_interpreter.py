"""The whole model on the GPU's kernels, in Triton's interpreter: loss, gradients and last logits are plain torch's.

The interpreter is chosen when Triton is imported, so the test runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: the dev extra brings it")

CODE = """
import torch
from hymba_tune.model import ops
from hymba_tune.model.ops import triton_attention, triton_conv, triton_scan
from tests.model.models import EXACT, gradients, random_documents, random_model, tiny_config

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
# Blocks, runs and chunks that few tokens cross.
triton_attention.WIDE_SHAPE, triton_attention.PARTS = triton_attention.Shape(16, 16, 4, 1), 2
triton_conv.RUN, triton_conv.GROUP, triton_conv.GRADIENT_GROUP = 8, 4, 4
triton_scan.SHORTEST_CHUNK, triton_scan.CHUNKS = 8, 4
documents = random_documents([13, 1, 26])
ids, places = torch.cat(documents)[None], torch.cat([torch.arange(len(d)) for d in documents])[None]
model = random_model(tiny_config(NAME)).train()
if CHECKPOINTING:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

def loss_and_gradients(backend):
    with ops.use_backend(backend):
        loss = model(input_ids=ids, position_ids=places, labels=ids, use_cache=False).loss
        return {"loss": loss.detach(), **gradients(model, loss)}

found, expected = loss_and_gradients("triton"), loss_and_gradients("reference")
for name, gradient in expected.items():
    torch.testing.assert_close(found[name], gradient, msg=lambda said, name=name: f"{name}: {said}", **EXACT)

@torch.no_grad()
def last_logits(backend):
    with ops.use_backend(backend):
        return model.eval()(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=2).logits

torch.testing.assert_close(last_logits("triton"), last_logits("reference"), **EXACT)
print("all equal")
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("odd_heads_ntk", False), ("odd_heads_ntk", True), ("no_meta_tokens", False)],
    ids=["meta tokens", "computed again", "no meta tokens"],
)
def test_loss_and_every_gradient_of_packed_documents(name: str, checkpointing: bool) -> None:
    code = CODE.replace("NAME", repr(name)).replace("CHECKPOINTING", str(checkpointing))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "all equal" in process.stdout
