"""Compiles cpu_kernels/ with the system's C compiler at first use, keeps the library in the user's cache, loads it.

The cache key covers the sources, the compiler, its flags and the CPU, so that a home directory shared by different
machines holds one library for each. A library appears by an atomic rename: processes that compile at once are harmless.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpu_kernels"
COMPILERS = ("cc", "gcc", "clang")
CACHE_VARIABLE = "HYMBA_TUNE_CACHE"

# Vectors and their elements share memory in the kernels, hence no strict aliasing. Tried in turn: OpenMP may lack.
_COMMON = ("-std=gnu11", "-O3", "-march=native", "-fno-strict-aliasing", "-fPIC", "-shared")
FLAGS = ((*_COMMON, "-fopenmp"), _COMMON)


class KernelsUnavailable(Exception):
    """No library can be had; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The kernels. Raises KernelsUnavailable with the reason if there is no compiler or it fails."""
    compiler = find_compiler()
    if compiler is None:
        raise KernelsUnavailable(f"no C compiler found (tried $CC, {', '.join(COMPILERS)})")
    reason = ""
    for flags in FLAGS:
        try:
            return ctypes.CDLL(str(_built(compiler, flags)))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = reason or _summary(error)
    raise KernelsUnavailable(f"{compiler} could not build the kernels: {reason}")


def kernel(name: str, dtype: torch.dtype) -> Any:
    """The C function's instance for one of the dtypes that `io_dtype` gives."""
    return getattr(load(), f"{name}_{str(dtype).removeprefix('torch.')}")


def structure(fields: str, integers: str, doubles: str = "") -> type[ctypes.Structure]:
    """A C struct of int64, double and pointers, in the order of `fields`."""
    kinds = dict.fromkeys(integers.split(), ctypes.c_int64) | dict.fromkeys(doubles.split(), ctypes.c_double)
    return type(
        "struct", (ctypes.Structure,), {"_fields_": [(f, kinds.get(f, ctypes.c_void_p)) for f in fields.split()]}
    )


def rows_of(t: Tensor) -> Tensor:
    """A tensor for the kernels: rows without gaps inside; between rows there may be some."""
    return t if t.stride(-1) == 1 else t.contiguous()


def io_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels read and write: float16 has no instance and goes through float32."""
    return dtype if dtype in (torch.float32, torch.float64, torch.bfloat16) else torch.float32


@functools.cache
def problem() -> str | None:
    """Why there is no library; None where there is one."""
    try:
        load()
    except KernelsUnavailable as error:
        return str(error)
    return None


def find_compiler() -> str | None:
    """$CC if set, else the first of cc, gcc and clang on the path."""
    candidates = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    """The library of these sources, compiled now unless it is in the cache."""
    library = _cache_folder() / f"cpu_kernels-{_key(compiler, flags)}.so"
    if library.exists():
        return library
    descriptor, name = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(descriptor)
    try:
        command = [compiler, *flags, str(SOURCES / "kernels.c"), "-o", name]
        subprocess.run(command, check=True, capture_output=True, text=True)
        Path(name).replace(library)
    finally:
        Path(name).unlink(missing_ok=True)
    return library


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [version, *flags, _cpu(), *(path.read_text() for path in sorted(SOURCES.glob("*.[ch]")))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native depends on."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = information.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _cache_folder() -> Path:
    """$HYMBA_TUNE_CACHE, or hymba-tune in the user's cache folder; a fresh temporary one if that can't be written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "hymba-tune")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = _temporary_folder()
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hymba-tune-"))


def _summary(error: OSError | subprocess.CalledProcessError) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return text.strip().splitlines()[0] if text and text.strip() else repr(error)
