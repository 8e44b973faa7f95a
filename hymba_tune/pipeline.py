"""Stages in order. A recipe is one stage so far; what runs it is stage.py."""

from __future__ import annotations

from hymba_tune.recipe import Recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.stage import run_stage


def run_recipe(recipe: Recipe, force: bool = False) -> RunDir:
    """Run every stage of a recipe that is not finished yet; the last one's directory comes back."""
    return run_stage(recipe, force)
