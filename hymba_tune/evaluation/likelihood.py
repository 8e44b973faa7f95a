"""Batched log-likelihood of continuations: one row serves all continuations that differ in their last token only."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hymba_tune.errors import UserError
from hymba_tune.evaluation.generate import batches_by_budget, left_padded

Likelihood = tuple[float, bool]
"""(sum of the continuation's log-probabilities in nats, whether greedy decoding would produce it)"""

LOGIT_ROWS = 4096
"""Most positions whose logits are held at once (0.5 GB in float32 at 32,001 words)."""


def loglikelihood_as_finished(
    model: Any,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 65_536,
    max_length: int | None = None,
) -> Iterator[tuple[int, Likelihood]]:
    """Yields (index of the request, its likelihood) for requests (context ids, continuation ids), as batches finish.

    A request longer than the model's length (or `max_length`) loses its leftmost context tokens, as in lm-eval.

    Raises UserError for a request without context or continuation, or a continuation longer than the model.
    """
    length = max_length or model.config.max_position_embeddings
    groups: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for index, (context, continuation) in enumerate(requests):
        row = _row(index, context, continuation, length)
        groups[row, len(continuation)].append(index)
    rows = list(groups)
    for batch in _batches(rows, batch_tokens):
        scores = _score_batch(model, [rows[i][0] for i in batch], max(rows[i][1] for i in batch))
        for logprobs, i in zip(scores, batch, strict=True):
            for index in groups[rows[i]]:
                yield index, _likelihood(logprobs, requests[index][1])


def _row(index: int, context: Sequence[int], continuation: Sequence[int], length: int) -> tuple[int, ...]:
    """The tokens to run: context and continuation but its last token, cut on the left."""
    if not context or not continuation:
        raise UserError(f"request {index}: an empty {'context' if not context else 'continuation'} has no likelihood")
    if len(continuation) > length:
        raise UserError(f"request {index}: a continuation of {len(continuation)} tokens exceeds the length {length}")
    return tuple([*context, *continuation][-(length + 1) : -1])


def _batches(rows: Sequence[tuple[tuple[int, ...], int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches within the token budget and within LOGIT_ROWS."""
    for batch in batches_by_budget([row for row, _ in rows], [0] * len(rows), batch_tokens):
        taken: list[int] = []
        for i in batch:
            if taken and (len(taken) + 1) * max(rows[j][1] for j in [*taken, i]) > LOGIT_ROWS:
                yield taken
                taken = []
            taken.append(i)
        yield taken


@torch.inference_mode()
def _score_batch(model: Any, rows: Sequence[Sequence[int]], kept: int) -> torch.Tensor:
    """Log-probabilities (B, kept, V) in float32 at the last `kept` positions of every row."""
    input_ids, mask = left_padded(rows, pad_id=0, device=model.device)
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=kept,
    )
    return torch.log_softmax(output.logits.float(), dim=-1)


def _likelihood(logprobs: torch.Tensor, continuation: Sequence[int]) -> Likelihood:
    """logprobs (kept, V): its last rows predict the continuation."""
    tokens = torch.tensor(continuation, device=logprobs.device)
    predicted = logprobs[-len(continuation) :]
    total = predicted.gather(1, tokens[:, None]).sum()
    return float(total), bool((predicted.argmax(-1) == tokens).all())
