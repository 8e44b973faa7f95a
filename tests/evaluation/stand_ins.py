"""A data folder with a few made-up items of every benchmark, in the published files' forms."""

import csv
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hymba_tune.evaluation import bfcl_questions, gpqa, rolebench

FRUITS = ["apples", "pears", "figs", "plums", "limes", "dates"]


def write_stand_ins(folder: Path) -> Path:
    """Every file that a task of the catalogue reads; returns `folder`."""
    _gsm8k(folder)
    _mmlu(folder / "mmlu" / "mmlu.zip")
    _ifeval(folder)
    _gpqa(folder / "gpqa" / "gpqa_main.csv")
    _bfcl(folder / "bfcl_v2")
    _rolebench(folder / "rolebench")
    return folder


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _gsm8k(folder: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        rows = [
            {
                "question": f"Ann has {n + 2} {FRUITS[n]} and buys {'one more' * (n + 1)}. How many has she?",
                "answer": f"She has {n + 2}+{n + 1}=<<{n + 2}+{n + 1}={2 * n + 3}>>{2 * n + 3}.\n#### {2 * n + 3}",
            }
            for n in range(count)
        ]
        _write_lines(folder / "gsm8k" / f"{split}.jsonl", rows)


def _mmlu(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for subject in ("anatomy", "world_religions"):
            for split, count in (("dev", 5), ("test", 4)):
                text = io.StringIO(newline="")
                csv.writer(text).writerows(
                    [f"Which {FRUITS[n]} of {subject}{', and where' * n}?", *FRUITS[:4], "ABCD"[n % 4]]
                    for n in range(count)
                )
                archive.writestr(f"data/{split}/{subject}_{split}.csv", text.getvalue())


def _ifeval(folder: Path) -> None:
    (folder / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)  # no check below asks for sentences
    names = ["punctuation:no_comma", "change_case:english_capital", "detectable_format:json_format"]
    rows = [
        {"key": n, "prompt": f"Praise {FRUITS[n]}{' at length' * n}.", "instruction_id_list": [name], "kwargs": [{}]}
        for n, name in enumerate(names)
    ]
    _write_lines(folder / "ifeval" / "input_data.jsonl", rows)


def _gpqa(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["Question", *gpqa.COLUMNS])
        writer.writeheader()
        for n in range(3):
            choices = dict(zip(gpqa.COLUMNS, FRUITS, strict=False))
            writer.writerow({"Question": f"Which lamp shines{' and shines' * n}?"} | choices)


def _bfcl(folder: Path) -> None:
    for category in bfcl_questions.CATEGORIES:
        kind = "String" if category in bfcl_questions.LANGUAGES else "string"
        city = {"type": kind, "description": "The city."}
        function = {
            "name": "weather.get",
            "description": "Get the weather.",
            "parameters": {"type": "dict", "properties": {"city": city}, "required": ["city"]},
        }
        question = [{"role": "user", "content": f"How is {category} weather in Rome?"}]
        item = {"id": f"{category}_0", "question": question, "function": [function]}
        _write_lines(folder / f"BFCL_v2_{category}.json", [item])
        truth = {"id": f"{category}_0", "ground_truth": [{"weather.get": {"city": ["Rome"]}}]}
        _write_lines(folder / "possible_answer" / f"BFCL_v2_{category}.json", [truth])


def _rolebench(folder: Path) -> None:
    for task in rolebench.FOLDERS.values():
        for part in rolebench.PARTS.values():
            item = {"role": "Sherlock", "generated": ["A detective.", "Holmes."]}
            questions = [f"Who{' are you' * n} of {task}?" for n in (1, 2)]
            _write_lines(folder / task / part, [item | {"question": question} for question in questions])
