"""IFEval: does an answer follow its prompt's verifiable instructions? lm-eval asks and checks; four accuracies.

strict judges the answer as it is; loose also without its first line, last line, both, and asterisks, and takes the
best. prompt_* counts prompts all of whose instructions are followed, instruction_* counts instructions. `mean` is the
mean of the four: Hymba's published 57.14 is no n/541 and no n/834, and NVIDIA's Minitron paper (arXiv 2408.11796)
reports that mean.

The checks draw at random where a prompt leaves a value open (keys 1122 and 1129) and inside langdetect; both are seeded
here. Several of lm-eval's patterns take quadratic time: only the first MAX_SCORED_CHARS of an answer are checked, and a
run of more than MAX_RUN equal characters counts as MAX_RUN.
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound, benchmark_rows, data_folder
from hymba_tune.errors import UserError
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import Sample, require_lm_eval, run_tasks
from hymba_tune.evaluation.results import Metric, Scores, bootstrap_metric, mean_metric

PROTOCOL = "IFEval 541 prompts, 0-shot chat, greedy, 1280 new tokens, lm-eval 0.4.13 checks, mean of four v1"
HEADLINE = "mean"
MODES = ("strict", "loose")
SEED = 0
MAX_SCORED_CHARS = 32_768
MAX_RUN = 1_000
_RUN = re.compile(rf"(.)\1{{{MAX_RUN},}}", re.DOTALL)

Row = dict[str, Any]
Followed = dict[str, list[bool]]
"""By mode, whether each instruction is followed."""


def ifeval_rows(data: str | Path | None) -> list[Row]:
    """The prompts: key, prompt, instruction_id_list, kwargs.

    Raises BenchmarkNotFound without the prompts or NLTK's sentence model, LmEvalNotInstalled, UserError for a broken
    prompt.
    """
    require_lm_eval()
    _find_sentence_model(data)
    rows = benchmark_rows("ifeval", "test", data)
    known = _registry()
    for row in rows:
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
            raise UserError(f"ifeval: prompt {row.get('key')!r}: needs as many kwargs as instruction_id_list has names")
        if not known.issuperset(names):
            raise UserError(f"ifeval: prompt {row.get('key')!r}: unknown instruction in {names}")
    return rows


def run_ifeval(engine: Engine, rows: Sequence[Row], limit: int | None) -> Scores:
    """The first `limit` prompts (None: all)."""
    samples = run_tasks(engine, {"ifeval": (_config(), {"test": rows[:limit]})})["ifeval"]
    return Scores(aggregate([_followed(sample) for sample in samples]), [_item(sample) for sample in samples])


def check_answer(doc: Row, answer: str) -> Followed:
    """Whether the answer follows each of the prompt's instructions, by mode.

    An answer on which a check fails for its nesting (a JSON text 1,000 brackets deep) does not follow it.
    """
    found: Followed = {mode: [] for mode in MODES}
    answer = _RUN.sub(lambda run: run[1] * MAX_RUN, answer[:MAX_SCORED_CHARS])
    for name, arguments in zip(doc["instruction_id_list"], doc["kwargs"], strict=True):
        one = {"key": doc["key"], "prompt": doc["prompt"], "instruction_id_list": [name], "kwargs": [arguments]}
        verdict = _check_one(one, answer)
        for mode in MODES:
            found[mode].append(verdict[mode])
    return found


def _check_one(doc: Row, answer: str) -> dict[str, bool]:
    from lm_eval.tasks.ifeval import utils

    with _seeded():
        try:
            verdict = utils.process_results(doc, [answer])
        except RecursionError:
            return dict.fromkeys(MODES, False)
    return {mode: bool(verdict[f"inst_level_{mode}_acc"][0]) for mode in MODES}


@contextmanager
def _seeded() -> Iterator[None]:
    """Fixed draws in the checks, and no lm-eval notes that repeat the whole answer."""
    import langdetect

    logger = logging.getLogger("lm_eval.tasks.ifeval.instructions")
    state, seed, disabled = random.getstate(), langdetect.DetectorFactory.seed, logger.disabled
    random.seed(SEED)
    langdetect.DetectorFactory.seed = SEED
    logger.disabled = True
    try:
        yield
    finally:
        random.setstate(state)
        langdetect.DetectorFactory.seed, logger.disabled = seed, disabled


def aggregate(followed: Sequence[Followed]) -> dict[str, Metric]:
    """The four accuracies and their mean; standard errors resample prompts, whose instructions go together."""
    metrics = {"mean": bootstrap_metric(_mean_of_four, followed)}
    instructions = sum(len(one[MODES[0]]) for one in followed)
    for mode in MODES:
        metrics[f"prompt_{mode}"] = mean_metric([float(all(one[mode])) for one in followed])
        by_prompt = bootstrap_metric(partial(_instruction_accuracy, mode=mode), followed)
        metrics[f"instruction_{mode}"] = replace(by_prompt, n=instructions)
    return metrics


def _instruction_accuracy(followed: Sequence[Followed], mode: str) -> float:
    verdicts = [verdict for one in followed for verdict in one[mode]]
    return sum(verdicts) / len(verdicts)


def _mean_of_four(followed: Sequence[Followed]) -> float:
    prompts = [sum(all(one[mode]) for one in followed) / len(followed) for mode in MODES]
    return (sum(prompts) + sum(_instruction_accuracy(followed, mode) for mode in MODES)) / (2 * len(MODES))


def _config() -> dict[str, Any]:
    """lm-eval's own task, with the checks seeded and bounded."""
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "doc_to_target": 0,
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 1280},
        "process_results": lambda doc, results: check_answer(doc, results[0]),
        "metric_list": [{"metric": mode, "aggregation": len, "higher_is_better": True} for mode in MODES],
    }


