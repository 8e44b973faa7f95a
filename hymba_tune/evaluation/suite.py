"""Runs tasks one after the other into one file each; what is finished or answered is not done again.

A task's file is kept while its settings (model, tokenizer, protocol, data, limits) are the same; answers are kept one
by one in `answers.jsonl` beside the files, so a suite that was cut off goes on with the next unanswered prompt.

Several processes: each answers its share of every task's batches (`answer_share`), and then one takes the answers over
and scores them (`run_suite`).
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.evaluation.cache import AnswerCache, PartCache, text_fingerprint
from hymba_tune.evaluation.catalogue import Task, find_tasks
from hymba_tune.evaluation.engine import Engine, Work
from hymba_tune.evaluation.generate import Share
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
) -> list[Result]:
    """The results of tasks (tasks, suites, files: catalogue.find_tasks), in order, also written to `out_dir`/TASK.json.

    Args:
        limit: the first so many items of each task (of each category or part where it has some; MMLU: of its subjects
            in turn); None for all.
        data: folder with benchmark files; None for HYMBA_TUNE_DATA, else the hub.
        batch_tokens: most tokens of a batch (it changes speed and memory, not answers).
        max_new_tokens: a cap on each task's own limit, for models that do not stop.

    Raises UserError for an unknown task or broken data. Data that is not there makes a result that says so.
    """
    found, out_dir = find_tasks(tasks), Path(out_dir)
    spent = collect_shares(out_dir)
    cache = AnswerCache(out_dir / ANSWERS)
    engine = Engine(model, tokenizer, cache, batch_tokens, max_new_tokens)
    results = []
    try:
        for name, task in found.items():
            engine.progress = partial(progress, name) if progress is not None else None
            engine.work = spent.get(name, Work())
            result = _run_or_reuse(engine, name, task, out_dir, limit, data)
            write_result(out_dir / f"{name}.json", result)
            results.append(result)
    finally:
        cache.close()
    return results


def answer_share(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    out_dir: str | Path,
    share: Share,
    *,
    limit: int | None = None,
    data: str | Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int | None = None,
    progress: TaskProgress | None = None,
) -> None:
    """One of several processes' answers to tasks, in a file of its own that run_suite takes over; else as run_suite.

    Call collect_shares before the first of them starts, so that all of them find the same requests unanswered.
    """
    found, out_dir = find_tasks(tasks), Path(out_dir)
    cache = PartCache(out_dir / ANSWERS, out_dir / f"answers-{share[0]}.jsonl")
    engine = Engine(model, tokenizer, cache, batch_tokens, max_new_tokens, share=share)
    spent: dict[str, Any] = {}
    try:
        for name, task in found.items():
            engine.progress = partial(progress, name) if progress is not None else None
            engine.work = Work()
            _run_or_reuse(engine, name, task, out_dir, limit, data)
            spent[name] = asdict(engine.work)
            (out_dir / f"work-{share[0]}.json").write_text(json.dumps(spent), encoding="utf-8")
    finally:
        cache.close()


def collect_shares(out_dir: Path) -> dict[str, Work]:
    """Take over what processes left in `out_dir`: their answers, and each task's work, over all of them."""
    cache = AnswerCache(out_dir / ANSWERS)
    spent: dict[str, Work] = defaultdict(Work)
    for part in sorted(out_dir.glob("answers-*.jsonl")):
        cache.take_over(part)
    cache.close()
    for file in sorted(out_dir.glob("work-*.json")):
        for name, work in json.loads(file.read_text(encoding="utf-8")).items():
            spent[name].seconds = max(spent[name].seconds, work["seconds"])
            spent[name].new_tokens += work["new_tokens"]
        file.unlink()
    return spent


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
