"""Answers already computed, kept by what decides them: the model's weights, the prompt and the settings.

One JSON line an answer, written as soon as it is known, so that a suite that was cut off goes on where it stopped. A
line that a crash left half-written is dropped when the file is opened. Several processes write a file each, and the
first of them reads what the others write.
"""

import hashlib
import json
import time
from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import torch

LOOK_SECONDS = 0.1
"""How often a process that waits looks for what others have answered."""


class AnswerCache:
    """A mapping from `answer_key` to JSON values that lives in a file; in memory only if `path` is None."""

    def __init__(self, path: Path | None):
        self._answers: dict[str, Any] = {}
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(path, "a+")
            self._load(self._file)

    def get(self, key: str) -> Any | None:
        return self._answers.get(key)

    def all_of(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The answers to all keys that anybody has, more of them each time, the last time all."""
        yield {key: self._answers[key] for key in keys}

    def put(self, key: str, answer: Any) -> None:
        self._answers[key] = answer
        self._write(key, answer)

    def _write(self, key: str, answer: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def take_over(self, part: Path) -> None:
        """The answers of another process' file, which goes then."""
        with _opened(part, "r") as file:
            answers, _ = _whole_lines(file)
        for key, answer in answers.items():
            if key not in self._answers:
                self.put(key, answer)
        part.unlink()

    def _load(self, file: TextIO) -> None:
        """Reads the whole lines and cuts the file after the last of them."""
        file.seek(0)
        self._answers, end = _whole_lines(file)
        file.seek(end)
        file.truncate()


class PartCache(AnswerCache):
    """That of one of several processes: it knows what `known` holds, and what it is given goes to its own part only.

    All of them know the same, so that all see the same requests without an answer, of which each takes its share.
    """

    def __init__(self, known: Path, parts: Sequence[Path], number: int):
        super().__init__(None)
        if known.exists():
            with _opened(known, "r") as file:
                self._answers, _ = _whole_lines(file)
        self._parts, self._read = parts, [0] * len(parts)
        self._news: dict[str, Any] = {}
        self._file = _opened(parts[number], "w")

    def put(self, key: str, answer: Any) -> None:
        self._write(key, answer)

    def all_of(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """As AnswerCache's; waits for what other processes have not answered yet."""
        while True:
            self._read_parts()
            known = ChainMap(self._news, self._answers)
            found = {key: known[key] for key in keys if key in known}
            yield found
            if len(found) == len(keys):
                return
            time.sleep(LOOK_SECONDS)

    def _read_parts(self) -> None:
        """What was written to the parts since the last time."""
        for number, part in enumerate(self._parts):
            if part.exists():
                with _opened(part, "r") as file:
                    file.seek(self._read[number])
                    answers, self._read[number] = _whole_lines(file)
                self._news |= answers


def _opened(path: Path, mode: str) -> TextIO:
    return cast(TextIO, path.open(mode, encoding="utf-8", errors="backslashreplace"))


def _whole_lines(file: TextIO) -> tuple[dict[str, Any], int]:
    """The answers of a file up to the first line that is broken, and where that line begins."""
    answers: dict[str, Any] = {}
    end = file.tell()
    while (line := file.readline()).endswith("\n"):
        try:
            entry = json.loads(line)
            answers[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            break
        end = file.tell()
    return answers, end


def answer_key(kind: str, model: str, tokenizer: str, tokens: Sequence[int], settings: dict[str, Any]) -> str:
    """Key of one answer; `model` and `tokenizer` are fingerprints, `kind` the kind of request."""
    return _digest([kind, model, tokenizer, list(tokens), settings])


def model_fingerprint(model: Any) -> str:
    """sha256 over names, types, shapes and bytes of all weights, and over the configuration that computes with them."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary and rules that turn text into tokens and back, and over the chat template."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = core.to_str() if core is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _digest([rules, tokenizer.chat_template])


def prompt_fingerprint(prompt: Sequence[int]) -> str:
    """sha256 of a prompt's token ids."""
    return _digest(list(prompt))


def text_fingerprint(text: str) -> str:
    """sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _digest(value: Any) -> str:
    return text_fingerprint(json.dumps(value, sort_keys=True, ensure_ascii=False))
