"""Talk to a model: in a terminal, answers appear token by token; in a pipe, each line of standard input is a prompt.

    hymba-tune chat runs/sft1
    printf 'What is 2 + 2?\\nAnd 3 more?\\n' | hymba-tune chat runs/sft1 > answers.txt

What the model says is data: control characters are written out before they reach the terminal, and a tool call is
shown, never made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from hymba_tune.data.chat import load_tokenizer, prompt_ids
from hymba_tune.errors import UserError
from hymba_tune.evaluation.generate import end_of_sequence_ids
from hymba_tune.model import HymbaCache
from hymba_tune.report.text import visible
from hymba_tune.weights import find_weights, load_weights

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt and forget the conversation; without TEXT, none
/tool TEXT     give the result of a tool call
/exit          leave (or Ctrl-D); Ctrl-C stops an answer
A line that begins with // is sent with one of them."""

_TOOL_CALL = re.compile(r"<toolcall>(.*?)</toolcall>", re.DOTALL)
_OPENING = "<toolcall>"

Write = Callable[[str], Any]


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature 0: always the likeliest token; top_k 0: from all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        chosen: dict[str, Any] = {"do_sample": self.temperature > 0, "repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return chosen


class Conversation:
    """The messages so far, and the cache of what the model has read of them."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        sampling: Sampling | None = None,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.tools = model, tokenizer, sampling or Sampling(), tools
        self.reset(system)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)

    def reset(self, system: str | None) -> None:
        """Forget everything but a system prompt."""
        self.system = system
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._forget()

    def _forget(self) -> None:
        self._cache, self._read = HymbaCache(self.model.config), list[int]()

    def answer(self, role: str, text: str, write: Write, keep_interrupted: bool = True) -> str:
        """The reply to a message of `role` (user or tool); its text goes to `write` as it comes.

        keep_interrupted: an answer that Ctrl-C stops stays in the conversation as far as it came; else Ctrl-C goes on.

        Raises:
            UserError: the conversation does not fit the model; the message is not kept.
        """
        asked = [*self.messages, {"role": role, "content": text}]
        ids = prompt_ids(self.tokenizer, asked, self.tools)
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise UserError(f"the conversation has {len(ids)} tokens, more than the model takes; /reset begins anew")
        if not self._read or ids[: len(self._read)] != self._read:
            self._forget()
        stream = _Stream(self.tokenizer, write)
        try:
            self._generate(ids, min(room, self.sampling.max_new_tokens), stream)
        except KeyboardInterrupt:
            if not keep_interrupted:
                raise
            self._forget()
            stream.end()
        self.messages = [*asked, {"role": "assistant", "content": stream.text}]
        return stream.text

    def _generate(self, ids: list[int], limit: int, stream: _Stream) -> None:
        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=self._cache,
            streamer=stream,
            max_new_tokens=limit,
            eos_token_id=sorted(end_of_sequence_ids(self.model, self.tokenizer)),
            pad_token_id=self.tokenizer.eos_token_id,
            **self.sampling.arguments(),
        )
        self._read = output[0, : self._cache.get_seq_length()].tolist()


class _Stream(BaseStreamer):
    """Token ids as `generate` finds them -> text, as soon as its characters are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Write) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.text = ""
        self._ids: list[int] = []
        self._shown, self._context = 0, 0
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        self._emit(last=False)

    def end(self) -> None:
        self._emit(last=True)

    def _emit(self, last: bool) -> None:
        """Decode the new ids behind some that were shown already: what a token reads as depends on the one before."""
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return
        self._context, self._shown = self._shown, len(self._ids)
        if len(now) > len(before):
            self.text += now[len(before) :]
            self.write(now[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Display:
    """Text of an answer as it comes -> the terminal: harmless, and tool calls as calls."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self._held = ""

    def feed(self, text: str) -> None:
        """Show what can be shown; a tool call is held back until it is whole."""
        self._held += text
        while match := _TOOL_CALL.search(self._held):
            self.write(visible(self._held[: match.start()]) + shown_call(match[1]))
            self._held = self._held[match.end() :]
        start = _opening(self._held)
        self.write(visible(self._held[:start]))
        self._held = self._held[start:]

    def close(self) -> None:
        """Show what is still held back, and end the line."""
        self.write(visible(self._held) + "\n")
        self._held = ""


def _opening(text: str) -> int:
    """Where the opening of a tool call, or the beginning of one, stands in `text`; its length if nowhere."""
    found = text.find(_OPENING)
    if found >= 0:
        return found
    return next(
        (len(text) - size for size in range(len(_OPENING) - 1, 0, -1) if text.endswith(_OPENING[:size])), len(text)
    )


def shown_call(text: str) -> str:
    """`→ name(argument=value)` of the JSON in a tool call; the text itself where it is none."""
    try:
        call = json.loads(text)
        arguments = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in dict(call["arguments"]).items()
        )
        return visible(f"→ {call['name']}({arguments})")
    except (ValueError, KeyError, TypeError, RecursionError):
        return visible(f"→ no valid call: {text.strip()}")


def read_tools(file: Path) -> list[dict[str, Any]]:
    """Tool definitions from a JSON file: a list of objects with a name, bare or under `function`.

    Raises:
        UserError: the file is not there, or holds something else.
    """
    try:
        tools = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--tools: {file}: {error}; give a JSON file with a list of tool definitions") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _name(tool) for tool in tools):
        raise UserError(f'--tools: {file}: not a list of tool definitions, as in [{{"name": ..., "parameters": ...}}]')
    return tools


def _name(tool: dict[str, Any]) -> str | None:
    inner = tool.get("function")
    name = (inner if isinstance(inner, dict) else tool).get("name")
    return name if isinstance(name, str) and name else None


def chat(name: str, sampling: Sampling, system: str | None = None, tools: Path | None = None) -> None:
    """Talk to the weights called `name` until standard input ends.

    Raises:
        UserError: the weights or the tools can't be used.
    """
    definitions = read_tools(tools) if tools is not None else None
    weights = find_weights(name)
    tokenizer = load_tokenizer(weights.tokenizer, saved_template=True)
    on_gpu = torch.cuda.is_available()
    model = load_weights(weights, "cuda" if on_gpu else "cpu").eval()
    conversation = Conversation(model, tokenizer, sampling, system, definitions)
    if definitions:
        print("tools:", visible(", ".join(str(_name(tool)) for tool in definitions)), file=sys.stderr)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print("/help lists the commands, /exit or Ctrl-D leaves", file=sys.stderr)
    talk(conversation, _typed() if at_terminal else _piped(), interactive=at_terminal)


def _typed() -> Iterator[str]:
    """Lines from a terminal, with editing and history; Ctrl-C empties the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines once it is there)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)


