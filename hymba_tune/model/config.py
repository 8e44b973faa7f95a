"""HymbaConfig: the official configuration keys, and the facts about layers that follow from them.

The keys are those of the published `config.json`; nothing here or elsewhere in the project writes into a configuration
after it is made. What a layer is (producer or consumer of K/V, global or windowed, which branches it has) is a method.
"""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ATTENTION_BRANCH = ("h", "a")
SSM_BRANCH = ("h", "m")
# Keys of the published file that would bring remote code or a backend transformers does not know, or make a trainer
# look for the router of a mixture of experts.
_DROPPED_KEYS = (
    "auto_map",
    "attn_implementation",
    "attn_implementation_new",
    "output_router_logits",
    "router_aux_loss_coef",
)


@strict
class HymbaConfig(PreTrainedConfig):
    """Configuration of a Hymba model (arXiv 2411.13676, section 2).

    `layer_type` holds one letter a layer: 'h' hybrid, 'a' attention only, 'm' SSM only. `kv_reuse_group` lists groups
    of layers whose first member produces K/V for the rest. `sliding_window` W lets a query see itself and W earlier
    tokens; layers in `global_attn_idx` see everything. Lengths count tokens, sizes count features.

    Raises:
        ValueError: a key asks for something that no published Hymba has and this implementation does not compute.
        StrictDataclassError: a value has another type than its key.
    """

    model_type = "hymba"
    auto_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32001
    hidden_size: int = 1600
    intermediate_size: int = 5504
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int = 5
    attn_hidden_size: int = -1
    kq_head_dim: int = -1
    v_head_dim: int = 128
    kq_norm: str | None = "none"
    attention_dropout: float | int = 0.0
    sliding_window: int = 1024
    global_attn_idx: list[int] | None = None
    kv_reuse_group: list[list[int]] | None = None
    kv_reuse_every_i_layer: int = -1
    kv_weight_reuse: bool = False
    layer_type: list[str] | None = None
    num_memory_tokens: int = 128
    memory_tokens_interspersed_every: int = 0
    mamba_expand: int = 2
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_layernorms: bool = True
    num_mamba: int = 1
    num_experts: int = 1
    num_experts_per_tok: int = 1
    hidden_act: str = "silu"
    mlp_hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope: bool = True
    rope_theta: float | int = 10000.0
    rope_type: str | None = "ntk"
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int | None = 2048
    seq_length: int = 8192
    use_cache: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for key in _DROPPED_KEYS:
            kwargs.pop(key, None)
        if self.layer_type is None:
            self.layer_type = ["h"] * self.num_hidden_layers
        if self.global_attn_idx is None:
            self.global_attn_idx = []
        if self.kv_reuse_group is None:
            self.kv_reuse_group = []
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Refuse what is not computed, and layer lists that do not fit; transformers calls it again before saving."""
        computed: dict[str, tuple[Any, ...]] = {
            "num_experts": (1,),
            "num_mamba": (1,),
            "kq_norm": ("none", None),
            "kv_weight_reuse": (False,),
            "kv_reuse_every_i_layer": (-1,),
            "memory_tokens_interspersed_every": (0,),
            "mamba_inner_layernorms": (True,),
            "mamba_conv_bias": (True,),
            "mamba_proj_bias": (False,),
            "attention_dropout": (0, 0.0),
            "hidden_act": ("silu",),
            "mlp_hidden_act": ("silu",),
            "rope": (True,),
            "rope_type": ("ntk", "default", None),
        }
        for key, values in computed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"HymbaConfig.{key}={getattr(self, key)!r} is not computed here; use {values[0]!r}")
        if self.rope_type == "ntk" and not self.orig_max_position_embeddings:
            raise ValueError("HymbaConfig.rope_type='ntk' needs orig_max_position_embeddings; set it or rope_type=None")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"HymbaConfig.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if "h" in self._layer_letters() and self.value_size(self.num_attention_heads) != self.inner_size():
            raise ValueError(
                f"HymbaConfig.v_head_dim={self.v_head_dim}: heads * v_head_dim must equal mamba_expand * hidden_size = "
                f"{self.inner_size()} in hybrid layers, whose branches are averaged"
            )
        if self.sliding_window < 1:
            raise ValueError(f"HymbaConfig.sliding_window={self.sliding_window} must be 1 or more")
        self._validate_layers()

    def _validate_layers(self) -> None:
        letters = self._layer_letters()
        if len(letters) != self.num_hidden_layers or set(letters) - {"h", "a", "m"}:
            raise ValueError(
                f"HymbaConfig.layer_type={letters!r} must hold {self.num_hidden_layers} letters out of 'h', 'a', 'm'"
            )
        members = [layer for group in self.kv_reuse_group or [] for layer in group]
        if len(members) != len(set(members)):
            raise ValueError(f"HymbaConfig.kv_reuse_group={self.kv_reuse_group!r}: a layer stands in two groups")
        for layer in [*members, *(self.global_attn_idx or [])]:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"HymbaConfig names layer {layer} in kv_reuse_group or global_attn_idx; "
                    f"layers are 0 to {self.num_hidden_layers - 1}"
                )
        for group in self.kv_reuse_group or []:
            if group != sorted(group) or any(letters[layer] == "m" for layer in group):
                raise ValueError(
                    f"HymbaConfig.kv_reuse_group has {group!r}: a producer comes before its consumers, and all of them "
                    "have attention"
                )

    def _layer_letters(self) -> list[str]:
        return list(self.layer_type or [])

    def has_attention(self, layer: int) -> bool:
        return self._layer_letters()[layer] in ATTENTION_BRANCH

    def has_ssm(self, layer: int) -> bool:
        return self._layer_letters()[layer] in SSM_BRANCH

    def is_global(self, layer: int) -> bool:
        return layer in (self.global_attn_idx or [])

    def window(self, layer: int) -> int | None:
        """W of a windowed layer, None for a global one."""
        return None if self.is_global(layer) else self.sliding_window

    def cache_window(self, producer: int) -> int | None:
        """How many past tokens' K/V a producer must keep: W, or None for all if it or a consumer of its is global."""
        group = [i for i in range(self.num_hidden_layers) if self.kv_producer(i) == producer]
        return None if any(self.is_global(layer) for layer in group) else self.sliding_window

    def sees_all(self, producer: int) -> bool:
        """Whether every layer that attends with a producer's K/V is global."""
        group = (i for i in range(self.num_hidden_layers) if self.kv_producer(i) == producer)
        return all(self.is_global(layer) for layer in group)

    def kv_producer(self, layer: int) -> int:
        """The layer whose K/V this one attends with: itself unless it is a consumer."""
        for group in self.kv_reuse_group or []:
            if layer in group:
                return group[0]
        return layer

    def is_kv_producer(self, layer: int) -> bool:
        return self.has_attention(layer) and self.kv_producer(layer) == layer

    def inner_size(self) -> int:
        """Channels of the SSM branch."""
        return self.mamba_expand * self.hidden_size

    def head_dim(self) -> int:
        """Features of one query or key head."""
        if self.kq_head_dim > 0:
            return self.kq_head_dim
        width = self.attn_hidden_size if self.attn_hidden_size > 0 else self.hidden_size
        return width // self.num_attention_heads

    def value_head_dim(self) -> int:
        return self.v_head_dim if self.v_head_dim > 0 else self.head_dim()

    def value_size(self, heads: int) -> int:
        return heads * self.value_head_dim()

    def rope_base(self) -> float:
        """RoPE base; `ntk` scales it once: base * (2 max/orig - 1)^(d/(d-2))."""
        if self.rope_type != "ntk":
            return float(self.rope_theta)
        dim = self.head_dim()
        factor = 2 * self.max_position_embeddings / (self.orig_max_position_embeddings or 1) - 1
        return float(self.rope_theta * factor ** (dim / (dim - 2)))
