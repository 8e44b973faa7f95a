"""What the tests of every operation share: awkward segments, tolerances, one call's outputs and gradients."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from hymba_tune.model.ops import cpu_library, meta_first, reference

SEGMENTS = {
    "one token": [1],
    "63 tokens": [63],
    "500 tokens": [500],
    "single tokens": [1] * 9,
    "ragged": [3, 0, 1, 70, 17, 0],
    "nothing": [0, 0],
}

# float64 kernels do the same sums in another order. float32: sums of up to 500 x 37 terms, each rounded at 6e-8.
# bfloat16 results are float32 results rounded once to 8 bits: backends on two sides of a tie are 2^-7 apart.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7}
DTYPES = list(TOLERANCE)

needs_compiler = pytest.mark.skipif(cpu_library.find_compiler() is None, reason="no C compiler on this machine")


def offsets(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens (S+1,) of segments."""
    return torch.tensor([0, *lengths]).cumsum(0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What states and sums are held in."""
    return torch.promote_types(dtype, torch.float32)


def results(
    op: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor | None], cu_seqlens: Tensor, upstream: list[Tensor]
) -> dict[str, Tensor]:
    """Outputs of op(**inputs), and under `d NAME` the gradient of every input for the outputs' gradients `upstream`."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = op(**leaves, cu_seqlens=cu_seqlens)
    connected = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in connected], [grad for _, grad in connected])
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    return found


def results_with_meta(
    op: Callable[..., tuple[Tensor, ...]],
    name: str,
    num_meta: int,
    cu_seqlens: Tensor,
    inputs: dict[str, Tensor | None],
    upstream: list[Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an op and two calls of the reference's op `name` make of num_meta meta tokens before the documents."""
    inputs = {key: t for key, t in inputs.items() if key != "initial_state"}
    truth = partial(getattr(meta_first, name), getattr(reference, name), meta=num_meta)
    found = results(partial(op, num_meta=num_meta), inputs, cu_seqlens, upstream)
    return found, results(truth, inputs, cu_seqlens, upstream)


def assert_same_results(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal within the tolerance of each tensor's own dtype, relative to its largest element; no gradient is zeros."""
    for name in found.keys() | expected.keys():
        wanted = expected[name] if name in expected else torch.zeros_like(found[name])
        assert found[name].dtype == wanted.dtype, name
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        error = float((found[name] - wanted).abs().max()) if wanted.numel() else 0.0
        assert error <= TOLERANCE[wanted.dtype] * scale, f"{name}: off by {error:.2e} at a scale of {scale:.2e}"
