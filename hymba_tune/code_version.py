"""Which code a run's weights come from: the part of ours that makes rows, computes the model and trains.

A run goes on, or counts as finished, only with the code that began it. So the version must change with an edit that can
change a weight, and with no other: of the packages data, model and training it takes the modules that the method's
trainer and its rows import, directly or not, and reads them without comments and docstrings. Kernels and backends are
chosen at run time, so all of them count; the reports, benchmarks, the command line and what callbacks show do not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hymba_tune import __version__

PACKAGE = Path(__file__).parent
PARTS = ("data", "model", "training")
_SHOWS_ONLY = {"training/callbacks.py"}
_DPO = ("training/dpo.py", "data/mix.py", "data/pairs.py", "model/__init__.py")
_SFT = ("training/sft.py", "data/mix.py", "data/packing.py", "model/__init__.py")


@cache
def weights_code(method: str) -> dict[str, str]:
    """{file: sha256 of what it does} for a recipe's method, and the package's version."""
    files: dict[str, str] = {"version": __version__}
    waiting = [PACKAGE / name for name in (_DPO if method == "dpo" else _SFT)]
    waiting += (PACKAGE / "model" / "ops").glob("*.py")
    while waiting:
        file = waiting.pop()
        name = file.relative_to(PACKAGE).as_posix()
        if name in files or name in _SHOWS_ONLY:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        waiting += _imported(tree)
        files[name] = hashlib.sha256(ast.unparse(_without_docstrings(tree)).encode()).hexdigest()
    for file in _kernels_and_templates():
        files[file.relative_to(PACKAGE).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    return dict(sorted(files.items()))


def _imported(tree: ast.Module) -> Iterator[Path]:
    """Files of PARTS that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            package, *path = name.split(".")
            if package == "hymba_tune" and path and path[0] in PARTS:
                stem = PACKAGE.joinpath(*path)
                yield from (file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The module's tree without docstrings, which are what people edit without changing anything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _kernels_and_templates() -> Iterator[Path]:
    for part in ("data", "model"):
        for file in sorted((PACKAGE / part).rglob("*")):
            if file.suffix in (".jinja", ".c", ".cpp", ".h", ".cu"):
                yield file
