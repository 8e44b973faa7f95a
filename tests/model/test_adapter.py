"""Adapters on every projection: matched everywhere, alive after the first backward, exact after merging."""

import copy
from pathlib import Path

import pytest
import torch

from hymba_tune.errors import UserError
from hymba_tune.model import HymbaConfig, HymbaForCausalLM
from hymba_tune.model.adapter import DEFAULT_TARGETS, GradientAudit, attach_adapter, load_adapter, merge_adapter

# One product more (B A x) than the merged weight's, in float64.
MERGE_TOLERANCE = 1e-9
LAYERS = 4


@pytest.fixture
def model() -> HymbaForCausalLM:
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, v_head_dim=16, sliding_window=3, global_attn_idx=[0], kv_reuse_group=[[1, 2]],
        num_memory_tokens=3, mamba_d_state=4, mamba_dt_rank=3, rope_type=None, initializer_range=0.1,
        layer_type=["h", "h", "h", "m"],
    )  # fmt: skip
    return HymbaForCausalLM(config).double()


IDS = torch.arange(2, 14).reshape(2, 6)


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_every_adapter_gets_a_gradient_at_the_first_step(model: HymbaForCausalLM, kind: str) -> None:
    adapted = attach_adapter(model, kind, r=2)
    audit = GradientAudit(adapted)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    audit.finish()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    for target in DEFAULT_TARGETS:
        assert sum(f".{target}.lora_B" in name for name in trained) == LAYERS


def test_an_adapter_that_gets_no_gradient_is_named(model: HymbaForCausalLM) -> None:
    adapted = attach_adapter(model, r=2)
    dead = adapted.get_submodule("base_model.model.model.layers.1.mamba.x_proj.0")
    dead.register_forward_hook(lambda module, inputs, output: output.detach())
    audit = GradientAudit(adapted)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match=r"no gradient reached .*layers\.1\.mamba\.x_proj\.0"):
        audit.finish()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], "'q_proj' matches no module"),
        (["in_proj", "conv1d"], "'conv1d' is a Conv1d, which can't be adapted"),
        (["x_proj"], "'x_proj' is a ModuleList"),
        (["embed_tokens"], "'embed_tokens' is a Embedding"),
        (["lm_head"], "lm_head"),
        ([], "empty"),
    ],
)
def test_targets_that_cannot_work_are_refused(model: HymbaForCausalLM, targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach_adapter(model, targets=targets)


def test_merged_weights_compute_what_the_adapter_did(model: HymbaForCausalLM, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    adapted = attach_adapter(model, r=2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.eval()
    expected = adapted(input_ids=IDS).logits
    assert not torch.allclose(expected, base(IDS).logits)
    adapted.save_pretrained(str(tmp_path))
    merged = merge_adapter(adapted)
    torch.testing.assert_close(merged(IDS).logits, expected, atol=MERGE_TOLERANCE, rtol=0)
    assert set(merged.state_dict()) == set(base.state_dict())
    again = load_adapter(base.float(), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits.double(), expected, atol=1e-4, rtol=0)


def test_a_folder_without_an_adapter_is_refused(model: HymbaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a folder that an adapter run of this base wrote"):
        load_adapter(model, tmp_path)
