r"""Conversation -> Document: the chat format as token ids, with the loss mask of what the assistant says.

chat_template.jinja is the one description of the format; it is saved with every checkpoint, and this file only cuts
its text at the assistant's turns and encodes the pieces. Per turn:

    <extra_id_1>User\n{text}\n<extra_id_1>Assistant\n   prompt: no loss
    {text}</s>                                           reply: loss, the end of turn included
    \n<extra_id_1>User\n...                              prompt of the next reply

Text of messages is data, whoever wrote it:

- Special tokens in it (`</s>`, `[PAD]`, ...) are encoded as the plain characters they are.
- Turn markers in it are broken, since they are made of ordinary tokens: one backslash goes in after the `<`, so
  `<extra_id_1>` becomes `<\extra_id_1>` and `<\extra_id_1>` becomes `<\\extra_id_1>`. Taking one backslash out again
  restores every text exactly. In the JSON of tools and tool calls the `<` is written `\u003c`, which JSON reads back.

Whoever renders the template without this file gets special tokens broken the same way (`<\/s>`), and for text without
special tokens the same ids.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from hymba_tune.errors import UserError

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Document:
    """One encoded conversation: token ids, and 1 for each token the loss falls on, else 0 (the same length)."""

    input_ids: list[int]
    loss_mask: list[int]


def load_tokenizer(path: str | Path, saved_template: bool = False) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder or hub id, with our chat template; `tokenizer.eos_token` ends every turn.

    saved_template: keep the chat template that was saved with it, if there is one.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"tokenizer {str(path)!r}: {reason}; name a folder that holds a tokenizer.json") from None
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer {str(path)!r} has no eos_token to end turns with; set it in tokenizer_config.json")
    if not (saved_template and isinstance(tokenizer.chat_template, str)):
        tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
) -> Document:
    """The whole conversation, as trained on. The `prompt_ids` before any reply are a prefix of its ids."""
    text, spans = _render(tokenizer, messages, tools, generation_prompt=False)
    if len(spans) != sum(message["role"] == "assistant" for message in messages):
        raise UserError("the tokenizer's chat template does not mark the replies; load it with load_tokenizer")
    return _encode_spans(tokenizer, text, spans)


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """The ids to generate a reply from: the messages, then the header of an assistant turn. No BOS."""
    return render_prompt(tokenizer, messages, tools)[1]


def render_prompt(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
) -> tuple[str, list[int]]:
    """The template's text of `prompt_ids`, and these."""
    text, spans = _render(tokenizer, messages, tools, generation_prompt=True)
    return text, _encode_spans(tokenizer, text, spans).input_ids


def _render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    generation_prompt: bool,
) -> tuple[str, list[Span]]:
    """The template's text and the character spans of its `{% generation %}` blocks (reply and end of turn)."""
    special: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        tools=list(tools) if tools else None,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=generation_prompt,
        split_special_tokens=True,
        **special,
    )
    (text,), (spans,) = rendered
    if not all(text.endswith(tokenizer.eos_token, *span) for span in spans):
        raise UserError("the tokenizer's chat template ends replies without eos_token; load it with load_tokenizer")
    return text, spans


def _encode_spans(tokenizer: PreTrainedTokenizerFast, text: str, spans: list[Span]) -> Document:
    ids: list[int] = []
    mask: list[int] = []
    position = 0
    for start, stop in spans:
        prompt, reply = text[position:start], text[start : stop - len(tokenizer.eos_token)]
        prompt_part = _encode(tokenizer, prompt, after_turn=position > 0)
        reply_part = _encode_reply(tokenizer, prompt, prompt_part, reply, after_turn=position > 0)
        ids += [*prompt_part, *reply_part, tokenizer.eos_token_id]
        mask += [0] * len(prompt_part) + [1] * (len(reply_part) + 1)
        position = stop
    if position < len(text):
        rest = _encode(tokenizer, text[position:], after_turn=position > 0)
        ids += rest
        mask += [0] * len(rest)
    return Document(ids, mask)


def _encode_reply(
    tokenizer: PreTrainedTokenizerFast, prompt: str, prompt_part: list[int], reply: str, after_turn: bool
) -> list[int]:
    """The reply's ids as they follow the prompt's: whatever a tokenizer merges, the prompt's own ids stay."""
    together = _encode(tokenizer, prompt + reply, after_turn)
    if together[: len(prompt_part)] == prompt_part:
        return together[len(prompt_part) :]
    return _encode(tokenizer, reply, after_turn=False)


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, after_turn: bool) -> list[int]:
    """Plain text to ids; `after_turn`: as it is encoded right after `</s>` (SentencePiece puts a space there)."""
    if _special_tokens(tokenizer).search(text):
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if after_turn:
        return tokenizer.encode(tokenizer.eos_token + text, add_special_tokens=False)[1:]
    return tokenizer.encode(text, add_special_tokens=False)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(special) or "(?!)")
