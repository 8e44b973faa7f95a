"""Names of files as people write them: relative to where they were written, with `${NAME}` from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hymba_tune.errors import UserError
from hymba_tune.layers import Origin

REPOSITORY = Path(__file__).resolve().parents[1]
"""The clone that an editable install runs from; it holds recipes/ and data_mixes/."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")


def expand(text: str, origin: Origin, field: str) -> str:
    """`~` and `${NAME}` filled in; raises UserError for a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise UserError(f"{origin.text}: {field}: {text}: the variable {name} is not set; export {name}=FOLDER")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(value, text))  # noqa: PTH111  (Path would turn a hub id's // into /)


def find(name: str, folders: Iterable[Path]) -> Path | None:
    """The first existing `folder/name`, the repository's last; absolute. None if there is none."""
    for folder in [*folders, REPOSITORY]:
        candidate = folder / name
        if candidate.exists():
            return candidate.absolute()
    return None


def is_hub_id(text: str) -> bool:
    """Whether a text has the form owner/name."""
    return _HUB_ID.match(text) is not None


def task_file(text: str) -> tuple[str, str] | None:
    """A user's own task as (file, scorer): FILE.jsonl:SCORER, or FILE.yaml with ""; None for a plain name."""
    file, colon, scorer = text.rpartition(":")
    if colon and file.endswith(".jsonl"):
        return file, scorer
    return (text, "") if text.endswith((".jsonl", ".yaml", ".yml")) else None
