"""Kernels are compiled once, by whatever compiler there is, and the CPU backend does without one."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_tune.model.ops import cpu, cpu_library, portable
from tests.model.ops.cases import needs_compiler


@pytest.fixture
def fresh_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No library is loaded, none is in the cache; afterwards all is as it was."""
    monkeypatch.setenv(cpu_library.CACHE_VARIABLE, str(tmp_path / "cache"))
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()
    importlib.reload(cpu)


def forget() -> None:
    cpu_library.load.cache_clear()
    cpu_library.problem.cache_clear()


def assert_torch_takes_over(reason: str) -> None:
    importlib.reload(cpu)
    assert cpu.selective_scan is portable.selective_scan
    assert cpu.causal_conv1d is portable.causal_conv1d
    available, explanation = cpu.available("selective_scan")
    assert available
    assert "torch in chunks" in explanation
    assert reason in explanation
    assert cpu.available("segment_attention")[1].startswith("matrix products over blocks of queries")
    assert cpu.elementwise() is None
    assert cpu.available("elementwise")[1].startswith("torch, one operation after the other: ")


def test_without_a_compiler_torch_takes_over_and_says_so(fresh_start: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_start.setenv("PATH", str(tmp_path))
    fresh_start.delenv("CC", raising=False)
    assert_torch_takes_over("no C compiler found (tried $CC, cc, gcc, clang)")


def test_a_compiler_that_fails_is_reported(fresh_start: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'cannot find assembler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh_start.setenv("CC", str(compiler))
    assert_torch_takes_over("broken-cc could not build the kernels: cannot find assembler")


@needs_compiler
def test_a_library_is_built_once_and_found_again(fresh_start: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "sources"
    source.mkdir()
    (source / "kernels.c").write_text("int answer(void) { return 42; }\n")
    fresh_start.setattr(cpu_library, "SOURCES", source)
    assert cpu_library.load.__wrapped__().answer() == 42
    (built,) = (tmp_path / "cache").iterdir()
    time = built.stat().st_mtime_ns
    assert cpu_library.load.__wrapped__().answer() == 42
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [time]
    (source / "kernels.c").write_text("int answer(void) { return 43; }\n")
    assert cpu_library.load.__wrapped__().answer() == 43
