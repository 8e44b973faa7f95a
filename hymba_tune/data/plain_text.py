"""A source's row -> a document of plain text, and its tokens: what a model is pretrained on.

a document          <s> a b c d e </s>
its labels           .  a b c d e </s>          . is -100: no loss on <s>, which nothing comes before

max_length 4, too_long: split
pieces              <s> a b c     c d e </s>    each begins with the last token of the piece before, without loss,
their labels         .  a b c     . d e </s>    so that every token is learned once
"""

from collections.abc import Callable, Iterator

from transformers import PreTrainedTokenizerFast

from hymba_tune.data.chat import Document
from hymba_tune.data.formats import BadRow, Row, field
from hymba_tune.errors import UserError


def text(row: Row) -> Row:
    """`text`, as it stands."""
    value = field(row, "text")
    if not isinstance(value, str):
        raise BadRow(f"text: {type(value).__name__}, not a text")
    if not value.strip():
        raise BadRow("text: nothing but white space")
    return {"text": value}


TEXTS: dict[str, Callable[[Row], Row]] = {"text": text}


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> Document:
    """`<s> text </s>`; special tokens in the text are the plain characters they are."""
    if tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no bos_token to begin documents with; set it in tokenizer_config.json")
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return Document([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], [0, *[1] * (len(ids) + 1)])


def pieces(document: Document, max_length: int) -> Iterator[Document]:
    """A document in pieces of at most `max_length` tokens (2 or more), which overlap by one token."""
    yield Document(document.input_ids[:max_length], document.loss_mask[:max_length])
    for start in range(max_length - 1, len(document.input_ids) - 1, max_length - 1):
        stop = start + max_length
        yield Document(document.input_ids[start:stop], [0, *document.loss_mask[start + 1 : stop]])
