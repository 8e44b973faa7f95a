"""Tiny Hymbas for the proofs: every part of the architecture stands in one of the configurations, every parameter is
random, everything runs in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hymba_tune.model import HymbaConfig, HymbaForCausalLM

VOCABULARY = 41
# Two float64 computations of the same function in another order of sums.
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-9}

# Short enough that a document of a dozen tokens crosses it several times.
WINDOW = 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 12,
    "mamba_d_state": 4,
    "sliding_window": WINDOW,
    "rope_type": None,
}
_FIVE_HEADS: dict[str, Any] = {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 1, "v_head_dim": 8}
_FOUR_HEADS: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "v_head_dim": 8}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "odd_heads_ntk": {
        **_FIVE_HEADS,
        "num_hidden_layers": 5,
        "num_memory_tokens": 5,
        "global_attn_idx": [0, 4],
        "kv_reuse_group": [[1, 2, 3]],
        "rope_type": "ntk",
        "max_position_embeddings": 64,
        "orig_max_position_embeddings": 16,
    },
    "first_layer_windowed_two_groups": {
        **_FOUR_HEADS,
        "num_hidden_layers": 6,
        "num_memory_tokens": 3,
        "global_attn_idx": [5],
        "kv_reuse_group": [[0, 1], [2, 3, 4]],
        "mamba_d_conv": 3,
    },
    "groups_of_global_and_windowed": {
        **_FOUR_HEADS,
        "num_hidden_layers": 4,
        "num_memory_tokens": 2,
        "global_attn_idx": [1, 2],
        "kv_reuse_group": [[0, 1], [2, 3]],
    },
    "attention_and_ssm_only_layers": {
        **_FOUR_HEADS,
        "num_hidden_layers": 5,
        "num_memory_tokens": 4,
        "layer_type": ["m", "a", "h", "m", "a"],
        "global_attn_idx": [4],
        "kv_reuse_group": [[1, 2]],
    },
    "no_meta_tokens": {
        **_FOUR_HEADS,
        "num_hidden_layers": 3,
        "num_memory_tokens": 0,
        "global_attn_idx": [0],
        "kv_reuse_group": [[1, 2]],
    },
}


def tiny_config(name: str = "odd_heads_ntk", **changes: Any) -> HymbaConfig:
    return HymbaConfig(**{**_COMMON, **CONFIGURATIONS[name], **changes})


def random_model(config: HymbaConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> HymbaForCausalLM:
    """A model in evaluation mode whose every parameter is random, none at its initial value."""
    model = HymbaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = _scaled(name, values).to(dtype)
    return model


def _scaled(name: str, values: Tensor) -> Tensor:
    """Sizes at which every part matters: projections keep the variance, norms vary about 1, dt about 0.3."""
    if "layernorm" in name:
        return 1 + 0.3 * values
    if "A_log" in name:
        return 0.5 * values
    if name.endswith("dt_proj.0.bias"):
        return values - 1
    if values.dim() < 2 or "memory_tokens" in name or "embed_tokens" in name:
        return values
    return values / values[0].numel() ** 0.5


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids (*shape), none of them the pad id 0."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def random_documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """One (length,) tensor of ids for each length."""
    return list(random_ids(sum(lengths), seed=seed).split(lengths))


@torch.no_grad()
def logits_alone(model: HymbaForCausalLM, document: Tensor) -> Tensor:
    """(L, V) logits of a document (L,) in a batch of its own."""
    return model(document[None], use_cache=False).logits[0]


def generate(model: HymbaForCausalLM, ids: Tensor | None = None, **options: Any) -> Any:
    """`model.generate` without an end-of-sequence token: the tokens (B, L + new), or what `options` ask to return."""
    inputs = {} if ids is None else {"input_ids": ids}
    untyped: Any = model
    return untyped.generate(**inputs, **{"eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options})


def gradients(model: HymbaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of `loss` for every parameter that requires one (and has elements); fails if one gets none."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    found = {name: gradient.clone() for name, gradient in wanted.items() if gradient is not None}
    assert wanted.keys() == found.keys(), f"no gradient reached {sorted(wanted.keys() - found.keys())}"
    return found
