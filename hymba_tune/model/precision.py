"""float32 matrix products on the CPU: the faster of torch's settings that is still float32.

`medium` lets oneDNN take float32 products over from MKL, about twice as fast on some CPUs at the same error. On a CPU
with AMX it may truly round to bfloat16, so a probe measures the error first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# oneDNN keeps a compiled kernel a shape, 1,024 by default; packed rows have ever new lengths, which made gigabytes.
_KERNELS_KEPT = "128"
# Products of 512 standard normals, summed in float32, are off by about 1e-6 of their size; in bfloat16 by 3e-3.
_FLOAT32_ERROR = 2e-5


def choose_matmul_precision() -> str:
    """Set and return torch's float32 matmul precision for this process: `medium` if the probe passes, else `highest`.

    GPUs keep `highest`: there `medium` always rounds.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest")
        return "highest"
    torch.set_float32_matmul_precision("medium")
    if _product_error() > _FLOAT32_ERROR:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products by MKL inside the block: `medium` makes the small batched ones of decoding slow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product_error() -> float:
    """Largest error of a (256, 512) x (512, 256) float32 product, forward and transposed, over the result's size."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 512, generator=generator)
    b = torch.randn(512, 256, generator=generator)
    errors = []
    for x, y in ((a, b), (b.T.contiguous(), a.T.contiguous())):
        exact = x.double() @ y.double()
        errors.append(float(((x @ y).double() - exact).abs().max() / exact.abs().max()))
    return max(errors)
