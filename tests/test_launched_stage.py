"""A stage whose training runs in two processes learns what it would in one, and leaves the same files.

Where two processes recompute their layers in the backward pass, the one that they are held against keeps them.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.model import HymbaForCausalLM, load_model
from tests.launched import assert_same_training, metrics, run, weights, write_recipe

DORA: dict[str, Any] = {"adapter": {"type": "dora", "r": 2, "alpha": 4}}
RECOMPUTED: dict[str, Any] = {"trainer": {"gradient_checkpointing": True}}


def _cases() -> list[Any]:
    full: list[tuple[str, dict[str, Any]]] = [
        ("zero1", {}),
        ("zero2", {}),
        ("zero3", {}),
        ("zero2", DORA),
        ("zero3", DORA),
    ]
    full += [("zero3", RECOMPUTED), ("zero3", {**DORA, **RECOMPUTED})]
    return [
        pytest.param("ddp", {}, id="ddp"),
        *(pytest.param(*case, marks=pytest.mark.full, id="-".join([case[0], *case[1]])) for case in full),
    ]


@pytest.mark.parametrize(("config", "sections"), _cases())
def test_two_processes_learn_what_one_does(
    config: str, sections: dict[str, Any], tmp_path: Path, small_tokenizer: Any
) -> None:
    if config != "ddp":
        pytest.importorskip("deepspeed")
    kept = {key: value for key, value in sections.items() if key != "trainer"}
    alone = run(write_recipe(tmp_path, small_tokenizer, "single", 1, **kept))
    together = run(write_recipe(tmp_path, small_tokenizer, config, **sections))
    assert_same_training(together, alone)
    for before, line in pairwise(metrics(together)):
        rate = (line["tokens"] - before["tokens"]) / (line["seconds"] - before["seconds"])
        assert line["tokens_per_second"] == pytest.approx(rate, rel=0.1)  # seconds are rounded


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
