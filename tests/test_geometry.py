"""The closed formulas of a plan against the real checkpoint's keys, our model class and peft."""

import json
import math
from typing import Any

import pytest

from hymba_tune.errors import UserError
from hymba_tune.geometry import CONFIG, LEFTOVERS, PUBLISHED, Geometry, activations, adapter_parameters, parameters
from hymba_tune.recipe import DORA_TARGETS

SMALL = {
    "vocab_size": 97,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "v_head_dim": 32,
    "num_memory_tokens": 8,
    "global_attn_idx": [0, 3],
    "kv_reuse_group": [[1, 2]],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "attention only": {"layer_type": ["a"] * 4},
    "SSM only": {"layer_type": ["m"] * 4, "kv_reuse_group": None},
    "mixed": {"layer_type": ["h", "a", "a", "m"], "mamba_dt_rank": 7},
    "no sharing": {"kv_reuse_group": None, "num_key_value_heads": 5, "mamba_d_state": 4, "mamba_d_conv": 3},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return {**SMALL, **VARIANTS[request.param]}


def test_the_real_checkpoint_has_as_many_parameters_as_counted(data_dir):
    shapes = json.loads((data_dir / "hymba-1.5b" / "real_state_dict_keys.json").read_text())
    config = json.loads((data_dir / "hymba-1.5b" / "config.json").read_text())
    tied = sum(math.prod(shape) for name, shape in shapes.items() if name != "lm_head.weight")
    assert sum(parameters(Geometry.of(config)).values()) == tied == 1_522_797_824


def test_the_published_configuration_is_known_without_a_hub(data_dir):
    config = json.loads((data_dir / "hymba-1.5b" / "config.json").read_text())
    assert Geometry.of(PUBLISHED["nvidia/Hymba-1.5B-Base"]) == Geometry.of(config)


def test_the_keys_and_defaults_are_those_of_the_model_class():
    from hymba_tune.model import HymbaConfig

    fields = {
        name: getattr(HymbaConfig, name)
        for name in HymbaConfig.__annotations__
        if "ClassVar" not in str(HymbaConfig.__annotations__[name])
    }
    assert fields == CONFIG
    assert Geometry.of({}) == Geometry.of(HymbaConfig().to_dict())


def test_the_real_config_file_holds_known_keys_only(data_dir):
    config = json.loads((data_dir / "hymba-1.5b" / "config.json").read_text())
    assert set(config) <= set(CONFIG) | LEFTOVERS


def test_counted_parameters_are_those_of_the_model_class(config):
    assert sum(parameters(Geometry.of(config)).values()) == sum(p.numel() for p in _model(config).parameters())


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_counted_adapter_parameters_are_those_of_peft(config, kind):
    from hymba_tune.model.adapter import attach_adapter

    has_ssm = set(config.get("layer_type") or "h") != {"a"}
    targets = [target for target in DORA_TARGETS if has_ssm or target not in ("x_proj.0", "dt_proj.0")]
    adapted = attach_adapter(_model(config, device="cpu"), kind, 4, 8, 0.0, targets)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(Geometry.of(config), kind, 4, targets) == trained


def test_activations_are_within_a_tenth_of_what_autograd_keeps(monkeypatch):
    """Operations that keep their inputs and output only, as the fast backends do, stand in for the reference ones."""
    import torch

    from hymba_tune.model import ops

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, like: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
            output = like.clone()
            ctx.save_for_backward(output, *kept)
            return output

    def scan(x, dt, a, b, c, d, gate, cu_seqlens, state, num_meta):
        return Keep.apply(x, x, dt, b, c, gate), x.new_zeros(1, x.shape[1], a.shape[1])

    monkeypatch.setattr(ops, "selective_scan", scan)
    monkeypatch.setattr(ops, "causal_conv1d", lambda x, *_: (Keep.apply(x, x), x.new_zeros(1, x.shape[1], 4)))
    monkeypatch.setattr(ops, "segment_attention", lambda q, k, v, *_, **__: Keep.apply(q.repeat(1, 1, 2), q, k, v))
    config = {**SMALL, "hidden_size": 320, "intermediate_size": 1024, "v_head_dim": 128, "num_memory_tokens": 0}
    tokens, model = 250, _model(config, device="cpu").train()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tokens in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for dtype, width in ((None, 4), (torch.bfloat16, 2)):
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None),
        ):
            output = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        layers = [activations(Geometry.of(config), layer) for layer in range(4)]
        counted = tokens * sum(4 * wide + width * narrow for wide, narrow in layers)
        assert counted == pytest.approx(sum(kept.values()), rel=0.1)
        del output


def test_the_default_targets_are_those_of_the_model():
    from hymba_tune.model.adapter import DEFAULT_TARGETS

    assert DORA_TARGETS == DEFAULT_TARGETS == tuple(Geometry.of(SMALL).projections(0))


def test_an_adapter_on_no_linear_module_is_refused():
    with pytest.raises(UserError, match="'conv1d' is no linear module of Hymba; use some of in_proj"):
        adapter_parameters(Geometry.of(SMALL), "dora", 4, ["conv1d"])


def _model(config, device="meta"):
    import torch

    from hymba_tune.model import HymbaConfig, HymbaForCausalLM

    with torch.device(device):
        return HymbaForCausalLM(HymbaConfig(**config))
