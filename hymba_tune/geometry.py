"""A Hymba in numbers, from the keys of its config.json alone: projections, parameters, adapters, activations.

Letters: C hidden size, V vocabulary, M meta tokens, I width of the MLP, H/Hkv query and K/V heads, d/dv features of a
key/value head, Dn channels and N states of the SSM, R rank of dt, K width of the conv. Nothing is loaded or imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hymba_tune.errors import UserError

CONFIG: dict[str, Any] = {
    "vocab_size": 32001,
    "hidden_size": 1600,
    "intermediate_size": 5504,
    "num_hidden_layers": 32,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "attn_hidden_size": -1,
    "kq_head_dim": -1,
    "v_head_dim": 128,
    "kq_norm": "none",
    "attention_dropout": 0.0,
    "sliding_window": 1024,
    "global_attn_idx": None,
    "kv_reuse_group": None,
    "kv_reuse_every_i_layer": -1,
    "kv_weight_reuse": False,
    "layer_type": None,
    "num_memory_tokens": 128,
    "memory_tokens_interspersed_every": 0,
    "mamba_expand": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": "auto",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_inner_layernorms": True,
    "num_mamba": 1,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "hidden_act": "silu",
    "mlp_hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope": True,
    "rope_theta": 10000.0,
    "rope_type": "ntk",
    "max_position_embeddings": 8192,
    "orig_max_position_embeddings": 2048,
    "seq_length": 8192,
    "use_cache": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""HymbaConfig's keys and defaults (a test keeps them equal): what `model.config` may hold."""

LEFTOVERS = {
    "architectures",
    "attn_implementation",
    "attn_implementation_new",
    "auto_map",
    "calc_logits_for_entire_prompt",
    "conv_dim",
    "dtype",
    "model_type",
    "output_router_logits",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_mamba_kernels",
}
"""Keys of published and saved config.json files that say nothing about the model's function."""

