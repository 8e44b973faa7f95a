"""Settings against those of another recipe and against the paper."""

import pytest

from hymba_tune.paths import REPOSITORY
from hymba_tune.recipe import load_recipe
from hymba_tune.report.settings import against_paper, changed_settings


@pytest.mark.parametrize("name", ["sft1", "sft2", "dpo", "pretrain"])
def test_a_shipped_recipe_sets_what_the_paper_states(name: str) -> None:
    assert against_paper(load_recipe(REPOSITORY / "recipes" / f"{name}.yaml").to_dict()) == []


def test_what_differs_from_the_paper_is_named() -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / "sft1.yaml", ["trainer.learning_rate=1e-4", "data.packing=none"])
    assert against_paper(recipe.to_dict()) == [
        {"key": "trainer.learning_rate", "paper": 5e-5, "here": 1e-4, "note": None},
        {"key": "data.packing", "paper": "bfd", "here": "none", "note": "the paper says packed, not how"},
    ]


def test_the_paper_states_nothing_for_adapters() -> None:
    assert against_paper(load_recipe(REPOSITORY / "recipes" / "roleplay_dora.yaml").to_dict()) is None


def test_settings_that_were_added_removed_or_changed_are_listed_by_their_keys() -> None:
    old = {"stage": "a", "data": {"seed": 0, "limit": 5}, "adapter": None, "output": {"dir": "x"}}
    new = {"stage": "b", "data": {"seed": 1}, "adapter": {"r": 4}, "output": {"dir": "y"}}
    assert [row["key"] for row in changed_settings(old, new)] == ["data.seed", "adapter.r", "data.limit"]
    assert changed_settings(old, new)[1] == {"key": "adapter.r", "old": None, "new": 4}
