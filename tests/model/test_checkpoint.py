"""Official checkpoints load without remote code, ours are written under the official names, and the real one fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hymba_tune.errors import UserError
from hymba_tune.model import HymbaConfig, HymbaForCausalLM, load_model
from tests.model.models import random_ids, random_model, tiny_config

REAL_PARAMETERS = 1_522_797_824
OFFICIAL_ONLY = {
    "architectures": ["HymbaForCausalLM"],
    "attn_implementation": "flex",
    "attn_implementation_new": "flex",
    "auto_map": {
        "AutoConfig": "configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
    },
    "calc_logits_for_entire_prompt": False,
    "conv_dim": {str(layer): 40 for layer in range(5)},
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_mamba_kernels": True,
}


@pytest.fixture(scope="module")
def tiny() -> HymbaForCausalLM:
    return random_model(tiny_config(), dtype=torch.float32)


@pytest.fixture
def official_folder(tiny: HymbaForCausalLM, tmp_path: Path) -> Path:
    """A checkpoint as published: bfloat16 weights, the tied head among them, remote code and backend keys."""
    folder = tmp_path / "official"
    folder.mkdir()
    keys = {key: value for key, value in tiny.config.to_dict().items() if key not in ("dtype", "transformers_version")}
    (folder / "config.json").write_text(json.dumps({**keys, **OFFICIAL_ONLY}))
    state = {name: value.to(torch.bfloat16).clone() for name, value in tiny.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "use_cache": False}))
    return folder


def test_an_official_checkpoint_loads_without_remote_code_and_is_saved_under_its_names(
    tiny: HymbaForCausalLM, official_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(official_folder, dtype=torch.float32)
    assert type(model) is HymbaForCausalLM
    for name, parameter in tiny.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(torch.bfloat16).float()), name

    model.save_pretrained(tmp_path / "ours")
    official, ours = (load_file(folder / "model.safetensors") for folder in (official_folder, tmp_path / "ours"))
    assert official.keys() - ours.keys() == {"lm_head.weight"}
    assert ours.keys() <= official.keys()
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert not {"auto_map", "attn_implementation", "attn_implementation_new"} & set(written)
    assert [path.name for path in (tmp_path / "ours").glob("*.py")] == []


def test_what_was_saved_is_loaded_again_bit_for_bit(tiny: HymbaForCausalLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tiny.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    tiny.save_pretrained(tmp_path / "twice")
    again.save_pretrained(tmp_path / "again")
    first, second = (folder / "model.safetensors" for folder in (tmp_path / "twice", tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_checkpoint_in_several_files_loads(tiny: HymbaForCausalLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).eval()(ids).logits, tiny(ids).logits)


def test_loading_in_bfloat16_keeps_decay_rates_and_skips_in_float32(official_folder: Path, tmp_path: Path) -> None:
    model = load_model(official_folder, dtype=torch.bfloat16)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {f"model.layers.{i}.mamba.{name}.0" for i in range(5) for name in ("A_log", "D")}
    assert {p.dtype for name, p in model.named_parameters() if name not in wide} == {torch.bfloat16}

    model.save_pretrained(tmp_path / "ours")
    saved, official = (
        load_file(tmp_path / "ours" / "model.safetensors"),
        load_file(official_folder / "model.safetensors"),
    )
    assert saved.keys() == official.keys() - {"lm_head.weight"}
    assert all(torch.equal(saved[name].float(), official[name].float()) for name in saved)
    again = load_model(tmp_path / "ours", dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


def test_generation_after_load_model_uses_the_cache_that_the_official_settings_switch_off(
    official_folder: Path,
) -> None:
    assert load_model(official_folder).generation_config.use_cache is True
    assert AutoModelForCausalLM.from_pretrained(official_folder).generation_config.use_cache is False


@pytest.mark.parametrize("which", ["A", "B"])
def test_the_oracle_folders_load_and_come_back_byte_for_byte(which: str, data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "oracle" / which
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is HymbaForCausalLM
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == json.loads((folder / "state_dict_keys.json").read_text())
    model.save_pretrained(tmp_path)
    ours, official = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == official.keys()
    assert all(ours[name].numpy().tobytes() == official[name].numpy().tobytes() for name in official)


def test_the_real_configuration_has_exactly_the_published_keys_shapes_and_parameters(data_dir: Path) -> None:
    folder = data_dir / "hymba-1.5b"
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is HymbaConfig
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == json.loads((folder / "real_state_dict_keys.json").read_text())
    assert len(shapes) == 612
    assert sum(parameter.numel() for parameter in model.parameters()) == REAL_PARAMETERS


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_a_folder_that_holds_no_hymba_is_refused_with_its_path_and_a_remedy(
    official_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model .*nowhere: .*give a Hymba folder or hub id"):
        load_model(tmp_path / "nowhere")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="a GPT2LMHeadModel, not a Hymba"):
        load_model(tmp_path / "gpt2")
    change(official_folder, num_experts=8)
    with pytest.raises(UserError, match=r"model .*official: .*num_experts=8 is not computed here; use 1"):
        load_model(official_folder)
    change(official_folder, num_experts=1, hidden_size="wide")
    with pytest.raises(UserError, match=r"model .*official: .*'hidden_size' expected int, got str"):
        load_model(official_folder)


def test_weights_that_are_missing_or_of_another_shape_are_refused(official_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(official_folder, tmp_path / "wide")
    change(tmp_path / "wide", mamba_dt_rank=3)
    with pytest.raises(UserError, match=r"\d+ mismatched weights, the first is .*model.layers.0.mamba.dt_layernorm"):
        load_model(tmp_path / "wide")
    change(official_folder, num_hidden_layers=4, layer_type=["h"] * 4, global_attn_idx=[0])
    with pytest.raises(UserError, match=r"\d+ unexpected weights, the first is model.layers.4"):
        load_model(official_folder)
    change(official_folder, num_hidden_layers=5, layer_type=["h"] * 5)
    state = load_file(official_folder / "model.safetensors")
    del state["model.layers.2.mamba.A_log.0"]
    save_file(state, official_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing weights, the first is model.layers.2.mamba.A_log.0"):
        load_model(official_folder)


def test_a_new_model_starts_at_mambas_initial_values() -> None:
    torch.manual_seed(0)
    model = HymbaForCausalLM(tiny_config(initializer_range=0.02, hidden_size=200, v_head_dim=80))
    mixer = model.model.layers[0].mamba
    assert torch.equal(mixer.A_log[0].exp().round(), torch.arange(1.0, 5).expand(400, 4))
    assert torch.equal(mixer.D[0], torch.ones(400))
    steps = torch.nn.functional.softplus(mixer.dt_proj[0].bias)
    assert 0.00099 < steps.min() < 0.002 < 0.05 < steps.max() < 0.1001
    assert torch.equal(mixer.pre_avg_layernorm1.weight, torch.ones(400))
    for weight in (model.model.memory_tokens, model.model.embed_tokens.weight, mixer.in_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
