"""The watchdog's time against torch's own; that it fires is seen in tests/test_launched_faults.py."""

from pathlib import Path

import pytest
from trl import SFTConfig

from hymba_tune.recipe import LaunchSection, Recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.training.trainer import make_arguments
from hymba_tune.training.watchdog import PATIENCE_SECONDS


@pytest.mark.parametrize("minutes", [0.5, 30.0, 240.0])
def test_torch_waits_longer_than_the_watchdog_which_knows_more(tmp_path: Path, recipe: Recipe, minutes: float) -> None:
    patient = recipe.model_copy(update={"launch": LaunchSection(step_timeout=minutes)})
    arguments = make_arguments(SFTConfig, patient, RunDir(tmp_path))
    assert arguments.ddp_timeout > 60 * minutes + PATIENCE_SECONDS
