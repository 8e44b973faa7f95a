"""A suite: tasks by name, run one after the other into one file each; what is finished or answered is not done again.

A task's file is kept while its settings (model, tokenizer, protocol, data, limits) are the same; answers are kept one
by one in `answers.jsonl` beside the files, so a suite that was cut off goes on with the next unanswered prompt.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.errors import UserError
from hymba_tune.evaluation import embedded, gpqa, gsm8k, mmlu
from hymba_tune.evaluation.cache import AnswerCache, text_fingerprint
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import LmEvalNotInstalled, require_lm_eval
from hymba_tune.evaluation.multiple_choice import METRIC
from hymba_tune.evaluation.results import Scores, finished_result, not_run_result, read_result, write_result

TaskProgress = Callable[[str, int, int], None]
"""Called with (task, requests finished, requests in all)."""


RowsReader = Callable[[str | Path | None], Any]
Runner = Callable[[Engine, Any, int | None], Scores]


@dataclass(frozen=True)
class Task:
    """A benchmark under a protocol.

    rows: reads everything the task takes from the data folder or the hub (JSON values, given to `run` and
        fingerprinted); raises BenchmarkNotFound or LmEvalNotInstalled where the task cannot run.
    run: (engine, rows, limit) -> scores.
    """

    protocol: str
    headline: str
    rows: RowsReader
    run: Runner


def _embedded_task(name: str) -> Task:
    return Task(
        protocol=f"{name}: {embedded.ITEMS} embedded held-out items, exact match v1",
        headline=embedded.METRIC,
        rows=lambda data: embedded.held_out_items(name),
        run=embedded.run_embedded,
    )


def _lm_eval_task(protocol: str, headline: str, rows: RowsReader, run: Runner) -> Task:
    def checked(data: str | Path | None) -> Any:
        require_lm_eval()
        return rows(data)

    return Task(protocol, headline, checked, run)


TASKS: dict[str, Task] = {
    **{
        name: _lm_eval_task(protocol, gsm8k.HEADLINE, gsm8k.gsm8k_splits, partial(gsm8k.run_gsm8k, name))
        for name, protocol in gsm8k.PROTOCOLS.items()
    },
    **{
        name: _lm_eval_task(protocol, METRIC, mmlu.mmlu_splits, partial(mmlu.run_mmlu, name))
        for name, protocol in mmlu.PROTOCOLS.items()
    },
    "gpqa": _lm_eval_task(gpqa.PROTOCOL, METRIC, gpqa.gpqa_questions, gpqa.run_gpqa),
    **{name: _embedded_task(name) for name in embedded.TASKS},
}


def run_suite(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    out_dir: str | Path,
    *,
    limit: int | None = None,
    data: str | Path | None = None,
    batch_tokens: int = 16_384,
    max_new_tokens: int | None = None,
    progress: TaskProgress | None = None,
) -> list[dict[str, Any]]:
    """The results of `tasks`, in order, also written to `out_dir`/TASK.json.

    Args:
        limit: the first so many items of each task (MMLU: of its subjects in turn); None for all.
        data: folder with benchmark files; None for HYMBA_TUNE_DATA, else the hub.
        batch_tokens: most tokens of a batch (it changes speed and memory, not answers).
        max_new_tokens: a cap on each task's own limit, for models that do not stop.

    Raises UserError for an unknown task or broken data. Data that is not there makes a result that says so.
    """
    check_tasks(tasks)
    out_dir = Path(out_dir)
    cache = AnswerCache(out_dir / "answers.jsonl")
    try:
        engine = Engine(model, tokenizer, cache, batch_tokens, max_new_tokens)
        return [_run_or_reuse(engine, name, out_dir / f"{name}.json", limit, data, progress) for name in tasks]
    finally:
        cache.close()


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises UserError if a name is no task's."""
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"eval.suites: no task {name}; there are {', '.join(TASKS)}")


def _run_or_reuse(
    engine: Engine,
    name: str,
    path: Path,
    limit: int | None,
    data: str | Path | None,
    progress: TaskProgress | None,
) -> dict[str, Any]:
    task = TASKS[name]
    settings = engine.settings() | {"limit": limit}
    try:
        rows = task.rows(data)
    except (BenchmarkNotFound, LmEvalNotInstalled) as reason:
        result = not_run_result(name, task.protocol, settings, str(reason))
        write_result(path, result)
        return result
    settings["data"] = text_fingerprint(json.dumps(rows, sort_keys=True, default=str))
    earlier = read_result(path)
    if (
        earlier
        and earlier["not_run"] is None
        and (earlier["protocol"], earlier["settings"]) == (task.protocol, settings)
    ):
        return earlier
    engine.progress = partial(progress, name) if progress is not None else None
    work = engine.start_counting()
    scores = task.run(engine, rows, limit)
    result = finished_result(name, task.protocol, task.headline, settings, scores, work.seconds, work.new_tokens)
    write_result(path, result)
    return result
