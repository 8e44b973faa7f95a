"""trainer.report_to: known trackers, and only those whose package is there."""

import importlib.util

import pytest

from hymba_tune.trainer_keys import problem


def test_an_unknown_tracker_is_refused() -> None:
    assert "is not known; use none, tensorboard, wandb, trackio" in str(problem("sft", "report_to", "mlflow"))


def test_a_tracker_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problem("sft", "report_to", ["none"]) is None
    assert "pip install wandb" in str(problem("dpo", "report_to", ["wandb"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert problem("dpo", "report_to", ["wandb", "tensorboard"]) is None
