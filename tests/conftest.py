"""Fixtures that several parts' tests share."""

import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts jobs in the background deaf to Ctrl-C, and what tests start and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of HYMBA_TUNE_DATA with the real tokenizer, oracle arrays and data files; skips where it is unset."""
    folder = os.environ.get("HYMBA_TUNE_DATA")
    if not folder:
        pytest.skip("HYMBA_TUNE_DATA is not set: this test reads the real tokenizer, oracle or data files")
    path = Path(folder)
    assert path.is_dir(), f"HYMBA_TUNE_DATA={folder} is not a folder"
    return path


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level BPE tokenizer of a few hundred tokens with our chat template; no file is read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from hymba_tune.data.chat import CHAT_TEMPLATE

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["<extra_id_1>User\nHow many?\n<extra_id_1>Assistant\nThe answer is 12."] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
