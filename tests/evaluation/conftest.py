"""A character tokenizer and a tiny random Llama: generation is tested apart from the project's own model and data."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hymba_tune.model import HymbaConfig, HymbaForCausalLM

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = "▁\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?#$+-*/=()[]{}<>\"'_|`\\"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'].strip() + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, bytes for the rest, spaces as in Llama's tokenizer, special tokens 0 to 2."""
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + list(LETTERS)
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama(character_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights with a spread wide enough for varied text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(character_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.6,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_hymba(character_tokenizer: PreTrainedTokenizerFast) -> HymbaForCausalLM:
    """All of Hymba's parts at a random start: meta tokens, a consumer of shared K/V, global and windowed layers."""
    torch.manual_seed(0)
    config = HymbaConfig(
        vocab_size=len(character_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        v_head_dim=16,
        num_memory_tokens=4,
        sliding_window=16,
        global_attn_idx=[0, 3],
        kv_reuse_group=[[1, 2]],
        mamba_d_state=4,
        max_position_embeddings=2048,
        seq_length=2048,
        initializer_range=0.4,
    )
    return HymbaForCausalLM(config).eval()
