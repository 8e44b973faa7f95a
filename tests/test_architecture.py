"""The house: which part may import which, what shipped files must hold, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hymba_tune
from hymba_tune.paths import REPOSITORY
from hymba_tune.yaml_reader import read_yaml

PACKAGE = Path(hymba_tune.__file__).parent

# What everything may import: errors, YAML, paths, versions. It imports nothing but itself.
BASE = {"", "code_version", "errors", "layers", "paths", "provenance", "trainer_keys", "yaml_reader"}

# Parts of the package and what of ours they may import besides BASE and themselves.
ARROWS: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    "rank": set(),
    "topology": set(),
    "recipe": {"geometry", "topology"},
    "machines": {"topology"},
    "launch": {"machines", "recipe", "topology"},
    "cluster": {"launch", "pipeline"},
    "run_dir": set(),
    "hub": set(),
    "geometry": set(),
    "data": set(),
    "model": set(),
    "tiny": {"data", "model"},
    "plan": {"recipe", "geometry", "launch", "data", "tiny", "zero"},
    "zero": {"geometry"},
    "doctor": {"model"},
    "training": {"recipe", "run_dir", "rank", "data", "model"},
    "evaluation": {"recipe", "run_dir", "data", "model"},
    "report": {"run_dir"},
    "inspection": {"run_dir", "data", "weights", "report"},
    "numerics": {"model"},
    "weights": {"recipe", "run_dir", "model", "tiny"},
    "runs": {"run_dir", "report"},
    "workers": set(),
    "chat": {"data", "evaluation", "model", "report", "weights"},
    "export": {"data", "hub", "report", "weights"},
    "evaluate": {"data", "model", "weights", "evaluation", "launch", "topology"},
}
SEES_ALL = {"cli", "make_tiny", "pipeline", "stage"}

# Libraries that only one part may import.
ONLY_IN = {"trl": {"training"}, "lm_eval": {"evaluation"}, "peft": {"model"}, "typer": {"cli"}}

LONGEST_FILE = 600


def part_of(module: str) -> str:
    """hymba_tune.data.mix -> data; hymba_tune itself -> ''."""
    return module.split(".")[1] if "." in module else ""


def sources() -> Iterator[tuple[Path, str]]:
    """Every file of the package and the part it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        yield path, "" if name == "__init__" else name


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules that a file imports anywhere in it, with lines; `from hymba_tune import data` is hymba_tune.data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "hymba_tune":
                yield from ((f"hymba_tune.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def test_the_arrows_of_the_house_hold():
    wrong = []
    for path, part in sources():
        if part in SEES_ALL:
            continue
        allowed = BASE | {part, "__version__"} | ARROWS[part]
        wrong += [
            f"{path.relative_to(REPOSITORY)}:{line}: {part or 'hymba_tune'} must not import {module}"
            for module, line in imports(path)
            if module.split(".")[0] == "hymba_tune" and part_of(module) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_every_part_of_the_package_has_its_place_in_the_house():
    assert {part for _, part in sources()} <= ARROWS.keys() | SEES_ALL


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_own_part_only(library):
    users = {part for path, part in sources() for module, _ in imports(path) if module.split(".")[0] == library}
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize(
    "module", ["cli", "recipe", "plan", "run_dir", "doctor", "geometry", "hub", "launch", "rank", "topology"]
)
def test_light_modules_load_nothing_heavy(module):
    code = (
        f"import sys, hymba_tune.{module}\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_itself_imports_nothing():
    assert not list(imports(PACKAGE / "__init__.py"))


def test_no_file_is_too_long():
    patterns = ("hymba_tune/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "recipes/*", "data_mixes/*", "docs/*.md")
    paths = [path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file()]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_every_python_file_says_its_subject_first():
    silent = [path for path, _ in sources() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent, silent


SHIPPED_YAML = [
    path
    for folder in ("recipes", "data_mixes", "accelerate_configs")
    for path in sorted((REPOSITORY / folder).glob("*"))
]


@pytest.mark.parametrize("path", SHIPPED_YAML, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_yaml_loads(path):
    assert path.suffix == ".yaml"
    read_yaml(path)
