"""Batched greedy generation: many prompts, one forward a token, the same answers as one prompt at a time.

Prompts are sorted by length and left-padded into batches that a token budget bounds. A row leaves its batch as it ends
(end of sequence, stop string or its token limit), so a slow row never holds the others up. Nothing runs for ever: a row
ends at its own token limit, and a limit is always finite. What all prompts of a batch begin with is computed once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

import torch

from hymba_tune.errors import UserError
from hymba_tune.evaluation.beginning import cache_after, shared_beginning
from hymba_tune.model.cache import HymbaCache
from hymba_tune.model.modeling import HymbaForCausalLM
from hymba_tune.model.static_cache import StaticDecoder

PREFILL_TOKENS, PREFILL_TOKENS_ON_CPU = 131_072, 4096
"""Prompts that a Hymba reads at a time: beyond, a CPU's caches no longer hold what passes between its operations."""

FinishReason = Literal["eos", "stop", "length"]
T = TypeVar("T")
Share = tuple[int, int]
"""(process, processes): which part of the work this process does."""
WHOLE: Share = (0, 1)
Progress = Callable[[int, int], None]
"""Called with (prompts finished, prompts in all) whenever a prompt finishes."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    text: what was generated up to the first stop string, special tokens left out.
    token_ids: every generated token, the end-of-sequence token excluded (a stop string's tokens are in it).
    dropped_prompt_tokens: tokens cut from the left of a prompt that did not fit the model's length.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    dropped_prompt_tokens: int = 0


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[str] = (),
    batch_tokens: int = 65_536,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Greedy answers to `prompts` (token ids), in their order; see `generate_as_finished` for the arguments."""
    answers: dict[int, Generation] = {}
    for index, answer in generate_as_finished(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_tokens=batch_tokens,
        max_length=max_length,
    ):
        answers[index] = answer
        if progress is not None:
            progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def generate_as_finished(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[str] = (),
    batch_tokens: int = 65_536,
    max_length: int | None = None,
    share: Share = WHOLE,
) -> Iterator[tuple[int, Generation]]:
    """Yields (index of the prompt, its answer) as soon as a prompt's answer is complete.

    max_new_tokens: one limit, or one a prompt.
    batch_tokens: most tokens of a batch, rows * (longest prompt + most new tokens); a single row may exceed it.
    max_length: longest prompt plus answer; default the model's `max_position_embeddings`. A prompt that leaves no room
        for its new tokens loses its leftmost tokens (lm-eval's rule) and says how many.
    share: only this process' prompts: of all, longest first, every n-th.

    Raises UserError for a prompt without tokens and for limits that cannot be met.
    """
    limits = _limits_per_prompt(max_new_tokens, len(prompts))
    length = max_length or model.config.max_position_embeddings
    fitted = [_fit(index, prompt, limits[index], length) for index, prompt in enumerate(prompts)]
    stops = StopStrings(tokenizer, stop)
    eos = end_of_sequence_ids(model, tokenizer)
    mine = list(shared(_longest_first(fitted), share))
    for places in batches_by_budget([fitted[i] for i in mine], [limits[i] for i in mine], batch_tokens):
        batch = [mine[place] for place in places]
        rows = _decode_batch(model, [fitted[i] for i in batch], [limits[i] for i in batch], stops, eos)
        for row, token_ids, reason in rows:
            index = batch[row]
            dropped = len(prompts[index]) - len(fitted[index])
            yield index, Generation(stops.trim(token_ids), token_ids, reason, dropped)


