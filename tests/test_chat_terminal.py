"""Chat at a terminal: a pseudo-terminal in place of the user's, and what is typed into it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.model.models import random_model, tiny_config

SECONDS = 300
"""More than any answer takes; what does not come at all fails the test."""


class Terminal:
    """`hymba-tune chat` at a pseudo-terminal of its own, of which it is the controlling one: Ctrl-C is a byte."""

    def __init__(self, *arguments: str) -> None:
        self.keyboard, screen = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-m", "hymba_tune.cli", "chat", *arguments],
            stdin=screen, stdout=screen, stderr=screen, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(screen)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def until(self, text: str, again: str = "") -> str:
        """Everything shown up to `text`, which is taken off the screen with it.

        again: typed once more whenever nothing comes for a while. Python's input() hears Ctrl-C only at the next key
        where it comes between two of its waits.
        """
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            left = max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([self.keyboard], [], [], min(left, 5) if again else left)
            assert ready or time.monotonic() < deadline, f"{text!r} was not shown, but: {self.shown!r}"
            if ready:
                self.shown += self._read()
            else:
                self.type(again)
        before, _, self.shown = self.shown.partition(text)
        return before

    def _read(self) -> str:
        try:
            return os.read(self.keyboard, 4096).decode(errors="replace").replace("\r\n", "\n")
        except OSError:  # the program has closed its side
            raise AssertionError(f"the chat ended; it showed {self.shown!r}") from None

    def next(self) -> str:
        """The next character that is shown, left on the screen."""
        while not self.shown:
            self.shown += self._read()
        return self.shown[0]

    def ask(self, question: str) -> str:
        """The answer, shown between the question and the next prompt."""
        self.type(f"{question}\n")
        self.until(f"{question}\n")
        return self.until("\n> ")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    random_model(tiny_config(vocab_size=400, max_position_embeddings=4000)).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def chat(weights: Path, max_new_tokens: int) -> Iterator[Terminal]:
    # The penalty makes what a random model says depend on what was said before.
    terminal = Terminal(str(weights), "--repetition-penalty", "1.5", "--max-new-tokens", str(max_new_tokens))
    try:
        assert "/help lists the commands" in terminal.until("> ")
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.keyboard)


def test_a_conversation_is_remembered_until_reset_and_ctrl_d_leaves(weights: Path) -> None:
    with chat(weights, max_new_tokens=12) as terminal:
        first, second = terminal.ask("How many?"), terminal.ask("How many?")
        assert first != second
        terminal.type("/reset\n")
        assert terminal.until("> ").strip() == "/reset"
        assert [terminal.ask("How many?"), terminal.ask("How many?")] == [first, second]
        terminal.type("\x04")
        assert terminal.process.wait(SECONDS) == 0


def test_ctrl_c_stops_an_answer_and_then_empties_a_line_and_the_chat_goes_on(weights: Path) -> None:
    with chat(weights, max_new_tokens=3500) as terminal:
        terminal.type("How many?\n")
        terminal.until("How many?\n")
        terminal.until(terminal.next())
        terminal.type("\x03")
        stopped = terminal.until("\n> ")
        assert len(stopped) < 3000
        terminal.type("half a line\x03")
        terminal.until("(/exit or Ctrl-D leaves)\n> ", again="\x03")
        terminal.type("/exit\n")
        assert terminal.process.wait(SECONDS) == 0
