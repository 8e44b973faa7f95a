"""What a recipe sets otherwise than another recipe, or than the paper states (paper.yaml)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

PAPER = Path(__file__).with_name("paper.yaml")
NAMES = ("stage", "output.dir")
"""Settings that differ from run to run and decide nothing."""


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{key, old, new}] of the settings that differ, by dotted key; None stands for one that is not set."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in dict.fromkeys([*after, *before]) if key not in NAMES]
    return [
        {"key": key, "old": before.get(key), "new": after.get(key)} for key in keys if before.get(key) != after.get(key)
    ]


def against_paper(recipe: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """[{key, paper, here, note}] of what the paper states for the recipe's method and differs here.

    None where the paper states no settings: for adapters, and for other methods.
    """
    stated = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    method = recipe.get("method")
    if recipe.get("adapter") or method not in stated:
        return None
    here = dict(_flat(recipe))
    return [
        {"key": key, "paper": value, "here": here.get(key), "note": stated["notes"].get(key)}
        for key, value in stated[method].items()
        if here.get(key) != value
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