def _followed(sample: Sample) -> Followed:
    (scores,) = sample.scores.values()
    return {mode: list(scores[mode]) for mode in MODES}  # type: ignore[call-overload]  # our hook returns lists


def _item(sample: Sample) -> Row:
    followed, answer, names = _followed(sample), sample.responses[0], sample.doc["instruction_id_list"]
    missed = [name for name, right in zip(names, followed["strict"], strict=True) if not right]
    cut = f"; only its first {MAX_SCORED_CHARS} characters were checked" if len(answer) > MAX_SCORED_CHARS else ""
    return {
        "id": f"ifeval/{sample.doc['key']}",
        "prompt_sha256": sample.prompt_sha256,
        "prompt": sample.question,
        "answer": answer,
        "extracted": "whole answer" if answer.strip() else None,
        "target": names,
        "verdict": {f"prompt_{mode}": float(all(followed[mode])) for mode in MODES} | followed,
        "why": (f"not followed: {', '.join(missed)}" if missed else "all followed") + cut,
        "finish_reason": sample.finish_reason,
        "dropped_prompt_tokens": sample.dropped_prompt_tokens,
    }


def _find_sentence_model(data: str | Path | None) -> None:
    """Puts the data folder's nltk_data on NLTK's path; raises BenchmarkNotFound, before lm-eval tries to download."""
    import nltk

    folder = data_folder(data)
    if folder and str(folder / "nltk_data") not in nltk.data.path:
        nltk.data.path.append(str(folder / "nltk_data"))
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise BenchmarkNotFound(
            "ifeval: NLTK's punkt_tab is missing; run `python -m nltk.downloader punkt_tab`, or put it in nltk_data/"
            "tokenizers of the folder that eval.data names, or set NLTK_DATA"
        ) from None


@cache
def _registry() -> frozenset[str]:
    """The names of lm-eval's instructions."""
    from lm_eval.tasks.ifeval import instructions_registry

    return frozenset(instructions_registry.INSTRUCTION_DICT)
