"""Two independent pieces of a forward pass at a time in a CUDA graph: one alone is too small to fill the GPU.

A graph keeps the order that streams and events gave it while it was captured. Elsewhere everything stays in one stream:
Python launches small kernels too slowly for a second one to help.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def beside(like: Tensor) -> Iterator[Callable[[], None]]:
    """What is launched in the block may run beside what follows it, until the function that the block is given.

        with beside(x) as join:
            first = ..
        second = ..
        join()

    Memory is safe where the inputs live until `join` and the next block waits for what used this one's results: a
    stream's memory is used again by the same stream only, and a block starts after everything before it.

    Args:
        like: tells the device.
    """
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield lambda: None
        return
    first, second = torch.cuda.current_stream(), second_stream(like.device)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        yield lambda: first.wait_stream(second)


@functools.cache
def second_stream(device: torch.device) -> Any:
    """Of high priority: its kernels are small and wait for each other, while those beside them fill the GPU."""
    return torch.cuda.Stream(device, priority=-1)
