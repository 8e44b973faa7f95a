"""Hymba (arXiv 2411.13676, section 2) on the stream: hybrid heads, meta tokens, cross-layer K/V.

    HybridHeadMixer  attention and SSM heads side by side on the same input
    DecoderLayer     mixer, then MLP, each with a residual
    HymbaModel       meta tokens + embeddings -> layers -> final norm
    HymbaForCausalLM and the tied head

Modules and parameters carry the official checkpoint's names. Shapes: T tokens of the stream (meta tokens included),
C hidden size, H query heads, Hkv K/V heads, d/dv features of a key/value head, Dn channels and N state size of the SSM,
R rank of dt, K conv width, B rows, L slots a row, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hymba_tune.model import ops
from hymba_tune.model.beside import beside
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.config import HymbaConfig
from hymba_tune.model.loss import chunked_cross_entropy
from hymba_tune.model.norm import RMSNorm, mean_of_norms
from hymba_tune.model.stream import Stream, packed_to_stream, restarts, rows_to_stream


class DtProjection(nn.Linear):
    """Linear (.., R) -> (.., Dn) float32: the product runs in the input's dtype, the bias is added in float32.

    softplus sits at small values, where a bias rounded to bfloat16 would make dt 30 times less exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.weight.to(x.dtype))
        wide = torch.promote_types(product.dtype, torch.float32)
        # One pass: the sum is wide because the bias is.
        return product + self.bias.to(wide)


