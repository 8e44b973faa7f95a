"""GSM8K on the tiny model: our batched suite against lm-eval's own hf backend at batch size 1.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.batched_eval [--limit 200] [--processes 2]

Both sides run the same task (gsm8k_upstream: five chat shots, at most 256 new tokens) on the same model, in float32,
from reading the rows to the scores; models are loaded before. Ours deals the questions out to processes of one thread,
as `hymba-tune eval --processes` does; lm-eval's has the same cores as threads. Claim: the same answers, faster.

    as_it_ends      the tiny model ends most answers after a few tokens: reading prompts of 1,600 tokens is most of the
                    work, and takes as long in a batch as alone
    full_length     end of sequence is never chosen, as by a model that does not stop: every answer has 256 tokens
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from functools import cache, partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write_result
from hymba_tune.data.chat import load_tokenizer
from hymba_tune.evaluation.gsm8k import gsm8k_splits, process_results
from hymba_tune.evaluation.harness import FEWSHOT_SEED, read_task
from hymba_tune.evaluation.suite import collect_shares, run_suite
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


@cache
def loaded(ends: bool) -> tuple[Any, Any]:
    """The tiny model, which never chooses the end of the sequence unless it `ends`, and its tokenizer."""
    tokenizer, model = load_tokenizer(tiny_path()), load_model(tiny_path()).eval()
    if not ends:
        never_end(model, tokenizer.eos_token_id)
    return model, tokenizer


def share(
    number: int, of: int, ends: bool, folder: Path, limit: int, batch_tokens: int
) -> tuple[list[dict[str, Any]], float]:
    """In a process of its own, its share of the suite: the results, if it is the first; its processor seconds."""
    torch.set_num_threads(1)
    choose_matmul_precision()
    model, tokenizer = loaded(ends)
    timer = Timer()
    results = run_suite(model, tokenizer, [TASK], folder, limit=limit, batch_tokens=batch_tokens, share=(number, of))
    return results, timer.seconds()["processor"]


def batched(
    pool: Pool, processes: int, ends: bool, limit: int, batch_tokens: int
) -> tuple[list[str], dict[str, float]]:
    """Answers of our suite, and its seconds."""
    timer = Timer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collect_shares(folder)
        run = partial(share, of=processes, ends=ends, folder=folder, limit=limit, batch_tokens=batch_tokens)
        ([result], _), *_ = of_each = pool.map(run, range(processes), chunksize=1)
    clock = timer.seconds()["clock"]
    seconds = {"clock": clock, "processor": sum(processor for _, processor in of_each)}
    return [item["answer"] for item in result["items"]], seconds


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


def compare(pool: Pool, processes: int, ends: bool, limit: int, batch_tokens: int) -> dict[str, Any]:
    batched(pool, processes, ends, 2 * processes, batch_tokens // 100)  # every process loads its model
    many, seconds = batched(pool, processes, ends, limit, batch_tokens)
    model, tokenizer = loaded(ends)
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=212_992)
    arguments = parser.parse_args()
    processes, batch_tokens = arguments.processes, arguments.batch_tokens
    choose_matmul_precision()
    figures: dict[str, Any] = {"task": TASK, "items": arguments.limit, "batch_tokens": batch_tokens}
    figures["processes"] = processes
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for name, ends in (("as_it_ends", True), ("full_length", False)):
            figures[name] = compare(pool, processes, ends, arguments.limit, batch_tokens)
    write_result("batched_eval", figures)


if __name__ == "__main__":
    main()
