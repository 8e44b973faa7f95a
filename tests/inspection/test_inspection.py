"""What `data preview` and `data stats` show is what training reads, and nothing in the data can break the terminal."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from hymba_tune.inspection.page import write_preview, write_stats
from hymba_tune.inspection.preview import preview_mix
from hymba_tune.inspection.stats import fence_languages, mix_stats
from hymba_tune.inspection.terminal import show_preview, show_stats

HOSTILE = "<script>alert(1)</script> \x1b[31m \u202etxet [bold]x[/bold] </s>"
CODE = "Here:\n```python\nprint(1)\n```\nand\n```\nls\n```"


def conversation(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def write_mix(folder: Path, sources: dict[str, list[dict[str, Any]]], kind: str = "conversations") -> str:
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = {"kind": kind, "sources": {name: {"path": f"{name}.jsonl", "licence": "MIT"} for name in sources}}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    return str(folder / "mix.yaml")


@pytest.fixture
def mix(tmp_path: Path) -> str:
    chat = [conversation(HOSTILE, "Four."), conversation("How many?", "Four."), conversation("How many?", "Four.")]
    return write_mix(tmp_path, {"chat": chat, "code": [conversation("Write code.", CODE)]})


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    row = {"prompt": "How many?", "chosen": "Four.", "rejected": "No."}
    return write_mix(tmp_path, {"pairs": [row]}, "preferences")


def console(width: int = 100) -> Console:
    return Console(record=True, width=width, color_system=None, file=io.StringIO())


def test_a_preview_marks_turns_special_tokens_and_what_is_learned(mix: str) -> None:
    preview = preview_mix(mix, rows=1, max_length=2048)
    (row,) = preview.rows
    assert len(row.parts) == preview.counts.documents == 4  # type: ignore[union-attr]
    for part in row.parts:
        learned = "".join(piece.text for piece in part.pieces if piece.kind == "learned")
        assert learned in ("Four.</s>", f"{CODE}</s>")
        assert [piece.text for piece in part.pieces if piece.special] == ["</s>"]
        markers = [piece.text for piece in part.pieces if piece.kind == "marker"]
        assert markers == ["<extra_id_0>System", "<extra_id_1>User", "<extra_id_1>Assistant"]
    assert sum(part.tokens for part in row.parts) == preview.counts.tokens


def test_what_a_user_typed_is_no_special_token(mix: str) -> None:
    preview = preview_mix(mix, rows=1)
    texts = [piece for part in preview.rows[0].parts for piece in part.pieces if "alert(1)" in piece.text]
    assert [(piece.kind, piece.special) for piece in texts] == [("context", False)]
    assert texts[0].text.endswith("</s>\n")


def test_a_preview_shows_both_replies_of_a_pair(pairs: str) -> None:
    (row,) = preview_mix(pairs).rows
    assert [(part.title, part.learned > 0) for part in row.parts] == [
        ("prompt", False),
        ("chosen", True),
        ("rejected", True),
    ]
    assert "".join(piece.text for piece in row.parts[2].pieces) == "No.</s>"
    assert {piece.kind for piece in row.parts[2].pieces} == {"rejected"}


def test_nothing_in_the_data_reaches_the_terminal_as_control_or_markup(mix: str) -> None:
    screen = console()
    show_preview(preview_mix(mix, rows=2), screen)
    shown = screen.export_text()
    assert "␛[31m ⟨U+202E⟩txet [bold]x[/bold] </s>" in shown
    assert "«Four.»«</s>»" in shown
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)


def test_pages_of_a_mix_hold_its_text_as_text(mix: str, tmp_path: Path) -> None:
    page = write_preview(preview_mix(mix, rows=1), tmp_path / "preview.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search("<script|\x1b|\u202e", page)
    stats = write_stats(mix_stats(mix), tmp_path / "stats.html").read_text()
    assert stats.count("<svg") == 2


def test_statistics_count_by_source(mix: str) -> None:
    stats = mix_stats(mix)
    chat, code = stats.sources
    assert (stats.looked_at, stats.complete) == (4, True)
    assert (len(chat.lengths), chat.repeated, chat.mean_turns) == (3, 1, 2)
    assert code.languages == {"python": 1, "unnamed": 1}
    preview = preview_mix(mix, rows=1)
    assert chat.tokens + code.tokens == preview.counts.tokens
    assert chat.learned + code.learned == sum(part.learned for part in preview.rows[0].parts)


def test_a_part_of_a_mix_is_said_to_be_one(mix: str) -> None:
    stats = mix_stats(mix, limit=2)
    assert (stats.looked_at, stats.complete) == (2, False)
    screen = console()
    show_stats(stats, screen)
    assert "2 conversations, a random part of the mix" in screen.export_text()


def test_tokens_of_a_pair_are_those_of_both_conversations(pairs: str) -> None:
    (source,) = mix_stats(pairs).sources
    (row,) = preview_mix(pairs).rows
    prompt, chosen, rejected = (part.tokens for part in row.parts)
    assert source.lengths == [2 * prompt + chosen + rejected]
    assert source.learned == chosen + rejected


def test_plain_text_is_shown_in_pieces_and_counted(tmp_path: Path) -> None:
    mix = write_mix(tmp_path, {"web": [{"text": "one two three four five six"}]}, "documents")
    preview = preview_mix(mix, rows=1, max_length=8)
    (row,) = preview.rows
    assert next(piece.text for part in row.parts for piece in part.pieces if piece.special) == "<s>"
    assert preview.counts.split == 1  # type: ignore[union-attr]
    (source,) = mix_stats(mix).sources
    assert (source.turns, source.with_system) == ([1], 0)
    assert source.learned == source.tokens - 1


def test_fences_are_counted_by_their_first_word() -> None:
    assert fence_languages(["```Python title=x\na\n```", "```\nb\n```", None, "no ``` fence"]) == {
        "python": 1,
        "unnamed": 1,
    }
