"""The configuration takes the official keys, says what follows from them, and refuses what is not computed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from tests.model.models import tiny_config


@pytest.fixture
def official(data_dir: Path) -> dict[str, Any]:
    return json.loads((data_dir / "hymba-1.5b" / "config.json").read_text())


def test_the_official_file_as_keyword_arguments_gives_the_real_configuration(official: dict[str, Any]) -> None:
    config = HymbaConfig(**official)
    keys = {field.name for field in dataclasses.fields(HymbaConfig)} & set(official) - {"transformers_version"}
    assert len(keys) > 40
    assert {key: getattr(config, key) for key in keys} == {key: official[key] for key in keys}
    assert (config.head_dim(), config.value_head_dim(), config.inner_size()) == (64, 128, 3200)
    assert [i for i in range(32) if config.is_global(i)] == [0, 15, 31]
    assert sum(config.is_kv_producer(i) for i in range(32)) == 17
    assert config.kv_producer(18) == 16
    assert (config.window(0), config.window(1)) == (None, 1024)
    assert config.rope_base() == pytest.approx(10000 * 7 ** (64 / 62))


def test_remote_code_and_backends_of_the_official_file_are_dropped(official: dict[str, Any]) -> None:
    for config in (HymbaConfig(**official), HymbaConfig.from_dict(official)):
        written = config.to_dict()
        assert not {"auto_map", "attn_implementation", "attn_implementation_new"} & set(written)
        assert written["model_type"] == "hymba"


def test_a_configuration_survives_a_round_trip_through_its_file(tmp_path: Path) -> None:
    config = tiny_config("attention_and_ssm_only_layers")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HymbaConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("changes", [{}, {"mamba_dt_rank": "auto"}, {"layer_type": None}, {"kv_reuse_group": None}])
def test_building_a_model_writes_nothing_into_its_configuration(changes: dict[str, Any]) -> None:
    config = HymbaConfig(**{**tiny_config().to_dict(), "dtype": None, **changes})
    before = copy.deepcopy(config.to_dict())
    model = HymbaForCausalLM(config)
    # transformers notes the dtype of the weights when a model is made.
    assert {**model.config.to_dict(), "dtype": None} == {**before, "dtype": None}


def test_left_out_lists_mean_hybrid_windowed_layers_that_share_nothing() -> None:
    config = HymbaConfig(num_hidden_layers=3)
    assert config.layer_type == ["h", "h", "h"]
    assert [config.window(i) for i in range(3)] == [1024] * 3
    assert all(config.is_kv_producer(i) for i in range(3))
    assert config.mamba_dt_rank == 100


def test_a_producer_keeps_every_position_that_a_consumer_may_see() -> None:
    config = tiny_config("groups_of_global_and_windowed")
    assert [config.window(i) for i in range(4)] == [3, None, None, 3]
    assert [config.cache_window(i) for i in (0, 2)] == [None, None]
    assert tiny_config().cache_window(1) == 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_experts": 4}, r"num_experts=4 is not computed here; use 1"),
    "rope type": ({"rope_type": "yarn"}, r"rope_type='yarn' is not computed here; use 'ntk'"),
    "activation": ({"mlp_hidden_act": "gelu"}, r"mlp_hidden_act='gelu' is not computed here; use 'silu'"),
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout=0.1 is not computed here; use 0"),
    "weight reuse": ({"kv_weight_reuse": True}, r"kv_weight_reuse=True is not computed here; use False"),
    "conv bias": ({"mamba_conv_bias": False}, r"mamba_conv_bias=False is not computed here; use True"),
    "ntk without a base length": ({"orig_max_position_embeddings": None}, "needs orig_max_position_embeddings; set it"),
    "heads": ({"num_key_value_heads": 2}, r"num_attention_heads=5 must be a multiple of num_key_value_heads=2"),
    "value heads": (
        {"v_head_dim": 4},
        r"v_head_dim=4: heads \* v_head_dim must equal mamba_expand \* hidden_size = 40",
    ),
    "window": ({"sliding_window": 0}, r"sliding_window=0 must be 1 or more"),
    "letters": ({"layer_type": ["h", "x", "h", "h", "h"]}, r"layer_type=.*'x'.* must hold 5 letters out of"),
    "number of letters": ({"layer_type": ["h"] * 4}, r"layer_type=.* must hold 5 letters"),
    "layer in two groups": ({"kv_reuse_group": [[1, 2], [2, 3]]}, r"kv_reuse_group=.*a layer stands in two groups"),
    "layer that is not there": ({"global_attn_idx": [5]}, r"names layer 5 .*; layers are 0 to 4"),
    "consumer before its producer": ({"kv_reuse_group": [[2, 1]]}, r"has \[2, 1\]: a producer comes before"),
    "group without attention": (
        {"layer_type": ["h", "m", "h", "h", "h"], "kv_reuse_group": [[1, 2]]},
        r"kv_reuse_group has \[1, 2\]: .* all of them have attention",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_bad_configuration_is_refused_with_key_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", "five"), ("hidden_size", 20.5), ("rope", "yes")])
def test_a_value_of_another_type_is_refused_with_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"'{key}'(.|\n)*{value}"):
        tiny_config(**{key: value})
