"""MMLU's likelihoods on the tiny model: what requests share computed once, against every request by itself.

    HYMBA_TUNE_DATA=FOLDER python -m benchmarks.mmlu_likelihood [--questions 40]

Claim (float32): several times faster, with the same likelihoods. A question is four requests (the letters) that differ
in their last token; the questions of a subject begin with the same five shots. `shared` computes the shots of a subject
once and one row a question, `alone` every request from its first token. Prompts are encoded before either is timed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.record import write_result
from hymba_tune.data.chat import load_tokenizer
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.likelihood import Likelihood, loglikelihood_as_finished
from hymba_tune.evaluation.mmlu import mmlu_splits, run_mmlu
from hymba_tune.model import load_model
from hymba_tune.tiny import tiny_path

SUBJECTS = ("abstract_algebra", "computer_security", "high_school_geography", "professional_medicine")
BATCH_TOKENS = 16_384
"""As in run_suite."""


def mmlu_requests(engine: Engine, questions: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of the first questions of each subject, four a question."""
    splits, requests = mmlu_splits(None), []

    def keep(asked: list[tuple[list[int], list[int]]]) -> list[Likelihood]:
        requests.extend(asked)
        return [(0.0, False)] * len(asked)

    engine.loglikelihood = keep  # type: ignore[method-assign,assignment]
    test = [row for name in SUBJECTS for row in [r for r in splits["test"] if r["subject"] == name][:questions]]
    run_mmlu("mmlu", engine, splits | {"test": test}, None)
    return requests


def shared(model: Any, requests: list[Any]) -> list[Likelihood]:
    found = dict(loglikelihood_as_finished(model, requests, batch_tokens=BATCH_TOKENS))
    return [found[index] for index in range(len(requests))]


def alone(model: Any, requests: list[Any]) -> list[Likelihood]:
    return [found for request in requests for _, found in loglikelihood_as_finished(model, [request])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40, help="of each subject")
    tokenizer, model = load_tokenizer(tiny_path()), load_model(tiny_path()).eval()
    requests = mmlu_requests(Engine(model, tokenizer), parser.parse_args().questions)
    figures: dict[str, Any] = {"likelihoods": len(requests)}
    figures["tokens"] = sum(len(context) + len(continuation) for context, continuation in requests)
    values = []
    for name, work in (("shared", shared), ("alone", alone)):
        work(model, requests[:8])
        clock, processor = time.perf_counter(), time.process_time()
        values.append(torch.tensor([logprob for logprob, _ in work(model, requests)]))
        figures[f"seconds_{name}"] = {
            "clock": time.perf_counter() - clock,
            "processor": time.process_time() - processor,
        }
    figures["ratio"] = {
        kind: figures["seconds_alone"][kind] / seconds for kind, seconds in figures["seconds_shared"].items()
    }
    figures["largest_difference_nats"] = float((values[0] - values[1]).abs().max())
    write_result("mmlu_likelihood", figures)


if __name__ == "__main__":
    main()
