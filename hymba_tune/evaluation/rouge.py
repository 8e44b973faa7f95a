"""Rouge-L, as two published packages compute it, without their recursion and in bounded time.

`union_rouge_l` is `rouge-l` of PyPI `rouge` 1.0.1: sentences end at ".", words are what blanks separate, case is kept.
For each pair of sentences one longest common subsequence is taken; the words of all of them, as a set, are the
overlap, and the sets of the answer's and the reference's words the lengths. `rouge_l_f1` is `rougeL` of PyPI
`rouge_score` without stemming: one subsequence over lower-cased runs of letters a to z and digits.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"[a-z0-9]+")


class RougeL(NamedTuple):
    """Each in [0, 1]."""

    recall: float
    precision: float
    f1: float


def union_rouge_l(answer: str, reference: str) -> RougeL:
    """Overlap in one reference; all zero where either text has no sentence."""
    answered, wanted = _sentences(answer), _sentences(reference)
    if not answered or not wanted:
        return RougeL(0.0, 0.0, 0.0)
    shared: set[str] = set()
    for sentence in wanted:
        for other in answered:
            shared |= _common_words(sentence, other)
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    precision = len(shared) / len({word for sentence in answered for word in sentence})
    return RougeL(recall, precision, 2 * recall * precision / (recall + precision + 1e-8))


def rouge_l_f1(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    answered, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not answered or not wanted:
        return 0.0
    return 2 * _common_length(wanted, answered) / (len(answered) + len(wanted))


def _common_length(x: Sequence[str], y: Sequence[str]) -> int:
    """Length of the longest common subsequence, a table row in the bits of an integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(x):
        places[word] = places.get(word, 0) | 1 << i
    unmatched = full = (1 << len(x)) - 1
    for word in y:
        here = unmatched & places.get(word, 0)
        unmatched = ((unmatched + here) | (unmatched - here)) & full
    return len(x) - unmatched.bit_count()


def _sentences(text: str) -> list[list[str]]:
    """Words, with the empty word for a sentence of blanks, which the package counts too."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(wanted: Sequence[str], answered: Sequence[str]) -> set[str]:
    """The words of the common subsequence that the package's walk back through the table finds."""
    known = set(wanted)
    # a word that is not wanted never changes the walk: at its column the table equals the column before
    answered = [word for word in answered if word in known]
    table = _lengths(wanted, answered)
    words = set()
    i, j = len(wanted), len(answered)
    while i and j:
        if wanted[i - 1] == answered[j - 1]:
            i, j = i - 1, j - 1
            words.add(wanted[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _lengths(x: Sequence[str], y: Sequence[str]) -> list[list[int]]:
    """table[i][j]: length of the longest common subsequence of x[:i] and y[:j]."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table