def shared(work: Iterable[T], share: Share) -> Iterator[T]:
    """This process' part of the work, every n-th piece."""
    process, processes = share
    return islice(work, process, None, processes)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def batches_by_budget(
    prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Indices, longest prompt first, in batches where rows * (longest prompt + most new tokens) <= `batch_tokens`."""
    batches: list[list[int]] = []
    widest = most_new = 0
    for index in _longest_first(prompts):
        widest, most_new = max(widest, len(prompts[index])), max(most_new, new_tokens[index])
        if batches and (len(batches[-1]) + 1) * (widest + most_new) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            widest, most_new = len(prompts[index]), new_tokens[index]
    return batches


def _longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))


class StopStrings:
    """Finds stop strings in growing answers without decoding a whole answer for each token."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        # A stop string of B bytes takes at most B visible tokens; one more in front keeps its leading space.
        self._window = max((len(stop.encode()) for stop in self._stops), default=0) + 1
        self._special = frozenset(tokenizer.all_special_ids)
        self._may_complete: dict[int, bool] = {}

    def found(self, token_ids: list[int]) -> bool:
        """Whether the newest of `token_ids` completes a stop string."""
        if not self._stops or not self._can_complete(token_ids[-1]):
            return False
        visible: list[int] = []
        for token in reversed(token_ids):
            if token not in self._special:
                visible.append(token)
                if len(visible) > self._window:
                    break
        tail = self._decode(visible[::-1])
        return any(stop in tail for stop in self._stops)

    def trim(self, token_ids: list[int]) -> str:
        """The text of `token_ids` up to the first stop string."""
        text = self._decode(token_ids)
        return text[: min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))]

    def _can_complete(self, token: int) -> bool:
        """Whether `token`'s own text can be the end of a stop string (a cheap test that rejects nearly all tokens)."""
        if token not in self._may_complete:
            piece = self._decode([token])
            # Nothing visible, or a part of a character, says nothing about what the token adds to its neighbours.
            unclear = not piece.strip() or "\N{REPLACEMENT CHARACTER}" in piece
            self._may_complete[token] = token not in self._special and (
                unclear or any(stop[-1].isspace() or stop[-1] in piece for stop in self._stops)
            )
        return self._may_complete[token]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both (B, longest), padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)


def behind(beginning: int, mask: torch.Tensor) -> torch.Tensor:
    """The mask (B, L) of what follows so many tokens that all rows begin with -> that of both."""
    return torch.cat([mask.new_ones(len(mask), beginning), mask], dim=1)


def _limits_per_prompt(max_new_tokens: int | Sequence[int], count: int) -> list[int]:
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != count:
        raise ValueError(f"max_new_tokens: {len(limits)} limits for {count} prompts")
    if any(limit < 1 for limit in limits):
        raise UserError(f"max_new_tokens: {min(limits)} is below 1; give at least one token an answer")
    return limits


def _fit(index: int, prompt: Sequence[int], limit: int, length: int) -> list[int]:
    """`prompt` without the leftmost tokens that do not fit beside `limit` new ones."""
    if not prompt:
        raise UserError(f"prompt {index} has no tokens; a model needs at least one to continue")
    room = length - limit
    if room < 1:
        raise UserError(
            f"max_new_tokens: {limit} leaves no room for a prompt within {length} tokens; give at most {length - 1}"
        )
    return list(prompt[-room:])


@torch.inference_mode()
def _decode_batch(
    model: Any, prompts: list[list[int]], limits: list[int], stops: StopStrings, eos: frozenset[int]
) -> Iterator[tuple[int, list[int], FinishReason]]:
    """Yields (row, generated ids, reason) as rows end."""
    decoder = _decoder(model, max(limits))
    beginning = shared_beginning(prompts)
    rests = [prompt[len(beginning) :] for prompt in prompts]
    chosen = decoder.prefill(beginning, *left_padded(rests, pad_id=0, device=model.device))
    alive = list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    while True:
        staying = []
        for slot, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            reason = _extend(answers[row], token, limits[row], stops, eos)
            if reason is None:
                staying.append(slot)
            else:
                yield row, answers[row], reason
        if not staying:
            return
        if len(staying) < len(alive):
            alive = [alive[slot] for slot in staying]
            kept = torch.tensor(staying, device=chosen.device)
            decoder.keep(kept)
            chosen = chosen[kept]
        chosen = decoder.step(chosen)


class _Decoder(Protocol):
    """Greedy tokens of a batch that shrinks."""

    def prefill(self, beginning: list[int], prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The tokens that all rows begin with, the rest of each (B, L), left-padded, its mask -> first tokens (B,)."""

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        """The last tokens (B,) -> the next ones (B,)."""

    def keep(self, kept: torch.Tensor) -> None:
        """Go on with these rows only."""


def _decoder(model: Any, new_tokens: int) -> _Decoder:
    if has_static_cache(model):
        return _Static(model, new_tokens)
    return _Hymba(model) if isinstance(model, HymbaForCausalLM) else _AnyModel(model)


class _AnyModel:
    """With the cache that the model makes itself."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def prefill(self, beginning: list[int], prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self._mask = behind(len(beginning), mask)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, len(beginning) :]
        if beginning:
            self._cache = cache_after(self._model, beginning)
            self._cache.batch_repeat_interleave(len(prompts))
        return self._forward(prompts)

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(chosen), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(chosen[:, None])

    def keep(self, kept: torch.Tensor) -> None:
        self._cache.batch_select_indices(kept)
        self._mask, self._positions = self._mask[kept], self._positions[kept]

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1].argmax(-1)


