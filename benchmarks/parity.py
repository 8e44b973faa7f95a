"""Agreement with the official scorers, item by item: answers of real models with the official verdict for each.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.parity

Claim: no disagreement on any of the gold answers in FOLDER/scoring_gold that the official scorer itself judges the same
way twice (IFEval marks the others: random letters, and langdetect on short texts). A disagreement is listed with both
verdicts, and the exit code is 1.

What is compared, an answer: bfcl_v2 valid and error type; gsm8k the extracted text and the verdict of both filters;
ifeval each stable instruction, strict and loose; rolebench the Rouge-L values to 1e-6.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from hymba_tune.data.benchmarks import benchmark_rows, read_jsonl
from hymba_tune.errors import UserError
from hymba_tune.evaluation import bfcl, gsm8k, ifeval, rolebench
from hymba_tune.evaluation.bfcl_questions import bfcl_rows
from hymba_tune.evaluation.harness import read_task

TOLERANCE = 1e-6  # of Rouge-L values, as the gold states them
Comparison = tuple[str, Any, Any]
"""(what, ours, official)"""


def bfcl_comparisons(data: Path, gold: Path) -> Iterator[Comparison]:
    rows = {row["id"]: row for row in bfcl_rows(data)}
    for answer in read_jsonl(gold):
        row = rows[answer["id"]]
        fault = bfcl.judge(row, bfcl.decode_or_error("bfcl_v2", row, answer["result"]))
        yield answer["id"], (fault is None, fault and fault.error_type), (answer["valid"], answer["error_type"])


def gsm8k_comparisons(data: Path, gold: Path) -> Iterator[Comparison]:
    references = [row["answer"] for row in benchmark_rows("gsm8k", "test", data)]
    answers = list(read_jsonl(gold))
    for name, field in (("strict-match", "strict_match"), ("flexible-extract", "flexible_extract")):
        found = _filtered(name, [answer["response"] for answer in answers])
        for answer, text in zip(answers, found, strict=True):
            what = f"{answer['doc_id']} {answer['system']} {answer['variant']} {name}"
            verdict = gsm8k.exact_match(text, references[answer["doc_id"]])
            yield what, (text, verdict), (answer[f"{field.split('_')[0]}_filtered"], answer[field])


def _filtered(name: str, responses: list[str]) -> list[str]:
    """What a filter of tasks/gsm8k.yaml, built by lm-eval, makes of responses."""
    from lm_eval.api.instance import Instance
    from lm_eval.filters import build_filter_ensemble

    (entry,) = (entry for entry in read_task("gsm8k")["filter_list"] if entry["name"] == name)
    steps = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in entry["filter"]]
    instances = [
        Instance("generate_until", {}, (), 0, ("gsm8k", number, 1), resps=[response])
        for number, response in enumerate(responses)
    ]
    build_filter_ensemble(name, steps).apply(instances)
    return [instance.filtered_resps[name] for instance in instances]


def ifeval_comparisons(data: Path, gold: Path) -> Iterator[Comparison]:
    ifeval.ifeval_rows(data)  # finds NLTK's sentence model
    for answer in read_jsonl(gold):
        ours = ifeval.check_answer(answer, answer["response"])
        for number, name in enumerate(answer["instruction_id_list"]):
            if answer["stable"][number]:
                for mode in ifeval.MODES:
                    yield f"{answer['key']} {name} {mode}", ours[mode][number], answer[mode][number]


def rolebench_comparisons(data: Path, gold: Path) -> Iterator[Comparison]:
    task = "rolebench_zh" if gold.name.startswith("zh") else "rolebench_role"
    for number, answer in enumerate(read_jsonl(gold)):
        best = rolebench.score(task, answer["prediction"], answer["references"]).scores
        first = rolebench.score(task, answer["prediction"], answer["references"][:1]).scores
        ours = {
            "rougeL_recall_max": best["recall"],
            "rougeL_recall_first": first["recall"],
            "rouge_score_rougeL_f_first": first.get("first_f1"),
        }
        for name, value in ours.items():
            if name in answer:
                close = abs(value - answer[name]) <= TOLERANCE
                yield f"{number} {name}", answer[name] if close else value, answer[name]


COMPARISONS: dict[str, Callable[[Path, Path], Iterator[Comparison]]] = {
    "bfcl_v2": bfcl_comparisons,
    "gsm8k": gsm8k_comparisons,
    "ifeval": ifeval_comparisons,
    "rolebench": rolebench_comparisons,
}


def compare(data: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(gold file, figures) of one benchmark."""
    for gold in sorted((data / "scoring_gold" / name).glob("*.jsonl")):
        began, compared, disagreements = time.process_time(), 0, []
        for what, ours, official in COMPARISONS[name](data, gold):
            compared += 1
            if ours != official:
                disagreements.append({"item": what, "ours": ours, "official": official})
        figures = {"answers": sum(1 for _ in read_jsonl(gold)), "compared": compared, "disagreements": disagreements}
        yield gold.name.removesuffix(".public.jsonl"), figures | {"seconds": time.process_time() - began}


def main() -> int:
    folder = os.environ.get("HYMBA_TUNE_DATA")
    if not folder:
        sys.exit("HYMBA_TUNE_DATA is not set; it names the folder that holds data/ and scoring_gold/")
    try:
        figures: dict[str, Any] = {name: dict(compare(Path(folder), name)) for name in COMPARISONS}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write_result("parity", figures)
    files = [one for gold_files in figures.values() for one in gold_files.values()]
    print(
        f"{sum(one['compared'] for one in files)} verdicts compared on {sum(one['answers'] for one in files)} answers, "
        f"{sum(len(one['disagreements']) for one in files)} disagreements"
    )
    return int(any(one["disagreements"] for one in files))


if __name__ == "__main__":
    sys.exit(main())