def _piped() -> Iterator[str]:
    """Lines of standard input that are not empty."""
    return (line.rstrip("\r\n") for line in sys.stdin if line.strip())


def talk(conversation: Conversation, lines: Iterator[str], interactive: bool) -> None:
    """Answer every line on standard output; notes go to standard error.

    Where nobody sits at a terminal Ctrl-C ends the program, as everybody expects of a pipe.
    """
    for line in lines:
        if line.startswith("/") and not line.startswith("//"):
            if not _command(conversation, line.strip(), interactive):
                return
        elif line.strip():
            _reply(conversation, "user", line.removeprefix("/"), interactive)


def _command(conversation: Conversation, line: str, interactive: bool) -> bool:
    """Do what a line with a slash says; False if it says to leave."""
    command, _, text = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset(conversation.system)
    elif command == "/system":
        conversation.reset(text.strip() or None)
    elif command == "/tool":
        _reply(conversation, "tool", text, interactive)
    elif command == "/help":
        print(HELP, file=sys.stderr)
    else:
        print(f"{visible(command)} is no command; /help lists them, // sends a line with a slash", file=sys.stderr)
    return True


def _reply(conversation: Conversation, role: str, text: str, interactive: bool) -> None:
    display = Display(_print)
    try:
        conversation.answer(role, text, display.feed, keep_interrupted=interactive)
    except UserError as error:
        print(error, file=sys.stderr)
        return
    except KeyboardInterrupt:  # before the first token
        if not interactive:
            raise
    display.close()


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
