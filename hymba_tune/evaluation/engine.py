"""A model ready to answer: prompts as its chat template writes them, batches, cached answers, counted work."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hymba_tune.data.chat import render_prompt
from hymba_tune.evaluation.cache import (
    AnswerCache,
    answer_key,
    model_fingerprint,
    text_fingerprint,
    tokenizer_fingerprint,
)
from hymba_tune.evaluation.generate import (
    WHOLE,
    FinishReason,
    Progress,
    Share,
    end_of_sequence_ids,
    generate_as_finished,
)
from hymba_tune.evaluation.likelihood import Likelihood, loglikelihood_as_finished

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """A generated answer as results keep it."""

    text: str
    new_tokens: int
    finish_reason: FinishReason
    dropped_prompt_tokens: int


@dataclass
class Work:
    """What was really computed, by all processes (cached answers cost nothing); seconds on the clock."""

    seconds: float = 0.0
    new_tokens: int = 0


@dataclass
class Engine:
    """One model, its tokenizer, its limits and its cache.

    max_new_tokens: a cap on every task's own limit (a model that does not stop), or None.
    max_length: longest prompt plus answer; default the model's `max_position_embeddings`.
    share: this process' part, where several answer side by side. The first waits for the others' answers; in the
        others these are blank, and so their scores mean nothing.
    """

    model: Any
    tokenizer: Any
    cache: AnswerCache = field(default_factory=lambda: AnswerCache(None))
    batch_tokens: int = 65_536
    max_new_tokens: int | None = None
    max_length: int | None = None
    progress: Progress | None = None
    share: Share = WHOLE
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        self.model.eval()
        self.length: int = self.max_length or self.model.config.max_position_embeddings
        self.model_id = model_fingerprint(self.model)
        self.tokenizer_id = tokenizer_fingerprint(self.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def settings(self) -> dict[str, Any]:
        """What, of all this, decides an answer."""
        return {
            "model": self.model_id,
            "tokenizer": self.tokenizer_id,
            "chat_template": text_fingerprint(self.tokenizer.chat_template) if self.has_chat_template else None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_length": self.length,
            "max_new_tokens_cap": self.max_new_tokens,
            "decoding": "greedy",
        }

    def encode_chat(self, messages: Messages, tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Prompt ids up to the assistant's turn; plain text, a line a message, where the tokenizer has no template."""
        return self.render_chat(messages, tools)[1]

    def render_chat(self, messages: Messages, tools: Sequence[dict[str, Any]] | None = None) -> tuple[str, list[int]]:
        """The prompt's text, and its ids as of encode_chat."""
        if self.has_chat_template:
            return render_prompt(self.tokenizer, list(messages), list(tools) if tools else None)
        text = "\n".join(message["content"] or "" for message in messages) + "\n"
        return text, self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, no BOS (the benchmarks' protocol)."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def limit(self, new_tokens: int) -> int:
        """A task's own limit under the cap."""
        return new_tokens if self.max_new_tokens is None else min(new_tokens, self.max_new_tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: Sequence[int], stop: Sequence[str] = ()
    ) -> list[Answer]:
        """Greedy answers in order; each computed once for this model, prompt, limit and stop strings."""
        eos = sorted(end_of_sequence_ids(self.model, self.tokenizer))
        keys = [
            self._key("generate", prompt, {"max_new_tokens": limit, "stop": list(stop), "eos": eos})
            for prompt, limit in zip(prompts, max_new_tokens, strict=True)
        ]

        def compute(missing: list[int]) -> Iterator[tuple[int, Any]]:
            for position, found in generate_as_finished(
                self.model,
                self.tokenizer,
                [prompts[i] for i in missing],
                max_new_tokens=[max_new_tokens[i] for i in missing],
                stop=stop,
                batch_tokens=self.batch_tokens,
                max_length=self.length,
                share=self.share,
            ):
                answer = Answer(found.text, len(found.token_ids), found.finish_reason, found.dropped_prompt_tokens)
                yield position, asdict(answer)

        return [Answer(**value) for value in self._once(keys, compute, asdict(Answer("", 0, "eos", 0)))]

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Likelihoods of (context, continuation) in order; each computed once for this model."""
        keys = [self._key("loglikelihood", [*context, -1, *tokens], {}) for context, tokens in requests]

        def compute(missing: list[int]) -> Iterator[tuple[int, Any]]:
            return loglikelihood_as_finished(
                self.model,
                [requests[i] for i in missing],
                batch_tokens=self.batch_tokens,
                max_length=self.length,
                share=self.share,
            )

        return [(total, greedy) for total, greedy in self._once(keys, compute, (0.0, False))]

    def _key(self, kind: str, tokens: Sequence[int], settings: dict[str, Any]) -> str:
        return answer_key(kind, self.model_id, self.tokenizer_id, tokens, settings | {"length": self.length})

    def _once(
        self, keys: Sequence[str], compute: Callable[[list[int]], Iterator[tuple[int, Any]]], blank: Any
    ) -> list[Any]:
        """Each key's value; `compute` gets the indices of those without one, yields (position among them, value).

        Of several processes the first waits for the others'; in these, `blank` stands for what others answer.
        """
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        missing = [index for key, index in first.items() if self.cache.get(key) is None]
        done = len(first) - len(missing)
        start = time.perf_counter()
        for position, value in compute(missing) if missing else ():
            self.cache.put(keys[missing[position]], value)
            done += self.share[1]  # the others are about as far
            if self.progress is not None:
                self.progress(min(done, len(first)), len(first))
        if self.share[0]:
            return [blank if (value := self.cache.get(key)) is None else value for key in keys]
        for found in self.cache.all_of(list(first)):
            if self.progress is not None and len(found) > done:
                self.progress(len(found), len(first))
        self.work.seconds += time.perf_counter() - start
        self.work.new_tokens += sum(_new_tokens(found[keys[index]]) for index in missing)
        return [found[key] for key in keys]


def _new_tokens(value: Any) -> int:
    """Of a generated answer as the cache keeps it; a likelihood has none."""
    return int(value["new_tokens"]) if isinstance(value, dict) else 0