_PAIRS_1_5B = [[i, i + 1] for i in (1, 3, 5, 7, 9, 11, 13)] + [[16, 17, 18]] + [[i, i + 1] for i in range(19, 30, 2)]
_CONFIG_1_5B = {**CONFIG, "kv_reuse_group": _PAIRS_1_5B}
PUBLISHED = {"nvidia/Hymba-1.5B-Base": _CONFIG_1_5B, "nvidia/Hymba-1.5B-Instruct": _CONFIG_1_5B}
"""Configurations of published checkpoints, so that a plan needs no hub."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model; `letters` and `producers` say of each layer which branches it has and if it makes K/V."""

    vocab: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    inner: int
    state: int
    conv: int
    conv_bias: bool
    rank: int
    meta: int
    tied: bool
    letters: tuple[str, ...]
    producers: tuple[bool, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Geometry:
        """From config.json's keys; missing ones take HymbaConfig's defaults."""
        c = {**CONFIG, **config}
        count = c["num_hidden_layers"]
        width = c["attn_hidden_size"] if c["attn_hidden_size"] > 0 else c["hidden_size"]
        head_dim = c["kq_head_dim"] if c["kq_head_dim"] > 0 else width // c["num_attention_heads"]
        consumers = {layer for group in c["kv_reuse_group"] or [] for layer in group[1:]}
        rank = c["mamba_dt_rank"]
        return cls(
            vocab=c["vocab_size"],
            hidden=c["hidden_size"],
            mlp=c["intermediate_size"],
            heads=c["num_attention_heads"],
            kv_heads=c["num_key_value_heads"],
            head_dim=head_dim,
            value_head_dim=c["v_head_dim"] if c["v_head_dim"] > 0 else head_dim,
            inner=c["mamba_expand"] * c["hidden_size"],
            state=c["mamba_d_state"],
            conv=c["mamba_d_conv"],
            conv_bias=bool(c["mamba_conv_bias"]),
            rank=math.ceil(c["hidden_size"] / 16) if rank == "auto" else rank,
            meta=c["num_memory_tokens"],
            tied=bool(c["tie_word_embeddings"]),
            letters=tuple(c["layer_type"] or "h" * count),
            producers=tuple(layer not in consumers for layer in range(count)),
        )

    def mixer_width(self, layer: int) -> int:
        """Columns of a layer's out_proj: Dn, or H*dv without an SSM."""
        return self.heads * self.value_head_dim if self.letters[layer] == "a" else self.inner

    def attention_rows(self, layer: int) -> int:
        """Rows of in_proj for q, k, v: H*d + Hkv*(d + dv), consumers H*d."""
        if self.letters[layer] == "m":
            return 0
        made = self.kv_heads * (self.head_dim + self.value_head_dim) if self.producers[layer] else 0
        return self.heads * self.head_dim + made

    def projections(self, layer: int) -> dict[str, tuple[int, int]]:
        """(in, out) features of each linear module of a layer, under the name an adapter targets it by."""
        ssm = self.letters[layer] != "a"
        rows = self.attention_rows(layer) + (2 * self.inner if ssm else 0)
        of_ssm = {"x_proj.0": (self.inner, self.rank + 2 * self.state), "dt_proj.0": (self.rank, self.inner)}
        return {
            "in_proj": (self.hidden, rows),
            "out_proj": (self.mixer_width(layer), self.hidden),
            **(of_ssm if ssm else {}),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }


def parameters(g: Geometry) -> dict[str, int]:
    """Parameters by part; the tied head counts once.

    A layer: attention C (H d + Hkv (d + dv)), SSM 2 C Dn + Dn (K + 1) + 2 Dn (R + N) + Dn (N + 2) + R + 2 N,
    fusion Dn C + Dn a branch, MLP 3 C I, norms 2 C (and C at the end).
    Once: embedding V C (twice if untied), meta tokens M C.
    """
    ssm_layers = [layer for layer, letter in enumerate(g.letters) if letter != "a"]
    in_ssm = (
        2 * g.hidden * g.inner
        + g.inner * (g.conv + g.conv_bias)
        + g.inner * (g.rank + 2 * g.state)
        + g.rank * g.inner
        + g.inner * (2 + g.state)
        + g.rank
        + 2 * g.state
    )
    layers = range(len(g.letters))
    branches = [2 if g.letters[layer] == "h" else 1 for layer in layers]
    return {
        "embedding": g.vocab * g.hidden * (1 if g.tied else 2),
        "meta tokens": g.meta * g.hidden,
        "attention": sum(g.hidden * g.attention_rows(layer) for layer in layers),
        "SSM": in_ssm * len(ssm_layers),
        "fusion": sum(g.mixer_width(layer) * (g.hidden + branches[layer]) for layer in layers),
        "MLP": 3 * g.hidden * g.mlp * len(g.letters),
        "norms": (2 * len(g.letters) + 1) * g.hidden,
    }


def adapter_parameters(g: Geometry, kind: str, r: int, targets: Iterable[str]) -> int:
    """Trained parameters of an adapter: r (in + out) for each adapted module, and with DoRA one magnitude a row.

    Raises UserError for a target that no layer has.
    """
    count = 0
    for target in targets:
        shapes = [
            shape for layer in range(len(g.letters)) for name, shape in g.projections(layer).items() if name == target
        ]
        if not shapes:
            known = ", ".join(g.projections(0))
            raise UserError(f"adapter.targets: {target!r} is no linear module of Hymba; use some of {known}")
        count += sum(r * (wide + tall) + (tall if kind == "dora" else 0) for wide, tall in shapes)
    return count


def activations(g: Geometry, layer: int) -> tuple[int, int]:
    """Numbers that one token leaves in one layer for the backward pass: (always float32, in the compute dtype).

    float32: input of both norms (2 C), dt after its projection (Dn). Compute dtype: output of both norms (2 C); output
    of in_proj; q and k rotated, output of attention (H dv) and of the scan (Dn), which their norms keep; output of the
    conv, of x_proj and the mean of the branches; gate, silu(gate), up and their product in the MLP (4 I).
    What is recomputed (scan states, attention probabilities) is not kept.
    """
    letter, width = g.letters[layer], g.mixer_width(layer)
    wide, narrow = 2 * g.hidden, 2 * g.hidden + width + 4 * g.mlp
    if letter != "m":
        made = g.kv_heads * g.head_dim if g.producers[layer] else 0
        narrow += g.attention_rows(layer) + g.heads * g.head_dim + made + g.heads * g.value_head_dim
    if letter != "a":
        wide += width
        narrow += 3 * g.inner + width + g.rank + 2 * g.state
    return wide, narrow
