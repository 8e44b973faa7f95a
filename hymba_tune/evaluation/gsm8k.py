"""GSM8K: five worked examples as chat turns, one greedy answer, its number compared with the reference's.

`gsm8k` is the protocol of NVlabs/hymba (the question without "Answer:", 8,192 tokens in all), `gsm8k_upstream` that of
current lm-eval; tasks/*.yaml say exactly how they differ. Two verdicts: strict_match wants the "#### 18" of the
training answers, flexible_extract takes the last number of the text.
"""

from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import benchmark_rows
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import Sample, read_task, run_tasks
from hymba_tune.evaluation.results import Scores, mean_metric

PROTOCOLS = {
    "gsm8k": "GSM8K test, 5-shot multi-turn chat, NVlabs/hymba (lm-eval 0.4.4, no 'Answer:', 8192 tokens in all) v1",
    "gsm8k_upstream": "GSM8K test, 5-shot multi-turn chat, lm-eval 0.4.13 (with 'Answer:', 256 new tokens) v1",
}
HEADLINE = "strict_match"
FILTERS = {"strict_match": "strict-match", "flexible_extract": "flexible-extract"}
NOTHING = "[invalid]"
"""What lm-eval's filters return where their pattern matches nothing."""


Splits = dict[str, list[dict[str, Any]]]


def gsm8k_splits(data: str | Path | None) -> Splits:
    """The rows of train (the shots) and test."""
    return {split: benchmark_rows("gsm8k", split, data) for split in ("train", "test")}


def run_gsm8k(task: str, engine: Engine, splits: Splits, limit: int | None) -> Scores:
    """`gsm8k` or `gsm8k_upstream` on the first `limit` test rows (None: all)."""
    config = read_task(task) | {"process_results": process_results}
    samples = run_tasks(engine, {task: (config, splits | {"test": splits["test"][:limit]})})[task]
    items = [_item(sample) for sample in samples]
    return Scores({name: mean_metric([item["verdict"][name] for item in items]) for name in FILTERS}, items)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's hook: the verdict on one filtered answer."""
    return {"exact_match": exact_match(results[0], doc["answer"])}


def exact_match(extracted: str, reference: str) -> float:
    """1.0 where lm-eval's exact_match with GSM8K's settings says equal (tasks/gsm8k.yaml, metric_list), else 0.0.

    The same rules without its backtracking, which takes minutes on a number of 100,000 digits.
    """
    return float(_bare_number(extracted) == _bare_number(reference))


def reference_number(answer: str) -> str:
    """The number of a reference answer: what follows its last "#### "."""
    return answer.rpartition("#### ")[2].strip()


def _bare_number(text: str) -> str:
    """Without commas, dollar signs, everything up to the last "#### ", and a full stop at the end; lower case."""
    bare = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    if bare.endswith("."):
        bare = bare[:-1]
    elif bare.endswith(".\n"):
        bare = bare[:-2] + "\n"
    return bare.lower()


def _item(sample: Sample) -> dict[str, Any]:
    found = {name: sample.filtered[filter_name][0] for name, filter_name in FILTERS.items()}
    extracted = {name: None if text == NOTHING else text for name, text in found.items()}
    verdict = {name: sample.scores[filter_name]["exact_match"] for name, filter_name in FILTERS.items()}
    target = reference_number(sample.doc["answer"])
    return {
        "id": f"gsm8k/test/{sample.doc_id}",
        "prompt_sha256": sample.prompt_sha256,
        "prompt": sample.question,
        "answer": sample.responses[0],
        "extracted": extracted,
        "target": target,
        "verdict": verdict,
        "why": _why(extracted, verdict, target),
        "finish_reason": sample.finish_reason,
        "dropped_prompt_tokens": sample.dropped_prompt_tokens,
    }


def _why(extracted: dict[str, str | None], verdict: dict[str, float], target: str) -> str:
    if verdict["strict_match"]:
        return "right"
    if extracted["strict_match"] is not None:
        return f"{_short(extracted['strict_match'])} is not {target}"
    if verdict["flexible_extract"]:
        return "right number, but no '#### number'"
    if extracted["flexible_extract"] is None:
        return "no number"
    return f"no '#### number'; last number {_short(extracted['flexible_extract'])} is not {target}"


def _short(text: str) -> str:
    return text if len(text) <= 20 else text[:20] + "…"