class HybridHeadMixer(nn.Module):
    """Attention heads and SSM heads read the same projection; their normed outputs are averaged (section 2.1).

    A consumer layer projects no K/V: it attends with its producer's. Attention-only and SSM-only layers ('a', 'm')
    are the same module with one branch.
    """

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.producer = config.kv_producer(layer)
        self.window = config.window(layer)
        self.head_dim, self.value_head_dim = config.head_dim(), config.value_head_dim()
        self.has_attention, self.has_ssm = config.has_attention(layer), config.has_ssm(layer)
        inner, heads, kv_heads = config.inner_size(), config.num_attention_heads, config.num_key_value_heads
        produced = kv_heads if config.is_kv_producer(layer) else 0
        self.sizes = [heads * self.head_dim, produced * self.head_dim, produced * self.value_head_dim]
        self.sizes = self.sizes if self.has_attention else [0, 0, 0]
        self.sizes += [inner, inner] if self.has_ssm else [0, 0]
        width = inner if self.has_ssm else config.value_size(heads)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        if self.has_attention:
            self.pre_avg_layernorm1 = RMSNorm(width, config.rms_norm_eps)
        if self.has_ssm:
            self.pre_avg_layernorm2 = RMSNorm(width, config.rms_norm_eps)
            self._add_ssm(config, inner)

    def _add_ssm(self, config: HymbaConfig, inner: int) -> None:
        rank, state, kernel = int(config.mamba_dt_rank), config.mamba_d_state, config.mamba_d_conv
        self.dt_rank, self.state_size = rank, state
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1, bias=config.mamba_conv_bias)
        self.x_proj = nn.ModuleList([nn.Linear(inner, rank + 2 * state, bias=False)])
        self.dt_proj = nn.ModuleList([DtProjection(rank, inner)])
        self.A_log = nn.ParameterList([torch.log(torch.arange(1.0, state + 1).expand(inner, state).contiguous())])
        self.D = nn.ParameterList([torch.ones(inner)])
        self.dt_layernorm = RMSNorm(rank, config.rms_norm_eps)
        self.B_layernorm = RMSNorm(state, config.rms_norm_eps)
        self.C_layernorm = RMSNorm(state, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        shared_k: Tensor | None,
        shared_v: Tensor | None,
        stream: Stream,
        rope: tuple[Tensor, Tensor],
        cache: HymbaCache | None,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden (T, C); the producer's shared_k (T, Hkv, d), shared_v (T, Hkv, dv) -> output (T, C), the K/V used.

        With `asked` (Q,), places in the stream of a prompt, the output is of these alone, (Q, C).
        """
        q, k, v, x, gate = self.in_proj(hidden).split(self.sizes, dim=-1)
        attended = scanned = join = None
        if self.has_ssm:
            with beside(hidden) as join:
                scanned = self._ssm(x, gate, stream, cache)
        if self.has_attention:
            q = _rotate(_of(asked, q).unflatten(-1, (-1, self.head_dim)), (_of(asked, rope[0]), _of(asked, rope[1])))
            if self.producer == self.layer:
                shared_k = _rotate(k.unflatten(-1, (-1, self.head_dim)), rope)
                # A copy: a view would keep the whole projection alive for as long as the consumers need V.
                shared_v = v.unflatten(-1, (-1, self.value_head_dim)).contiguous()
            assert shared_k is not None
            assert shared_v is not None
            attended = self._attend(q, shared_k, shared_v, stream, cache, asked).flatten(1)
        if join is not None:
            join()
        scanned = None if scanned is None else _of(asked, scanned)
        return self.out_proj(self._mix(attended, scanned)), shared_k, shared_v

    def _mix(self, attended: Tensor | None, scanned: Tensor | None) -> Tensor:
        """The mean of the normed branches (T, Dn), or the only one's norm."""
        if scanned is None:
            assert attended is not None
            return self.pre_avg_layernorm1(attended)
        if attended is None:
            return self.pre_avg_layernorm2(scanned)
        return mean_of_norms(self.pre_avg_layernorm1, attended, self.pre_avg_layernorm2, scanned)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, stream: Stream, cache: HymbaCache | None, asked: Tensor | None
    ) -> Tensor:
        """-> (T, H, dv), or (Q, H, dv)"""
        if cache is not None and cache.is_initialized:
            return cache.attend(self.producer, q, k, v, stream, self.window)
        meta = stream.num_meta
        queries = None if asked is None else asked - meta
        return ops.segment_attention(q, k, v, stream.cu_seqlens, window=self.window, num_meta=meta, queries=queries)

    def _ssm(self, x: Tensor, gate: Tensor, stream: Stream, cache: HymbaCache | None) -> Tensor:
        """(T, Dn), (T, Dn) -> (T, Dn): the meta tokens first, then every document from the state they left."""
        conv_state, scan_state = self._past(cache)
        if cache is not None and cache.steps_in_place(stream):
            return self._step(x, gate, conv_state, scan_state)
        y, conv_state, scan_state = self._scan(x, gate, stream, conv_state, scan_state)
        if cache is not None:
            cache.set_states(self.layer, conv_state, scan_state)
        return y

    def _past(self, cache: HymbaCache | None) -> tuple[Tensor | None, Tensor | None]:
        states = cache.states(self.layer) if cache is not None and cache.is_initialized else None
        return (None, None) if states is None else states

    def _scan(
        self, x: Tensor, gate: Tensor, stream: Stream, conv_state: Tensor | None, scan_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Conv, selection and scan -> y (T, Dn), and of each document conv state (Dn, K) and scan state (Dn, N)."""
        assert self.conv1d.bias is not None
        ends, meta = stream.cu_seqlens, stream.num_meta
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x, conv_state = ops.causal_conv1d(x, weight, bias, ends, conv_state, meta)
        dt, b, c = self._selection(x)
        a = -torch.exp(self.A_log[0].to(dt.dtype))
        y, scan_state = ops.selective_scan(x, dt, a, b, c, self.D[0].to(dt.dtype), gate, ends, scan_state, meta)
        return y, conv_state, scan_state

    def _step(self, x: Tensor, gate: Tensor, conv_state: Tensor | None, scan_state: Tensor | None) -> Tensor:
        """As _scan for one token a row, T = B; the states change in place."""
        assert conv_state is not None
        assert scan_state is not None
        steps = ops.steps(x.device)
        x = steps.conv_step(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state)
        dt, b, c = self._selection(x)
        y: Tensor = steps.scan_step(x, dt, self.A_log[0], b, c, self.D[0], gate, scan_state)
        return y

    def _selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan makes of each token: (T, Dn) -> dt (T, Dn) float32, B and C (T, N)."""
        dt, b, c = self.x_proj[0](x).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        return self.dt_proj[0](self.dt_layernorm(dt)), self.B_layernorm(b), self.C_layernorm(c)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), (T, C) -> (T, C)."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        kernels = ops.elementwise(x.device)
        return self.down_proj(F.silu(gate) * up if kernels is None else kernels.swiglu(gate, up))


