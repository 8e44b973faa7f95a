"""Triton kernels compiled for a GPU that is not here: what a type or a shape would break, and registers, are found out.

Import it in a process of its own, without Triton's interpreter: from then on a launch only compiles its kernel, to
machine code of compute capability 9.0, and prints `NAME: N registers, S bytes spilled`.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
PTXAS = Path(nvidia.__file__).parent / "bin" / "ptxas"


def compile_only(
    kernel: Any, *given: Any, grid: Any, warmup: bool, num_warps: int = 4, num_stages: int = 3, **named: Any
) -> None:
    arguments = dict(zip((parameter.name for parameter in kernel.params), given, strict=False)) | named
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        constant = parameter.is_constexpr or value is None
        types[parameter.name] = "constexpr" if constant else _type(value)
        if constant:
            constants[(i,)] = value
        elif torch.is_tensor(value) or (isinstance(value, int) and value % 16 == 0):  # as a launch tells the compiler
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": named.get("maxnreg")}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spilled = resources(built.asm["ptx"])
    print(f"{kernel.fn.__name__}: {registers} registers, {spilled} bytes spilled", flush=True)


def _type(value: Any) -> str:
    return TYPES[value.dtype] if torch.is_tensor(value) else "fp32" if isinstance(value, float) else "i32"


def resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled (stores and loads), as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", said)
    return int(registers[-1]), sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


JITFunction.run = compile_only
