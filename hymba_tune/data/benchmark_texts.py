"""The text of every benchmark's test items, which must not stand in training data.

What a copy of an item would hold: the question of GSM8K, IFEval's prompt, BFCL's turns (the executed categories too);
of MMLU and GPQA the question, with its choices where it is too short to tell (SHORT words); of RoleBench the
references, because its questions are asked of the training roles as well, and of those the ones that nobody writes by
chance (REFERENCE_WORDS).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound, benchmark_rows, data_folder, read_jsonl
from hymba_tune.errors import UserError

BenchmarkText = tuple[str, str, str]
"""(benchmark, item id, text)"""

SHORT = 8
_GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
REFERENCE_WORDS = 20
_ROLEBENCH = {
    "rolebench_instruction": "rolebench-eng/instruction-generalization",
    "rolebench_role": "rolebench-eng/role-generalization",
    "rolebench_zh": "rolebench-zh",
}
_PARTS = ("general", "role_specific")


def benchmark_texts(
    data: str | Path | None = None, benchmarks: Sequence[str] | None = None
) -> tuple[list[BenchmarkText], dict[str, str]]:
    """All texts, and {benchmark: why} for those whose items are not here and are not compared.

    data: the folder with benchmark files; None for HYMBA_TUNE_DATA, else the hub. benchmarks: these of BENCHMARKS only.

    Raises UserError for a broken file.
    """
    texts: list[BenchmarkText] = []
    missing: dict[str, str] = {}
    no_folder = data_folder(data) is None
    for name in BENCHMARKS if benchmarks is None else benchmarks:
        if no_folder and missing:  # a hub that does not answer is asked once
            missing[name] = "not asked for after the first that could not be had"
            continue
        try:
            texts += _READERS[name](data)
        except BenchmarkNotFound as reason:
            missing[name] = str(reason).removeprefix(f"{name}: ")
    return texts, missing


def _gsm8k(data: str | Path | None) -> Iterator[BenchmarkText]:
    for number, row in enumerate(benchmark_rows("gsm8k", "test", data)):
        yield "gsm8k", str(number), row["question"]


def _ifeval(data: str | Path | None) -> Iterator[BenchmarkText]:
    for row in benchmark_rows("ifeval", "test", data):
        yield "ifeval", str(row["key"]), row["prompt"]


def _mmlu(data: str | Path | None) -> Iterator[BenchmarkText]:
    numbers: dict[str, int] = {}
    for row in benchmark_rows("mmlu", "test", data):
        number = numbers[row["subject"]] = numbers.get(row["subject"], -1) + 1
        yield "mmlu", f"{row['subject']}/{number}", _with_choices(row["question"], row["choices"])


def _gpqa(data: str | Path | None) -> Iterator[BenchmarkText]:
    for number, row in enumerate(benchmark_rows("gpqa", "test", data)):
        yield "gpqa", str(number), _with_choices(row["Question"], [row[name] or "" for name in _GPQA_CHOICES])


def _with_choices(question: str, choices: list[str]) -> str:
    return question if len(question.split()) >= SHORT else "\n".join([question, *choices])


def _bfcl(data: str | Path | None) -> Iterator[BenchmarkText]:
    folder = data_folder(data)
    paths = sorted((folder / "bfcl_v2").glob("BFCL_v2_*.json")) if folder else []
    if not paths:
        raise BenchmarkNotFound("bfcl_v2: no files bfcl_v2/BFCL_v2_*.json in the folder of eval.data")
    for path in paths:
        for row in read_jsonl(path):
            for turn in _turns(row, path):
                yield "bfcl_v2", str(row.get("id")), turn


def _turns(row: dict[str, Any], path: Path) -> list[str]:
    """Texts of a question's turns; the executed categories' list of turns lies one level deeper or not."""
    turns = row.get("question")
    turns = turns if isinstance(turns, list) else [turns]
    found = [turn for one in turns for turn in (one if isinstance(one, list) else [one])]
    contents = [turn.get("content") if isinstance(turn, dict) else turn for turn in found]
    texts = [content for content in contents if isinstance(content, str)]
    if not texts or len(texts) < len(contents):
        raise UserError(f"{path}: item {row.get('id')!r}: question holds no messages; get the file again")
    return texts


def _rolebench(name: str, data: str | Path | None) -> Iterator[BenchmarkText]:
    folder = data_folder(data)
    paths = [folder / "rolebench" / _ROLEBENCH[name] / part / "test.jsonl" for part in _PARTS] if folder else []
    if not any(path.is_file() for path in paths):
        raise BenchmarkNotFound(f"{name}: no test.jsonl below rolebench/{_ROLEBENCH[name]} in the folder of eval.data")
    for path in (path for path in paths if path.is_file()):
        for number, row in enumerate(read_jsonl(path)):
            for reference in row.get("generated") or ():
                if len(_words(str(reference), name)) >= REFERENCE_WORDS:
                    yield name, f"{path.parent.name}/{number}", str(reference)


def _words(text: str, name: str) -> Sequence[str]:
    return text if name == "rolebench_zh" else text.split()


_READERS: dict[str, Callable[[str | Path | None], Iterator[BenchmarkText]]] = {
    "gsm8k": _gsm8k,
    "ifeval": _ifeval,
    "mmlu": _mmlu,
    "bfcl_v2": _bfcl,
    **{name: partial(_rolebench, name) for name in _ROLEBENCH},
    "gpqa": _gpqa,
}
BENCHMARKS = tuple(_READERS)
"""Those that the hub does not give to everybody come last: the others were asked for before."""
