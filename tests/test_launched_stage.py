"""A stage whose training runs in two processes learns what it would in one, and leaves the same files."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.model import HymbaForCausalLM, load_model
from tests.launched import assert_same_training, metrics, run, weights, write_recipe

DORA = {"adapter": {"type": "dora", "r": 2, "alpha": 4}}
RECOMPUTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    "config", ["ddp", *(pytest.param(name, marks=pytest.mark.full) for name in ("zero1", "zero2", "zero3"))]
)
@pytest.mark.parametrize("sections", [{}, pytest.param(DORA, marks=pytest.mark.full)], ids=["whole", "dora"])
def test_two_processes_learn_what_one_does(
    config: str, sections: dict[str, Any], tmp_path: Path, small_tokenizer: Any
) -> None:
    if config != "ddp":
        pytest.importorskip("deepspeed")
    alone = run(write_recipe(tmp_path, small_tokenizer, "single", 1, **sections))
    together = run(write_recipe(tmp_path, small_tokenizer, config, **sections))
    assert_same_training(together, alone)
    for before, line in pairwise(metrics(together)):
        rate = (line["tokens"] - before["tokens"]) / (line["seconds"] - before["seconds"])
        assert line["tokens_per_second"] == pytest.approx(rate, rel=0.05)  # seconds are rounded


@pytest.mark.full
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("sections", [{}, DORA], ids=["whole", "dora"])
def test_recomputing_layers_changes_nothing(
    config: str, sections: dict[str, Any], tmp_path: Path, small_tokenizer: Any
) -> None:
    if config != "ddp":
        pytest.importorskip("deepspeed")
    kept = run(write_recipe(tmp_path, small_tokenizer, config, **sections))
    path = write_recipe(tmp_path, small_tokenizer, config, name="recomputed", trainer=RECOMPUTED, **sections)
    assert_same_training(run(path), kept)


@pytest.mark.full
def test_the_weights_out_of_pieces_are_a_whole_checkpoint(tmp_path: Path, small_tokenizer: Any) -> None:
    pytest.importorskip("deepspeed")
    done = run(write_recipe(tmp_path, small_tokenizer, "zero3"))
    model = HymbaForCausalLM.from_pretrained(done.model)
    expected = {name: value for name, value in weights(done).items() if name in dict(model.named_parameters())}
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=0, rtol=0)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, load_model(str(done.model)).eval()(ids).logits)
