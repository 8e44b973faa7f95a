"""Under DeepSpeed in bfloat16: what stays float32, what decays, what is shared out and gathered where it is used."""

import json
from typing import Any

import pytest

from tests.launched import described, run_with, write_recipe

FLOAT32, BFLOAT16 = "torch.float32", "torch.bfloat16"
# The rounding of a result to the 8 bits of bfloat16, and a few of float32.
ROUNDED = {BFLOAT16: 1.01 * 2**-8, FLOAT32: 1e-5}
NOT_DECAYED = ("A_log", ".D.0", "norm", "bias", "memory_tokens")
DECAY = 0.1


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def description(request: Any, tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Any) -> dict[str, Any]:
    """What rank 1 said; see tests.launched.Described."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    trainer = {
        "learning_rate": 1e-3, "global_batch": 4, "per_device_train_batch_size": 2, "max_steps": 1,
        "weight_decay": DECAY, "gradient_checkpointing": False,
    }  # fmt: skip
    path = write_recipe(folder, small_tokenizer, request.param, trainer=trainer, model={"dtype": "bfloat16"})
    with pytest.MonkeyPatch.context() as patch:
        run_with(path, described.__name__, patch)
    found: dict[str, Any] = json.loads((folder / "description-1.json").read_text())
    return {**found, "config": request.param}


pytestmark = pytest.mark.full


def test_every_weight_and_what_the_optimizer_steps_on_is_float32(description: dict[str, Any]) -> None:
    assert {dtype for dtype, _, _ in description["parameters"].values()} == {FLOAT32}
    assert description["masters"] == [FLOAT32]


def test_zero3_shares_out_every_weight_and_gathers_it_where_it_is_used(description: dict[str, Any]) -> None:
    for name, (_, whole, mine) in description["parameters"].items():
        share = -(-whole // 2) if description["config"] == "zero3" else whole
        assert mine == share, name
    for name, (_, numel) in description["at_use"].items():
        assert numel == description["parameters"][name][1], name


def test_decay_rates_skips_dt_biases_and_norms_are_float32_where_they_are_used(description: dict[str, Any]) -> None:
    used = description["at_use"]
    for part in ("A_log", ".D.0", "dt_proj.0.bias", "input_layernorm", "final_layernorm", "B_layernorm"):
        assert any(part in name for name in used), part
    assert {dtype for dtype, _ in used.values()} == {FLOAT32}


def test_products_run_in_bfloat16_and_scans_and_norms_in_float32(description: dict[str, Any]) -> None:
    assert set(description["projected"]) == {BFLOAT16}
    assert description["scan"]
    assert all(dtypes == [FLOAT32] * 4 for dtypes in description["scan"])
    for name, (dtype, error) in description["norm_errors"].items():
        assert error < ROUNDED[dtype], name


def test_only_matrices_decay(description: dict[str, Any]) -> None:
    decay = description["decay"]
    assert decay.keys() == description["parameters"].keys()
    for part in NOT_DECAYED:
        assert any(part in name for name in decay), part
    for name, value in decay.items():
        assert value == (0.0 if any(part in name for part in NOT_DECAYED) else DECAY), name
