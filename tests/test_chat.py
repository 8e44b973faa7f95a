"""Talking to a model: what is shown is what it generated, made harmless; the cache changes nothing."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hymba_tune import chat as module
from hymba_tune.chat import Conversation, Display, Sampling, _Stream, read_tools, shown_call, talk
from hymba_tune.data.chat import load_tokenizer, prompt_ids
from hymba_tune.errors import UserError
from hymba_tune.evaluation.generate import generate
from tests.model.models import random_model, tiny_config

BRIEF = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(tiny_config(vocab_size=400, max_position_embeddings=400))


@pytest.fixture
def conversation(model: Any, small_tokenizer: PreTrainedTokenizerFast) -> Conversation:
    return Conversation(model, small_tokenizer, BRIEF, system="Count.")


def displayed(*pieces: str) -> str:
    shown: list[str] = []
    display = Display(shown.append)
    for piece in pieces:
        display.feed(piece)
    display.close()
    return "".join(shown)


def test_answers_are_those_of_greedy_generation_over_the_whole_conversation(
    conversation: Conversation, model: Any, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    read = []
    for question in ("How many?", "And then?", "Why?"):
        pieces: list[str] = []
        asked = [*conversation.messages, {"role": "user", "content": question}]
        answer = conversation.answer("user", question, pieces.append)
        [expected] = generate(model, small_tokenizer, [prompt_ids(small_tokenizer, asked)], max_new_tokens=12)
        assert answer == "".join(pieces) == expected.text
        read.append(len(conversation._read))
    assert read == sorted(read)
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]


def test_a_turn_reads_only_what_is_new(conversation: Conversation, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model's words rarely tokenise back to themselves, so its answers are replaced by ones that do."""
    slots: list[int] = []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        slots.append(input_ids.shape[1])
        output = forward(input_ids, **kwargs)
        output.logits[:] = 0
        output.logits[..., conversation.tokenizer.eos_token_id] = 1
        return output

    monkeypatch.setattr(model, "forward", counted)
    conversation.answer("user", "How many?", str)
    first = len(conversation._read)
    conversation.answer("user", "And then?", str)
    assert slots == [first, len(conversation._read) - first]


@pytest.mark.parametrize("text", ["plain words", "héllo wörld ✓ 漢字 🙂", "\n\n  spaced\t out  \n"])
def test_streamed_pieces_make_up_the_text_and_no_character_is_torn(
    text: str, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces: list[str] = []
    stream = _Stream(small_tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for token in small_tokenizer.encode(text, add_special_tokens=False):
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == text
    assert len(pieces) > 3
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_as_such(small_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = _Stream(small_tokenizer, str)
    stream.put(torch.tensor([[1]]))
    for token in small_tokenizer.encode("a🙂", add_special_tokens=False)[:-1]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text.rstrip("\N{REPLACEMENT CHARACTER}") == "a"
    assert stream.text != "a"


def test_the_same_seed_draws_the_same_answers(model: Any, small_tokenizer: PreTrainedTokenizerFast) -> None:
    def answers(seed: int) -> list[str]:
        drawn = Conversation(model, small_tokenizer, Sampling(temperature=1.5, max_new_tokens=8, seed=seed))
        return [drawn.answer("user", text, str) for text in ("a", "b")]

    assert answers(1) == answers(1) != answers(2)


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    shown = displayed("red \x1b[31m", "\x9b2J bell \x07 \u202etxet", "\r overwritten")
    assert shown == "red ␛[31m⟨U+009B⟩2J bell ␇ ⟨U+202E⟩txet␍ overwritten\n"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_tool_call_is_shown_as_a_call_however_it_is_cut(cut: int) -> None:
    text = 'So: <toolcall> {"name": "add", "arguments": {"a": 1, "b": "x\\u001b"}} </toolcall> then <tool'
    assert displayed(text[:cut], text[cut:]) == 'So: → add(a=1, b="x\\u001b") then <tool\n'


def test_a_call_that_never_ends_or_is_no_json_is_shown_as_text() -> None:
    assert displayed("<toolcall> {", "\x1b") == "<toolcall> {␛\n"
    assert shown_call(" {oops\x1b") == "→ no valid call: {oops␛"
    assert shown_call("[" * 100_000).startswith("→ no valid call")
    assert shown_call('{"name": "f", "arguments": 3}').startswith("→ no valid call")


def test_ctrl_c_stops_the_answer_and_keeps_what_came(conversation: Conversation) -> None:
    came: list[str] = []

    def impatient(text: str) -> None:
        came.append(text)
        if len(came) == 3:
            raise KeyboardInterrupt

    answer = conversation.answer("user", "How many?", impatient)
    assert answer == conversation.messages[-1]["content"]
    assert answer.startswith("".join(came))
    assert conversation.answer("user", "Go on.", str)
    came.clear()
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("user", "More.", impatient, keep_interrupted=False)
    assert conversation.messages[-1]["role"] == "assistant"


def test_a_conversation_that_does_not_fit_says_so_and_goes_on(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(conversation, iter(["How many? " * 200, "How many?"]), interactive=False)
    shown = capsys.readouterr()
    assert "more than the model takes; /reset begins anew" in shown.err
    assert len(conversation.messages) == 3
    assert shown.out


def test_lines_with_a_slash_are_commands(
    conversation: Conversation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def answer(role: str, text: str, write: Any, keep_interrupted: bool) -> str:
        asked.append((role, text))
        return ""

    monkeypatch.setattr(conversation, "answer", answer)
    lines = ["one", "/tool 42", "//two", "/system Be brief.", "/nonsense \x1b", "/help", "/exit", "never"]
    talk(conversation, iter(lines), interactive=True)
    assert asked == [("user", "one"), ("tool", "42"), ("user", "/two")]
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    error = capsys.readouterr().err
    assert "/nonsense is no command" in error
    assert "/reset" in error
    conversation.messages.append({"role": "user", "content": "x"})
    talk(conversation, iter(["/reset"]), interactive=True)
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_a_tool_definition_is_in_the_prompt_and_a_wrong_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    tools = [{"name": "add"}, {"type": "function", "function": {"name": "sub"}}]
    file.write_text(json.dumps(tools))
    assert read_tools(file) == tools
    for wrong in ("{", "{}", "[1]", '[{"name": ""}]', '[{"function": {}}]'):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"--tools: .*tools\.json"):
            read_tools(file)
    with pytest.raises(UserError, match="No such file"):
        read_tools(tmp_path / "no.json")


def test_the_template_saved_with_a_checkpoint_is_the_one_in_use(
    tmp_path: Path, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    own = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(own)
    assert load_tokenizer(tmp_path, saved_template=True).chat_template == own
    assert load_tokenizer(tmp_path).chat_template != own
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path, saved_template=True).chat_template == load_tokenizer(tmp_path).chat_template


def test_each_line_of_a_pipe_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  \ntwo"))
    assert list(module._piped()) == ["one", "two"]
