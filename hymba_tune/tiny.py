"""The embedded model: what `--tiny` runs on, shipped in embedded/. make_tiny.py makes it anew.

A tokenizer trained on the embedded data, and a Hymba of about a million parameters with all the parts of the large one,
pretrained on plain documents (data/synthetic/documents.py): it has met the words, the arithmetic and the shapes of code
and JSON, and can copy, but has seen no conversation, so that it answers nothing before fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_tune.data.synthetic import GENERATORS, functions, raw_document, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hymba_tune.model import HymbaConfig

VOCABULARY = 2048

# Words that are copied from prose into code, JSON and lists, besides those that begin with a capital letter.
_COPIED = (
    *(words.THINGS + words.CONTAINERS + words.PLACES + words.ROOMS + words.DEVICES + words.FOODS + words.ANIMALS),
    *(words.COLORS + functions.FUNCTION_NAMES + functions.PARAMETER_NAMES),
    *("on", "off", "dollars", "euros", "pounds", "yen", "francs", "pesos"),
)
_COPIED_WORD = rf"(?:(?:{'|'.join(sorted(_COPIED))})\b|\p{{Lu}})"

# What counts as a word for the tokenizer. Chat markers, and the structure of JSON around keys, may become one token:
# short sequences are cheap. Digits stay single, so that arithmetic sees them. A space belongs to the word after it, but
# for copied words to what stands before: they are the same token everywhere, which makes them easy to copy.
_WORDS = "|".join(
    (
        r"\n*<extra_id_\d>[A-Z][a-z]+\n?",
        r"\s?</?tool(?:call)?>\s?",
        r'(?:[\]}",]*,? ?[{\[]*"[a-z_]+": ?[\[{]*)+"?',
        rf"(?={_COPIED_WORD})\p{{L}}+",
        rf" (?={_COPIED_WORD})",
        rf" ?\p{{L}}+(?: (?={_COPIED_WORD}))?",
        r"_\p{L}+",
        r"\d",
        rf" ?[^\s\p{{L}}\d]+(?: (?={_COPIED_WORD}))?",
        r"\n *",
        r"\s",
    )
)


def tiny_path() -> Path:
    """The folder that `model.from: tiny` stands for: config.json, model.safetensors, tokenizer files."""
    return Path(__file__).with_name("embedded")


def tiny_config(vocabulary: int = VOCABULARY) -> HymbaConfig:
    """Five hybrid layers: three global, two with a window of 32 tokens that share their K/V; 8 meta tokens.

    Wide initial weights and slow rotations let heads of 24 features learn to copy soon: on rows of nothing but copying,
    64 % of the tokens were right after 400 steps; with 0.02 and 1e4 only what all lines have in common, 39 %.
    """
    from hymba_tune.model import HymbaConfig

    return HymbaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        v_head_dim=48,
        sliding_window=32,
        global_attn_idx=[0, 3, 4],
        kv_reuse_group=[[1, 2]],
        num_memory_tokens=8,
        mamba_d_state=8,
        mamba_dt_rank=8,
        rope_theta=1e6,
        initializer_range=0.1,
        max_position_embeddings=2048,
        orig_max_position_embeddings=512,
        seq_length=2048,
        pad_token_id=vocabulary - 1,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens trained on the embedded data; any text can be encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from hymba_tune.data.chat import CHAT_TEMPLATE

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_tokenizer_text(), trainer)
    backend.add_special_tokens(["[PAD]"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )


def _tokenizer_text() -> Iterator[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    from hymba_tune.data.chat import CHAT_TEMPLATE

    rng = random.Random("tokenizer")
    yield from (raw_document(rng) for _ in range(4000))
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    for generate in GENERATORS.values():
        for conversation in (generate(rng) for _ in range(1000)):
            rendered: Any = render_jinja_template(
                conversations=[messages_of(conversation)],
                tools=conversation.get("tools"),
                chat_template=template,
                split_special_tokens=True,
                eos_token="</s>",
            )
            yield from rendered[0][0].split("</s>")


def messages_of(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a preference pair: the prompt with both replies, one after the other."""
    if "messages" in conversation:
        return conversation["messages"]
    return [*conversation["prompt"], *conversation["chosen"], *conversation["rejected"]]
