"""Batched log-likelihood of continuations: what requests share is computed once.

Continuations that differ in their last token only (the letters of a question) share one row. Rows that begin alike (the
questions of an MMLU subject after their shots) share the cache of their common beginning.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from hymba_tune.errors import UserError
from hymba_tune.evaluation.beginning import FEWEST_ROWS, SHORTEST, cache_after, common
from hymba_tune.evaluation.generate import WHOLE, Share, batches_by_budget, behind, left_padded, shared
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.prefix_cache import PrefixCache

Likelihood = tuple[float, bool]
"""(sum of the continuation's log-probabilities in nats, whether greedy decoding would produce it)"""

LOGIT_ROWS = 4096
"""Most positions whose logits are held at once (0.5 GB in float32 at 32,001 words)."""

Row = tuple[int, ...]


@dataclass
class _Family:
    """Rows that begin with the same `prefix` tokens; indices into the rows."""

    prefix: int
    rows: list[int] = field(default_factory=list)


def loglikelihood_as_finished(
    model: Any,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 65_536,
    max_length: int | None = None,
    share: Share = WHOLE,
) -> Iterator[tuple[int, Likelihood]]:
    """Yields (index of the request, its likelihood) for requests (context ids, continuation ids), as batches finish.

    Of several processes each does its `share` of the batches.
    A request longer than the model's length (or `max_length`) loses its leftmost context tokens, as in lm-eval.

    Raises UserError for a request without context or continuation, or a continuation longer than the model.
    """
    length = max_length or model.config.max_position_embeddings
    groups: dict[tuple[Row, int], list[int]] = defaultdict(list)
    for index, (context, continuation) in enumerate(requests):
        row = _row(index, context, continuation, length)
        groups[row, len(continuation)].append(index)
    keys = list(groups)
    rows, kept = [row for row, _ in keys], [count for _, count in keys]
    for family, batches in _planned(rows, kept, batch_tokens, share):
        cache = cache_after(model, rows[family.rows[0]][: family.prefix]) if family.prefix else None
        for batch in batches:
            rests = [rows[i][family.prefix :] for i in batch]
            scores = _score_batch(model, rests, max(kept[i] for i in batch), family.prefix, cache)
            for logprobs, i in zip(scores, batch, strict=True):
                for index in groups[keys[i]]:
                    yield index, _likelihood(logprobs, requests[index][1])


def _planned(
    rows: Sequence[Row], kept: Sequence[int], batch_tokens: int, share: Share
) -> list[tuple[_Family, list[list[int]]]]:
    """The families with this process' batches of each, without those that have none."""
    families = _families(rows, kept)
    every = [
        (number, batch) for number, one in enumerate(families) for batch in _batches(one.rows, rows, kept, batch_tokens)
    ]
    mine: dict[int, list[list[int]]] = defaultdict(list)
    for number, batch in shared(every, share):
        mine[number].append(batch)
    return [(families[number], batches) for number, batches in mine.items()]


def _row(index: int, context: Sequence[int], continuation: Sequence[int], length: int) -> Row:
    """The tokens to run: context and continuation but its last token, cut on the left."""
    if not context or not continuation:
        raise UserError(f"request {index}: an empty {'context' if not context else 'continuation'} has no likelihood")
    if len(continuation) > length:
        raise UserError(f"request {index}: a continuation of {len(continuation)} tokens exceeds the length {length}")
    return tuple([*context, *continuation][-(length + 1) : -1])


def _families(rows: Sequence[Row], kept: Sequence[int]) -> list[_Family]:
    """Rows by common beginnings worth computing once; all others in a family without a prefix.

    A prefix ends before the first position whose logits are needed.
    """
    families: list[_Family] = []
    for index in sorted(range(len(rows)), key=rows.__getitem__):
        usable = len(rows[index]) - kept[index]
        if families:
            family = families[-1]
            prefix = min(common(rows[family.rows[0]], rows[index]), usable, family.prefix)
            if prefix >= max(SHORTEST, family.prefix // 2):
                family.rows.append(index)
                family.prefix = prefix
                continue
        families.append(_Family(usable, [index]))
    shared = [family for family in families if len(family.rows) >= FEWEST_ROWS]
    rest = [index for family in families if len(family.rows) < FEWEST_ROWS for index in family.rows]
    return [*shared, _Family(0, rest)] if rest else shared


def _batches(family: Sequence[int], rows: Sequence[Row], kept: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """A family's rows in batches within the token budget and within LOGIT_ROWS."""
    for batch in batches_by_budget([rows[i] for i in family], [0] * len(family), batch_tokens):
        taken: list[int] = []
        for i in (family[position] for position in batch):
            if taken and (len(taken) + 1) * max(kept[j] for j in [*taken, i]) > LOGIT_ROWS:
                yield taken
                taken = []
            taken.append(i)
        yield taken


def _for_rows(cache: Any, rows: int) -> Any:
    """The cache of a prefix, for so many rows to continue; it stays as it is."""
    if isinstance(cache, HymbaCache):
        return PrefixCache.of(cache, rows)
    copy = deepcopy(cache)
    copy.batch_repeat_interleave(rows)
    return copy


@torch.inference_mode()
def _score_batch(model: Any, rows: Sequence[Row], kept: int, prefix: int, cache: Any) -> torch.Tensor:
    """Log-probabilities (B, kept, V), float32, at the last `kept` positions of rows that continue `cache` (or None)."""
    input_ids, mask = left_padded(rows, pad_id=0, device=model.device)
    positions = prefix + (mask.cumsum(1) - 1).clamp(min=0)
    if cache is not None:
        cache = _for_rows(cache, len(rows))
        mask = behind(prefix, mask)
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept,
    )
    return torch.log_softmax(output.logits.float(), dim=-1)


def _likelihood(logprobs: torch.Tensor, continuation: Sequence[int]) -> Likelihood:
    """logprobs (kept, V): its last rows predict the continuation."""
    tokens = torch.tensor(continuation, device=logprobs.device)
    predicted = logprobs[-len(continuation) :]
    total = predicted.gather(1, tokens[:, None]).sum()
    return float(total), bool((predicted.argmax(-1) == tokens).all())
