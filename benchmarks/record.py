"""Where figures go: benchmarks/results/NAME.json, with the hardware and versions they were measured on."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
SLOWEST = 30
PACKAGES = ("torch", "transformers", "trl", "peft", "numpy")


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write `figures` beside the machine's description, print them, and return the path."""
    record = {"benchmark": name, "machine": machine(), "figures": rounded(figures)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["figures"], indent=1))
    return path


def require_gpu() -> None:
    """End the process with a message where there is no NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU; torch sees none")


def gpu_seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median seconds of `work` on the GPU, after two calls that compile and warm up.

    Calls follow one another without waiting, as they do in training: what the CPU does meanwhile counts where the GPU
    would have to wait for it.
    """
    for _ in range(2):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def kernel_milliseconds(work: Callable[[], Any], parts: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """GPU time of one call by part, a part being the first whose names fit a kernel's; prints the slowest kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    spent = dict.fromkeys((*parts, "rest"), 0.0)
    kernels = []
    for event in recorded.key_averages():
        milliseconds = event.self_device_time_total / 1e3
        if milliseconds:
            fitting = (part for part, names in parts.items() if any(name in event.key for name in names))
            spent[next(fitting, "rest")] += milliseconds
            kernels.append((milliseconds, event.count, event.key))
    for milliseconds, count, name in sorted(kernels, reverse=True)[:SLOWEST]:
        print(f"{milliseconds:8.3f} ms  {count:5} x {name[:100]}")
    return spent


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def rounded(value: Any) -> Any:
    """Four significant digits everywhere: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()
