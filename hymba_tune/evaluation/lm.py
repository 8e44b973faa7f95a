"""Our model as lm-eval's model class: its requests go to the engine, its chats to our encoding of chats."""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hymba_tune.errors import UserError
from hymba_tune.evaluation.engine import Answer, Engine

DEFAULT_NEW_TOKENS = 256
"""lm-eval's own default for tasks that name no limit."""


class HymbaLM(TemplateLM):
    """lm-eval's LM over an Engine: greedy generation and log-likelihood, many at a time.

    lm-eval hands prompts around as text. A chat's text is kept only as the name of its messages, which are encoded from
    the messages themselves: a control token that a user typed stays text.
    """

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.answers: dict[str, Answer] = {}
        """What was generated, by the prompt's text."""
        self._chats: dict[str, list[int]] = {}
        self._encode = lru_cache(maxsize=8)(engine.encode_text)  # a question's choices come one after the other

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text; its ids are remembered under that text."""
        if not add_generation_prompt:
            begun: str = self.tokenizer.apply_chat_template(chat_history, tokenize=False, continue_final_message=True)
            return begun
        text, ids = self.engine.render_chat(chat_history)
        self._chats[text] = ids
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a chat that `apply_chat_template` wrote, or of plain text; never a BOS."""
        return self._chats.get(string) or self.engine.encode_text(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's rule (blanks at the end of the context belong to the continuation) on text.

        A chat whose ids are not those of its text (a control token was typed in it) is scored after the chat's own ids.
        """
        alone = self._encode(context)
        chat = self._chats.get(context, alone)
        start = self._encode(context.rstrip()) if chat == alone else alone
        rest = self.engine.encode_text(context + continuation)[len(start) :]
        return (start if chat == alone else chat), rest

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As TemplateLM's; the caller has its own progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; requests with the same stop strings are generated together."""
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[_stop_strings(request.args[1])].append(index)
        texts: dict[int, str] = {}
        for stop, indices in groups.items():
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            limits = [self._limit(requests[i].args[1], len(ids)) for i, ids in zip(indices, prompts, strict=True)]
            for i, answer in zip(indices, self.engine.generate(prompts, max_new_tokens=limits, stop=stop), strict=True):
                texts[i] = answer.text
                self.answers[requests[i].args[0]] = answer
        return [texts[index] for index in range(len(requests))]

    def _limit(self, settings: dict[str, Any], prompt_tokens: int) -> int:
        """New tokens a request may have. `max_length` bounds prompt and answer together, as in transformers."""
        if "max_length" not in settings:
            return self.engine.limit(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)))
        total = min(int(settings["max_length"]), self.engine.length)
        return self.engine.limit(max(total - prompt_tokens, min(DEFAULT_NEW_TOKENS, total // 2)))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.engine.loglikelihood([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in lm-eval's windows of the model's length that predict each token once."""
        windows: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.engine.length,
                context_len=1,
            )
            disjoint = [make_disjoint_window(piece) for piece in pieces]
            windows += disjoint
            owner += [index] * len(disjoint)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owner, self.engine.loglikelihood(windows), strict=True):
            totals[index] += logprob
        return totals


def _stop_strings(settings: dict[str, Any]) -> tuple[str, ...]:
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise UserError(f"generation_kwargs: {settings} asks for sampling; hymba-tune evaluates greedily, so drop it")
    until = settings.get("until") or []
    return tuple([until] if isinstance(until, str) else until)
