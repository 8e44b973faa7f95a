"""The embedded model: what `--tiny` runs on, shipped in embedded/, and the command that makes it again:

    python -m hymba_tune.tiny            (about 20 minutes on one core)

A tokenizer trained on the embedded data, and a Hymba of about a million parameters with all the parts of the large one,
pretrained on plain documents (data/synthetic/documents.py): it has met the words, the arithmetic and the shapes of code
and JSON, but no conversation, so that it answers nothing before fine-tuning.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_tune.data.synthetic import GENERATORS, raw_document

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from hymba_tune.model import HymbaConfig, HymbaForCausalLM

VOCABULARY = 1792
ROW_TOKENS = 2048
STEPS = 2500
PEAK_LEARNING_RATE, LAST_LEARNING_RATE = 4e-3, 1e-5
WARM_UP, DECAY = 0.01, 0.2
"""Shares of all steps (the paper's schedule: warm-up, stable, decay)."""

# What counts as a word for the tokenizer. Chat markers, and the structure of JSON around keys, may become one token:
# short sequences are cheap. Digits stay single, so that arithmetic sees them. A capitalised word never takes the space
# before it along: a name is the same token in prose, at the start of a line and in JSON, which makes it easy to copy.
_WORDS = "|".join(
    (
        r"\n*<extra_id_\d>[A-Z][a-z]+\n?",
        r"\s?</?tool(?:call)?>\s?",
        r'(?:[\]}",]*,? ?[{\[]*"[a-z_]+": ?[\[{]*)+"?',
        r" ?\p{L}+",
        r"_\p{L}+",
        r"\d",
        r" ?[^\s\p{L}\d]+",
        r"\n *",
        r"\s",
    )
)


def tiny_path() -> Path:
    """The folder that `model.from: tiny` stands for: config.json, model.safetensors, tokenizer files."""
    return Path(__file__).with_name("embedded")


def tiny_config(vocabulary: int = VOCABULARY) -> HymbaConfig:
    """Five hybrid layers: three global, two with a window of 32 tokens that share their K/V; 8 meta tokens."""
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
        max_position_embeddings=2048,
        orig_max_position_embeddings=512,
        seq_length=2048,
        pad_token_id=vocabulary - 1,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens trained on the embedded data; any text can be encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

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
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]"
    )


def _tokenizer_text() -> Iterator[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    from hymba_tune.data.chat import CHAT_TEMPLATE

    rng = random.Random("tokenizer")
    yield from (raw_document(rng) for _ in range(4000))
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    for generate in GENERATORS.values():
        for conversation in (generate(rng) for _ in range(1500)):
            rendered: Any = render_jinja_template(
                conversations=[conversation["messages"]],
                tools=conversation.get("tools"),
                chat_template=template,
                split_special_tokens=True,
                eos_token="</s>",
            )
            yield from rendered[0][0].split("</s>")


def pretrain(model: HymbaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 0) -> None:
    """Next-token training on plain documents, one row of about ROW_TOKENS tokens a step, AdamW, in place.

    Prints the mean loss of every hundredth of the run.
    """
    import torch

    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps))
    rows = _rows(tokenizer, random.Random(f"pretraining/{seed}"))
    began, losses, tokens = time.monotonic(), [], 0
    model.train()
    for step, (ids, labels, ends) in enumerate(itertools.islice(rows, steps), 1):
        loss = model(input_ids=ids, labels=labels, cu_seq_lens_q=ends).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        tokens += ids.numel()
        if step % max(steps // 100, 1) == 0:
            mean, seconds = sum(losses) / len(losses), time.monotonic() - began
            print(f"step {step}/{steps}  loss {mean:.4f}  {tokens:,} tokens  {seconds:.0f} s", flush=True)
            losses.clear()
    model.eval()


def _learning_rate(step: int, steps: int) -> float:
    warm_up, decay = max(int(WARM_UP * steps), 1), max(int(DECAY * steps), 1)
    rising, falling = (step + 1) / warm_up, (steps - step) / decay
    return (
        PEAK_LEARNING_RATE * min(rising, 1.0) if falling >= 1 else max(PEAK_LEARNING_RATE * falling, LAST_LEARNING_RATE)
    )


def _optimizer(model: HymbaForCausalLM) -> torch.optim.AdamW:
    """Weight decay on matrices alone: not on norms, biases, A_log, D or meta tokens."""
    import torch

    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and not any(part in name for part in ("A_log", "memory_tokens", "conv1d"))
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))


def _rows(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless rows of whole documents: ids (1, L); labels (1, L), `<s>` left out; boundaries (documents + 1,)."""
    import torch

    assert tokenizer.eos_token_id is not None
    while True:
        ids: list[int] = []
        ends = [0]
        while len(ids) < ROW_TOKENS:
            ids += [*tokenizer.encode(raw_document(rng)), tokenizer.eos_token_id]
            ends.append(len(ids))
        labels = torch.tensor([ids])
        labels[0, ends[:-1]] = -100
        yield torch.tensor([ids]), labels, torch.tensor(ends, dtype=torch.int32)


def make_base(out: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Make tokenizer and base anew and write them to a folder; the same seed gives the same files."""
    import torch

    from hymba_tune.model import HymbaForCausalLM
    from hymba_tune.model.precision import choose_matmul_precision

    choose_matmul_precision()
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = HymbaForCausalLM(tiny_config(len(tokenizer)))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    pretrain(model, tokenizer, steps, seed)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hymba_tune.tiny", description="Make the embedded model again.")
    parser.add_argument("--out", type=Path, default=tiny_path(), help="folder to write to (the shipped one)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_base(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
