"""Runs tasks one after the other into one file each; what is finished or answered is not done again.

A task's file is kept while its settings (model, tokenizer, protocol, data, limits) are the same; answers are kept one
by one in `answers.jsonl` beside the files, so a suite that was cut off goes on with the next unanswered prompt.

Several processes: each answers its share of every task's requests; the first waits for the others' answers and scores.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.evaluation.cache import AnswerCache, PartCache, text_fingerprint
from hymba_tune.evaluation.catalogue import Task, find_tasks
from hymba_tune.evaluation.engine import Engine, Work
from hymba_tune.evaluation.generate import WHOLE, Share
from hymba_tune.evaluation.harness import LmEvalNotInstalled
from hymba_tune.evaluation.results import finished_result, not_run_result, read_result, write_result

TaskProgress = Callable[[str, int, int], None]
"""Called with (task, requests finished, requests in all)."""

Result = dict[str, Any]

ANSWERS = "answers.jsonl"
BATCH_TOKENS = 16_384


def run_suite(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    out_dir: str | Path,
    *,
    limit: int | None = None,
    data: str | Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int | None = None,
    progress: TaskProgress | None = None,
    share: Share = WHOLE,
) -> list[Result]:
    """The results of tasks (tasks, suites, files: catalogue.find_tasks), in order, also written to `out_dir`/TASK.json.

    Args:
        limit: the first so many items of each task (of each category or part where it has some; MMLU: of its subjects
            in turn); None for all.
        data: folder with benchmark files; None for HYMBA_TUNE_DATA, else the hub.
        batch_tokens: most tokens of a batch (it changes speed and memory, not answers).
        max_new_tokens: a cap on each task's own limit, for models that do not stop.
        share: of several processes that run the same, each one's; all but the first return and write no results. Call
            collect_shares before the first of them starts, so that all find the same requests unanswered, and again
            after the last.

    Raises UserError for an unknown task or broken data. Data that is not there makes a result that says so.
    """
    found, out_dir = find_tasks(tasks), Path(out_dir)
    cache = _cache(out_dir, share)
    engine = Engine(model, tokenizer, cache, batch_tokens, max_new_tokens, share=share)
    results = []
    try:
        for name, task in found.items():
            engine.progress = partial(progress, name) if progress is not None else None
            engine.work = Work()
            result = _run_or_reuse(engine, name, task, out_dir, limit, data)
            if share[0] == 0:
                write_result(out_dir / f"{name}.json", result)
                results.append(result)
    finally:
        cache.close()
    return results


def collect_shares(out_dir: Path) -> None:
    """Take over the answers that several processes left in `out_dir`."""
    cache = AnswerCache(out_dir / ANSWERS)
    for part in sorted(out_dir.glob("answers-*.jsonl")):
        cache.take_over(part)
    cache.close()


def _cache(out_dir: Path, share: Share) -> AnswerCache:
    process, processes = share
    if share == WHOLE:
        collect_shares(out_dir)
        return AnswerCache(out_dir / ANSWERS)
    parts = [out_dir / f"answers-{number}.jsonl" for number in range(processes)]
    return PartCache(out_dir / ANSWERS, parts, process)


def _run_or_reuse(
    engine: Engine, name: str, task: Task, out_dir: Path, limit: int | None, data: str | Path | None
) -> Result:
    """A task's result: the earlier one where it stands; engine.work is what was spent on it so far."""
    settings = engine.settings() | {"limit": limit}
    try:
        rows = task.rows(data)
    except (BenchmarkNotFound, LmEvalNotInstalled) as reason:
        return not_run_result(name, task.protocol, settings, str(reason))
    settings["data"] = text_fingerprint(json.dumps(rows, sort_keys=True, default=str))
    earlier = read_result(out_dir / f"{name}.json")
    if earlier and _stands(earlier, task, settings):
        return earlier
    scores, work = task.run(engine, rows, limit), engine.work
    result = finished_result(name, task.protocol, task.headline, settings, scores, work.seconds, work.new_tokens)
    return result | {"parts_not_run": task.missing(data)}


def _stands(earlier: Result, task: Task, settings: dict[str, Any]) -> bool:
    """Whether an earlier result is what the task would find again."""
    return earlier["not_run"] is None and (earlier["protocol"], earlier["settings"]) == (task.protocol, settings)