class _Hymba:
    """With a cache that grows. It knows the rows' lengths, so that a step needs no mask of all that is cached."""

    def __init__(self, model: HymbaForCausalLM) -> None:
        self._model = model

    def prefill(self, beginning: list[int], prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self._cache, chosen = read_after(self._model, beginning, prompts, mask)
        return chosen

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        return _greedy(self._model, chosen[:, None], None, self._cache)

    def keep(self, kept: torch.Tensor) -> None:
        self._cache.batch_select_indices(kept)


class _Static:
    """Hymba in fixed buffers: on a GPU a step is one CUDA graph."""

    def __init__(self, model: HymbaForCausalLM, new_tokens: int) -> None:
        self._model, self._new_tokens = model, new_tokens

    def prefill(self, beginning: list[int], prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = len(beginning) + prompts.shape[1] + self._new_tokens
        cache, chosen = read_after(self._model, beginning, prompts, mask, length)
        self._decoder = StaticDecoder(self._model, cache)
        return chosen

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        return self._decoder.step(chosen)

    def keep(self, kept: torch.Tensor) -> None:
        self._decoder.keep(kept)


def read_after(
    model: HymbaForCausalLM,
    beginning: list[int],
    prompts: torch.Tensor,
    mask: torch.Tensor,
    max_length: int | None = None,
) -> tuple[HymbaCache, torch.Tensor]:
    """What all rows begin with and the rest of each (B, L), left-padded -> the cache after them, first tokens (B,)."""
    if not beginning:
        return read_prompts(model, prompts, mask, max_length)
    cache = cache_after(model, beginning, HymbaCache(model.config, max_length))
    if max_length is None:
        cache.share(len(prompts))
    else:  # fixed buffers hold each row apart
        cache.batch_repeat_interleave(len(prompts))
    return cache, _greedy(model, prompts, behind(len(beginning), mask), cache)


def read_prompts(
    model: HymbaForCausalLM, prompts: torch.Tensor, mask: torch.Tensor, max_length: int | None = None
) -> tuple[HymbaCache, torch.Tensor]:
    """Left-padded prompts (B, L) and their mask -> the cache after them, and the first tokens (B,).

    A few rows at a time, longest first as they come: see PREFILL_TOKENS.
    """
    width, lengths = prompts.shape[1], mask.sum(1).tolist()
    most = PREFILL_TOKENS_ON_CPU if model.device.type == "cpu" else PREFILL_TOKENS
    parts, chosen, start = [], [], 0
    while start < len(prompts):
        rows = max(1, most // max(lengths[start:]))
        part = slice(start, start + rows)
        real = slice(width - max(lengths[part]), None)
        cache = HymbaCache(model.config, max_length)
        chosen.append(_greedy(model, prompts[part, real], mask[part, real], cache))
        parts.append(cache)
        start += rows
    return HymbaCache.joined(parts, width), torch.cat(chosen)


def _greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, cache: HymbaCache) -> torch.Tensor:
    """The likeliest next tokens (B,) of rows that continue a cache."""
    output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    chosen: torch.Tensor = output.logits[:, -1].argmax(-1)
    return chosen


def has_static_cache(model: Any) -> bool:
    """Whether answers are decoded in fixed buffers: a Hymba on a GPU."""
    return isinstance(model, HymbaForCausalLM) and model.device.type == "cuda"


def _extend(answer: list[int], token: int, limit: int, stops: StopStrings, eos: frozenset[int]) -> FinishReason | None:
    """Appends `token` to `answer` unless it ends the sequence; the reason if the answer is complete."""
    if token in eos:
        return "eos"
    answer.append(token)
    if stops.found(answer):
        return "stop"
    return "length" if len(answer) >= limit else None
