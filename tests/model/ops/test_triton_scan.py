"""The Triton scan: in Triton's interpreter it is the reference, and its kernels compile for GPUs that are not here.

The interpreter is chosen when Triton is imported, so these tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: the dev extra brings it")

IN_THE_INTERPRETER = """
import math, torch
from hymba_tune.model.ops import gpu, triton_scan, use_backend, selective_scan
from tests.model.ops.cases import offsets
from tests.model.ops import test_selective_scan as scans

torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
torch.manual_seed(0)
# Chunks and tiles as short as can be, so that few tokens cross many of them; {more}
triton_scan.TILE, triton_scan.CHUNKS, triton_scan.BLOCK = 4, 8, 4
assert triton_scan.chunk_length(21) == 4
op = triton_scan.selective_scan
for lengths in {lengths}:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for initial in {{None, 1, len(lengths)}}:
            scans.check(op, lengths, scans.random_inputs(sum(lengths), 3, 5, dtype, initial))
inputs = scans.random_inputs(6, 2, 3)
inputs["dt"][1] = math.nan
y, final = op(**inputs, cu_seqlens=offsets([2, 4]))
assert y[1].isnan().all() and y[2:].isfinite().all() and final[1].isfinite().all()
with use_backend("triton"):
    again, _ = selective_scan(**inputs, cu_seqlens=offsets([2, 4]))
assert torch.equal(again[2:], y[2:])
print("all equal")
"""

COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hymba_tune.model.ops import triton_scan, triton_scan_kernels as kernels

def signature(kernel, wide, constants):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("marks",):
            types[name] = "*i32"
        elif name == "cu_seqlens":
            types[name] = "*i64"
        elif name in ("x", "B", "C", "gate", "y", "dy", "dx", "dgate"):
            types[name] = "*bf16"
        elif name in ("tokens", "chunks", "channels", "states") or name.endswith("_row"):
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types

shapes = {"CHUNK": 256, "BLOCK": triton_scan.BLOCK, "N": 16, "TERMS": 8, "TILE": triton_scan.TILE}
flags = {"GIVEN": True, "ENTERED": True, "KEEP": True}
for name, extra in (("chunk_ends", {}), ("carry", {"REVERSE": False}), ("outputs", {}), ("chunk_gradients", {}),
                    ("gradients", {})):
    kernel = getattr(kernels, name)
    constants = {key: value for key, value in {**shapes, **flags, **extra}.items() if key in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature(kernel, "fp32", constants), constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_scan.WARPS})
    assert built.asm["cubin"], name
    print(name, len(built.asm["cubin"]), flush=True)
"""


def run(code: str, interpret: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_outputs_states_and_gradients_are_the_reference_s() -> None:
    code = IN_THE_INTERPRETER.format(lengths="([5, 0, 1], [9, 4])", more="a full run has more")
    assert "all equal" in run(code, interpret=True)


@pytest.mark.full
def test_long_and_awkward_documents_too() -> None:
    code = IN_THE_INTERPRETER.format(
        lengths="([1], [63], [1] * 4, [40, 25], [3, 0, 1, 30, 17, 0], [0, 0])", more="these are they"
    )
    assert "all equal" in run(code, interpret=True)


@pytest.mark.full
def test_every_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    """To machine code of compute capability 9.0, bf16 in and out: what a type or a shape would break is found here."""
    assert len(run(COMPILED, interpret=False).splitlines()) == 5
