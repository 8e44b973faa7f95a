"""Text that nobody vouches for, made harmless: what a model or a user wrote cannot break a page or a terminal."""

import re
import unicodedata

_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories without a glyph: controls, direction marks, surrogates, private, unassigned, separators."""
_MARKDOWN = re.compile(r"([\\`*\[\]|~])")


def visible(text: str) -> str:
    """Every character without a glyph written out: ␛ for escape, ⟨U+202E⟩ for a direction mark. Keeps \\n and \\t."""
    return "".join(_glyph(character) for character in text.replace("\r\n", "\n"))


def shortened(text: str, characters: int) -> str:
    """At most so many characters: the beginning and the end, and how many were left out between them."""
    if len(text) <= characters:
        return text
    tail = characters // 4
    return f"{text[: characters - tail]} … [{len(text) - characters} characters] … {text[-tail:]}"


def inline(text: str) -> str:
    """For a line or a table cell of Markdown: one line, no markup."""
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", line)


def fenced(text: str, language: str = "text") -> str:
    """A Markdown code block that the text cannot close."""
    text = visible(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _glyph(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or unicodedata.category(character) not in _INVISIBLE:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"
