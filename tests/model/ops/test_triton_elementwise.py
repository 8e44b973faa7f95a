"""Triton's norms, RoPE and SwiGLU: in Triton's interpreter they are the model's formulas; they compile for absent GPUs.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own.
"""

from __future__ import annotations

import pytest
import torch

from tests.model.ops.elementwise_cases import check_all
from tests.model.ops.test_triton_scan import GPU, run

pytest.importorskip("triton", reason="triton is not installed: the dev extra brings it")

IN_THE_INTERPRETER = """
import torch
from hymba_tune.model import ops
from hymba_tune.model.norm import RMSNorm
from hymba_tune.model.ops import triton_elementwise
from tests.model.ops.elementwise_cases import check_all

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
torch.manual_seed(0)
# Few programs, so that each has several groups of rows; narrow rows in groups, wide ones alone.
triton_elementwise.PROGRAMS, triton_elementwise.ELEMENTS = 2, 32
for tokens, size in ((0, 5), (1, 20), (7, 16), (5, 100)):
    check_all(triton_elementwise, tokens, size)
norm, x = RMSNorm(20, 1e-6), torch.randn(2, 3, 20)
with ops.use_backend("triton"):
    y = norm(x)
assert torch.equal(y, triton_elementwise.rms_norm(x, norm.weight, 1e-6)) and y.shape == x.shape
torch.testing.assert_close(y, norm(x))
print("all equal")
"""


def test_values_and_gradients_are_the_model_s_formulas() -> None:
    assert "all equal" in run(IN_THE_INTERPRETER, interpret=True)


THE_MODEL = """
import torch
from hymba_tune.model import ops
from hymba_tune.model.ops import triton_elementwise
from tests.model.models import EXACT, gradients, random_ids, random_model, tiny_config

model, ids = random_model(tiny_config()).train(), random_ids(1, 9)
expected = model(ids, labels=ids).loss
wanted = gradients(model, expected)
calls = []
for name in ("rms_norm", "mean_of_norms", "rotate", "swiglu"):
    def counted(*args, op=getattr(triton_elementwise, name), name=name):
        calls.append(name)
        return op(*args)
    setattr(triton_elementwise, name, counted)
ops.keep_backends({"elementwise": "triton"}, "cpu")
model.gradient_checkpointing_enable({"use_reentrant": False})
loss = model(ids, labels=ids).loss
torch.testing.assert_close(loss, expected, **EXACT)
torch.testing.assert_close(gradients(model, loss), wanted, **EXACT)
model.gradient_checkpointing_disable()
model.float()
with torch.autocast("cpu", torch.bfloat16):
    narrow = model(ids, labels=ids)
torch.testing.assert_close(narrow.loss, expected.float(), rtol=0.02, atol=0)
gradients(model, narrow.loss)
print(sorted(set(calls)))
"""


def test_the_model_trains_with_them_also_under_checkpointing_and_autocast() -> None:
    assert run(THE_MODEL, interpret=True) == "['mean_of_norms', 'rms_norm', 'rotate', 'swiglu']\n"


COMPILED = """
import torch
from tests.model.ops import absent_gpu
from hymba_tune.model.ops import triton_elementwise as kernels

def leaf(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)

tokens = 300
cases = [(kernels.rms_norm, (leaf(tokens, size), leaf(size, dtype=torch.float32), 1e-6)) for size in (16, 100, 1600)]
cases.append((kernels.rms_norm, (leaf(tokens, 1600, dtype=torch.float32), leaf(1600, dtype=torch.float32), 1e-6)))
of_branch = (leaf(tokens, 3200), leaf(3200, dtype=torch.float32))
cases.append((kernels.mean_of_norms, (*of_branch, *of_branch, 1e-6)))
table = torch.zeros(tokens, 1, 64)
cases.append((kernels.rotate, (leaf(tokens, 25, 64), table, table)))
cases.append((kernels.swiglu, (leaf(tokens, 5504), leaf(tokens, 5504))))
for op, inputs in cases:
    y = op(*inputs)
    y.backward(torch.zeros_like(y))
"""
KERNELS = {"norm", "norm_gradient", "mean_of_norms", "mean_of_norms_gradient", "rotate", "swiglu", "swiglu_gradient"}


@pytest.mark.full
def test_every_kernel_compiles_for_a_gpu_that_is_not_here_and_spills_nothing() -> None:
    """At the sizes of Hymba-1.5B, to machine code of compute capability 9.0."""
    said = run(COMPILED, interpret=False).splitlines()
    assert {line.partition(":")[0] for line in said} == KERNELS
    assert all(line.endswith(", 0 bytes spilled") for line in said), said


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("size", [16, 100, 1600, 3200])
@pytest.mark.parametrize("tokens", [0, 1, 1001])
def test_on_a_gpu_they_are_the_model_s_formulas(tokens: int, size: int) -> None:
    from hymba_tune.model.ops import triton_elementwise

    torch.manual_seed(0)
    check_all(triton_elementwise, tokens, size, "cuda")
