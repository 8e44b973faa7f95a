"""Runs a task of lm-eval over our engine: its prompts, shots, filters and verdicts, our rows, batching and results."""

import importlib.util
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from hymba_tune.errors import UserError
from hymba_tune.evaluation.cache import prompt_fingerprint
from hymba_tune.evaluation.engine import Engine

Splits = Mapping[str, Sequence[dict[str, Any]]]
"""Rows by split name."""

TASKS = Path(__file__).with_name("tasks")
FEWSHOT_SEED = 1234
"""lm-eval's default: one generator draws the shots of all documents in order."""
GLOBAL_SEED = 0
"""lm-eval's default for the global `random`, which some tasks shuffle choices with."""


@dataclass
class Sample:
    """One document as lm-eval asked and judged it.

    filtered and scores: by filter name; responses: raw, one a request (text, or (log-likelihood, is greedy));
    continuations: what the likelihoods are of; target: the reference as lm-eval logs it.
    """

    doc_id: int
    doc: dict[str, Any]
    prompt_sha256: str
    question: str
    responses: list[Any]
    continuations: list[str]
    target: Any
    dropped_prompt_tokens: int = 0
    finish_reason: str | None = None
    filtered: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def read_task(name: str) -> dict[str, Any]:
    """The lm-eval configuration tasks/NAME.yaml, what it includes filled in."""
    config: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    base = config.pop("include", None)
    return read_task(base.removesuffix(".yaml")) | config if base else config


def run_tasks(engine: Engine, tasks: Mapping[str, tuple[dict[str, Any], Splits]]) -> dict[str, list[Sample]]:
    """The samples of every task, in the order of its documents; the requests of all tasks are batched together.

    Args:
        tasks: by name, an lm-eval task configuration and the rows that replace its data set.

    Raises LmEvalNotInstalled.
    """
    require_lm_eval()
    from lm_eval.evaluator import evaluate

    from hymba_tune.evaluation.lm import HymbaLM

    random.seed(GLOBAL_SEED)
    with _quiet(), _templates_kept():
        built = {name: _build(name, config, splits) for name, (config, splits) in tasks.items()}
        model = HymbaLM(engine)
        results = evaluate(
            model,
            {"tasks": built},
            bootstrap_iters=0,
            apply_chat_template=engine.has_chat_template,
            fewshot_as_multiturn=engine.has_chat_template,
        )
        return {name: list(_samples(results["samples"][name], task, model)) for name, task in built.items()}


def _build(name: str, config: dict[str, Any], splits: Splits) -> Any:
    """lm-eval's task; its rows are ours, its shots drawn from the start of its generator."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = datasets.DatasetDict({split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()})
    task = ConfigurableTask(config=config | {"task": name, "custom_dataset": lambda **_: rows})
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


class LmEvalNotInstalled(UserError):
    """The package is an extra; tasks that need it are reported as not run."""


def require_lm_eval() -> None:
    """Raises LmEvalNotInstalled."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LmEvalNotInstalled('lm-eval is not installed; this task needs it: pip install "hymba-tune[eval]"')


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's own progress bars and notes would write over the caller's."""
    from lm_eval.api import task as task_module

    logger, bar = logging.getLogger("lm_eval"), task_module.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar


@contextmanager
def _templates_kept() -> Iterator[None]:
    """lm-eval compiles a task's template again for every document and shot: most of its time."""
    from lm_eval import utils

    compile_template = utils.env.from_string
    utils.env.from_string = lru_cache(maxsize=1024)(compile_template)
    try:
        yield
    finally:
        utils.env.from_string = compile_template


def _samples(logged: Sequence[dict[str, Any]], task: Any, model: Any) -> Iterator[Sample]:
    """lm-eval logs a document once a filter; here it comes once."""
    samples: dict[int, Sample] = {}
    for entry in logged:
        context = entry["arguments"][0][0]
        answer = model.answers.get(context)
        sample = samples.setdefault(
            entry["doc_id"],
            Sample(
                doc_id=entry["doc_id"],
                doc=entry["doc"],
                prompt_sha256=prompt_fingerprint(model.tok_encode(context)),
                question=str(task.doc_to_text(entry["doc"])).strip(),
                responses=[response for responses in entry["resps"] for response in responses],
                continuations=[arguments[1] for arguments in entry["arguments"] if isinstance(arguments[1], str)],
                target=entry["target"],
                dropped_prompt_tokens=answer.dropped_prompt_tokens if answer else 0,
                finish_reason=answer.finish_reason if answer else None,
            ),
        )
        sample.filtered[entry["filter"]] = entry["filtered_resps"]
        sample.scores[entry["filter"]] = {metric: entry[metric] for metric in entry["metrics"]}
    yield from (samples[doc_id] for doc_id in sorted(samples))
