"""GSM8K on the tiny model: our batched suite against lm-eval's own hf backend at batch size 1.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.batched_eval [--limit 200]

Both sides run the same task (gsm8k_upstream: five chat shots, at most 256 new tokens) on the same model, in float32,
from reading the rows to the scores; the model is loaded before. Claim: the same answers, faster.

    as_it_ends      the tiny model ends most answers after a few tokens: reading prompts of 1,600 tokens is most of the
                    work, and takes as long in a batch as alone
    full_length     end of sequence is never chosen, as by a model that does not stop: every answer has 256 tokens
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from hymba_tune.data.chat import load_tokenizer
from hymba_tune.evaluation.gsm8k import gsm8k_splits, process_results
from hymba_tune.evaluation.harness import FEWSHOT_SEED, read_task
from hymba_tune.evaluation.suite import run_suite
from hymba_tune.model import load_model
from hymba_tune.model.precision import choose_matmul_precision
from hymba_tune.tiny import tiny_path

TASK = "gsm8k_upstream"


class Timer:
    """Seconds since it was made: on the clock, and of all threads together."""

    def __init__(self) -> None:
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        return {"clock": time.perf_counter() - self._clock, "processor": time.process_time() - self._processor}


def batched(model: Any, tokenizer: Any, limit: int, batch_tokens: int) -> tuple[list[str], dict[str, float]]:
    """Answers of our suite, and its seconds."""
    timer = Timer()
    with tempfile.TemporaryDirectory() as folder:
        [result] = run_suite(model, tokenizer, [TASK], Path(folder), limit=limit, batch_tokens=batch_tokens)
    return [item["answer"] for item in result["items"]], timer.seconds()


def one_by_one(model: Any, tokenizer: Any, limit: int) -> tuple[list[str], dict[str, float]]:
    """Answers of lm-eval's hf backend, batch size 1, and its seconds."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    timer = Timer()
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in gsm8k_splits(None).items()}
    config = read_task(TASK) | {"process_results": process_results, "custom_dataset": lambda **_: splits}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(FEWSHOT_SEED)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=False, device=str(model.device))
    results = evaluate(
        backend,
        {"tasks": {TASK: task}},
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    assert results is not None
    logged = [entry for entry in results["samples"][TASK] if entry["filter"] == "strict-match"]
    answers = {entry["doc_id"]: entry["resps"][0][0] for entry in logged}
    return [answers[number] for number in sorted(answers)], timer.seconds()


def never_end(model: Any, eos: int) -> None:
    """Have a model never choose the end of the sequence."""

    def without_end(module: Any, inputs: Any, output: Any) -> None:
        output.logits[..., eos] = float("-inf")

    model.register_forward_hook(without_end)


def compare(model: Any, tokenizer: Any, limit: int, batch_tokens: int) -> dict[str, Any]:
    many, seconds = batched(model, tokenizer, limit, batch_tokens)
    alone, seconds_alone = one_by_one(model, tokenizer, limit)
    return {
        "seconds_batched": seconds,
        "seconds_lm_eval_batch_1": seconds_alone,
        "ratio": {kind: seconds_alone[kind] / seconds[kind] for kind in seconds},
        "new_tokens_an_answer": statistics.fmean(len(tokenizer.encode(answer)) for answer in many),
        "equal_answers": sum(a == b for a, b in zip(many, alone, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    arguments = parser.parse_args()
    choose_matmul_precision()
    tokenizer, model = load_tokenizer(tiny_path()), load_model(tiny_path()).eval()
    batched(model, tokenizer, 2, arguments.batch_tokens)
    figures: dict[str, Any] = {"task": TASK, "items": arguments.limit, "batch_tokens": arguments.batch_tokens}
    figures["as_it_ends"] = compare(model, tokenizer, arguments.limit, arguments.batch_tokens)
    never_end(model, tokenizer.eos_token_id)
    figures["full_length"] = compare(model, tokenizer, arguments.limit, arguments.batch_tokens)
    write_result("batched_eval", figures)


if __name__ == "__main__":
    main()
