"""Merged and exported checkpoints: the same function, whole or not there, and readable without us naming a class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hymba_tune.data.chat import CHAT_TEMPLATE
from hymba_tune.errors import UserError
from hymba_tune.export import export, merge
from hymba_tune.model.adapter import attach_adapter
from hymba_tune.weights import find_weights, load_weights
from tests.model.models import random_model, tiny_config

IDS = torch.tensor([[5, 9, 17, 30, 8]])
# Folding an adapter in rounds each weight once more.
MERGED: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture
def base(tmp_path: Path, small_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random checkpoint and its tokenizer; its generation settings switch the cache off, as the published do."""
    model = random_model(tiny_config(vocab_size=400), dtype=torch.float32)
    model.generation_config.use_cache = False
    model.save_pretrained(tmp_path / "base")
    small_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on(below: Path, folder: Path, seed: int) -> Path:
    """A DoRA adapter on `below`, random so that it changes every layer, and without a tokenizer of its own."""
    adapted = attach_adapter(load_weights(find_weights(str(below))), r=2, alpha=4, base=str(below))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_merged_stack_computes_what_its_adapters_do_in_their_order(base: Path, tmp_path: Path) -> None:
    first = adapter_on(base, tmp_path / "first", 1)
    second = adapter_on(first, tmp_path / "second", 2)
    weights = merge(str(second), tmp_path / "merged")
    assert weights.adapters == (first, second)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    stacked = logits(load_weights(find_weights(str(second))))
    torch.testing.assert_close(logits(plain), stacked, **MERGED)
    assert not torch.allclose(stacked, logits(load_weights(find_weights(str(first)))), atol=1e-2)
    assert plain.dtype == torch.float32


def test_a_base_that_has_moved_is_named_by_hand(base: Path, tmp_path: Path) -> None:
    adapter = adapter_on(base, tmp_path / "adapter", 1)
    expected = logits(load_weights(find_weights(str(adapter))))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"its base .*base is not there; merge it with --base"):
        merge(str(adapter), tmp_path / "merged")
    merge(str(adapter), tmp_path / "merged", str(moved))
    torch.testing.assert_close(logits(load_weights(find_weights(str(tmp_path / "merged")))), expected, **MERGED)


def test_an_export_loads_with_the_auto_classes_and_needs_no_remote_code(base: Path, tmp_path: Path) -> None:
    export(str(base), tmp_path / "out", "bfloat16")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"} <= files
    assert not [name for name in files if name.endswith(".py")]
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE.read_text(encoding="utf-8")
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert generation.use_cache
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] <= IDS.shape[1] + 3


def test_a_bfloat16_export_keeps_decay_rates_and_skips_exact(base: Path, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    export(str(base), tmp_path / "out", "bfloat16")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    kept = [name for name in after if ".A_log." in name or ".D." in name]
    assert kept
    for name, value in after.items():
        assert value.equal(before[name] if name in kept else before[name].bfloat16()), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_float32_export_is_bit_for_bit_the_checkpoint(base: Path, tmp_path: Path) -> None:
    export(str(base), tmp_path / "out", "float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert all(value.equal(before[name]) for name, value in after.items())


def test_what_is_there_is_never_written_over(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(str(base), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_without_an_adapter_is_not_merged(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapter to fold in"):
        merge(str(base), tmp_path / "merged")


def test_an_export_that_fails_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        export(str(base), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