class SingleExpert(nn.Module):
    """The official model keeps its MLP as the only expert of a mixture; this holds the name `moe.experts.0`."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([MLP(config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


class DecoderLayer(GradientCheckpointingLayer):
    """Mixer and MLP, each after a norm and with a residual.

    Hidden states and shared K/V are positional, so that both kinds of gradient checkpointing see their gradients.
    """

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.mamba = HybridHeadMixer(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = SingleExpert(config)
        self.pre_moe_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        shared_k: Tensor | None,
        shared_v: Tensor | None,
        *,
        stream: Stream,
        rope: tuple[Tensor, Tensor],
        cache: HymbaCache | None = None,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mixed, k, v = self.mamba(self.input_layernorm(hidden), shared_k, shared_v, stream, rope, cache, asked)
        hidden = _of(asked, hidden) + mixed
        return hidden + self.moe(self.pre_moe_layernorm(hidden)), k, v


class HymbaPreTrainedModel(PreTrainedModel):
    config_class = HymbaConfig
    config: HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]  # type: ignore[misc]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]  # type: ignore[misc]
    # The scan's decay rates and skip are exponentiated or summed over thousands of steps: never below float32.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["A_log", "D"]  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, DtProjection):
            init.normal_(module.weight, std=std)
            init.copy_(module.bias, _dt_bias(module.out_features))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, HybridHeadMixer) and module.has_ssm:
            states = torch.arange(1.0, module.state_size + 1).expand_as(module.A_log[0])
            init.copy_(module.A_log[0], torch.log(states))
            init.ones_(module.D[0])
        elif isinstance(module, HymbaModel):
            init.normal_(module.memory_tokens, std=std)


class HymbaModel(HymbaPreTrainedModel):
    """Hidden states of real tokens; the meta tokens are prepended once a forward and never leave it."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        # No padding_idx: the official pad id differs between config and tokenizer, and padding never enters a layer.
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        last_slots: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The backbone.

        Args:
            input_ids: (B, L), or inputs_embeds: (B, L, C).
            attention_mask: (B, cached slots + L), nonzero at tokens: it alone decides what is padding.
            position_ids: (B, L) without meta tokens; marks documents where there is neither mask nor cache.
            past_key_values: a HymbaCache, empty or to be continued.
            use_cache: fill a cache (made here if none is passed).
            seq_idx: (B, L), cu_seq_lens_q, cu_seq_lens_k: (documents + 1,): packed documents. max_length_q and _k are
                implied by them.
            last_slots: how many slots at each row's end are asked for; None is all. Where a prompt is read without
                gradients, the last layer then computes nothing else but what the cache needs.

        Returns:
            last_hidden_state (B, L or last_slots, C), zeros at padding; past_key_values; hidden_states if asked for.

        Raises:
            ValueError: inputs contradict each other, or a cache is to be filled by packed rows or under gradient
                checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True: attention weights are never formed as a whole; leave it out")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        wants_cache = use_cache if use_cache is not None else self.config.use_cache
        cache = past_key_values
        if cache is None and wants_cache and not self.training:
            cache = HymbaCache(self.config)
        shape, packing = (embeds.shape[0], embeds.shape[1]), (seq_idx, cu_seq_lens_q, cu_seq_lens_k)
        if cache is None:
            stream = packed_to_stream(
                shape, self.config.num_memory_tokens, attention_mask, position_ids, *packing, device=embeds.device
            )
        else:
            stream = self._cached_stream(shape, attention_mask, position_ids, packing, cache, embeds.device)
        hidden = stream.flatten(embeds)
        if stream.num_meta:
            hidden = torch.cat([self.memory_tokens.to(hidden.dtype), hidden])
        shown, asked = stream, None
        continues = cache is not None and cache.is_initialized
        if last_slots is not None and not (continues or output_hidden_states or torch.is_grad_enabled()):
            shown, asked = stream.last(last_slots)
        recorded = self._run_layers(hidden, stream, cache, bool(output_hidden_states), asked)
        states = self.final_layernorm(recorded[-1])
        last = shown.unflatten(states[stream.num_meta :] if asked is None else states)
        hidden_states = None
        if output_hidden_states:
            inner = [stream.unflatten(states[stream.num_meta :]) for states in recorded[:-1]]
            hidden_states = (*inner, last)
        last = last if last_slots is None else last[:, -last_slots:]
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache, hidden_states=hidden_states)

    def _cached_stream(
        self,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        packing: tuple[Tensor | None, ...],
        cache: HymbaCache,
        device: torch.device,
    ) -> Stream:
        packed = any(field is not None for field in packing)
        if position_ids is not None and attention_mask is None:
            packed |= bool(restarts(position_ids, shape)[:, 1:].any())
        if packed:
            raise ValueError("rows of packed documents can't fill a cache: pass use_cache=False")
        if self.gradient_checkpointing and self.training:
            raise ValueError("gradient checkpointing would fill the cache twice: pass use_cache=False")
        meta = self.config.num_memory_tokens
        return rows_to_stream(
            shape, meta, attention_mask, position_ids, cache.lengths, cache.get_seq_length(), device=device
        )

    def _run_layers(
        self, hidden: Tensor, stream: Stream, cache: HymbaCache | None, record: bool, asked: Tensor | None = None
    ) -> list[Tensor]:
        """-> [.., output of the last layer (at `asked` places)]; `record`: preceded by the input of every layer."""
        rope = _rope_table(stream.rope_ids, self.config, hidden.dtype)
        produced: dict[int, tuple[Tensor, Tensor]] = {}
        recorded = []
        for i, layer in enumerate(self.layers):
            if record:
                recorded.append(hidden)
            shared_k, shared_v = produced.get(self.config.kv_producer(i), (None, None))
            last = {} if asked is None or i + 1 < len(self.layers) else {"asked": asked}
            hidden, k, v = layer(hidden, shared_k, shared_v, stream=stream, rope=rope, cache=cache, **last)
            if self.config.is_kv_producer(i):
                produced[i] = (k, v)
        if cache is not None:
            cache.append(stream, produced)
        return [*recorded, hidden]


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    """Hymba with its language-model head, tied to the embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {  # type: ignore[misc]
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # config.use_cache is about forwards, where a cache must be asked for; generation is to have one.
        self.generation_config.use_cache = True

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As HymbaModel.forward, then logits.

        Args:
            labels: (B, L), -100 where nothing is scored; the token at slot t + 1 is scored by the logits at slot t,
                so a packed row's collator puts -100 at the first token of each document.
            logits_to_keep: the last n slots, or a tensor of slots; 0 keeps all.

        Returns:
            loss: mean cross-entropy (over `num_items_in_batch` if the Trainer passes it), 0 where nothing is scored;
            logits (B, kept, V), None while training with labels: the loss never holds the logits of a whole batch.
        """
        only_last = labels is None and isinstance(logits_to_keep, int) and logits_to_keep > 0
        last = {"last_slots": logits_to_keep} if only_last else {}
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **last, **kwargs
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = chunked_cross_entropy(hidden[:, :-1], self.lm_head, labels[:, 1:], kwargs.get("num_items_in_batch"))
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Let `generate` use a HymbaCache planned for its whole length, unless it was given one or told not to."""
        given, kind = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        if given is not None and not isinstance(given, HymbaCache):
            raise ValueError(f"past_key_values is a {type(given).__name__}; Hymba continues a HymbaCache")
        if kind is not None:
            raise ValueError(f"cache_implementation={kind!r}: Hymba has a cache of its own; leave it out")
        if given is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = HymbaCache(self.config, max_length=max_cache_length)


def _rope_table(rope_ids: Tensor, config: HymbaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, d) of the positions, in float32 at least."""
    dim, wide = config.head_dim(), torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=rope_ids.device, dtype=wide) / dim
    angles = rope_ids.to(wide)[:, None] * (config.rope_base() ** -exponents)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _of(asked: Tensor | None, x: Tensor) -> Tensor:
    """The rows of x that are asked for: all without a choice."""
    return x if asked is None else x[asked]


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on (T, heads, d): the halves of each head are the pairs."""
    cos, sin = rope
    kernels = ops.elementwise(x.device)
    if kernels is not None:
        rotated: Tensor = kernels.rotate(x, cos, sin)
        return rotated
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _dt_bias(size: int) -> Tensor:
    """softplus^-1 of steps drawn log-uniformly from 0.001 to 0.1 (Mamba, arXiv 2312.00752, section 3.6)."""
    steps = torch.exp(torch.rand(size) * math.log(0.1 / 0.001) + math.log(0.001))
    return steps + torch.log(-torch.expm1(-steps))
