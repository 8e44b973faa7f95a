"""Score weights outside a run: a checkpoint folder, an adapter, a run directory, a hub id or `tiny`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from hymba_tune.data.benchmarks import BenchmarkNotFound
from hymba_tune.data.chat import load_tokenizer
from hymba_tune.errors import UserError
from hymba_tune.evaluation.catalogue import Task, find_tasks
from hymba_tune.evaluation.harness import LmEvalNotInstalled
from hymba_tune.evaluation.suite import BATCH_TOKENS, collect_shares, run_suite
from hymba_tune.launch import launch
from hymba_tune.topology import Topology, find_config
from hymba_tune.weights import find_weights, load_weights, own_device


def evaluate(
    name: str,
    tasks: Sequence[str],
    out_dir: Path,
    *,
    limit: int | None,
    data: Path | None,
    max_new_tokens: int | None,
    batch_tokens: int = BATCH_TOKENS,
    processes: int = 1,
) -> None:
    """Run tasks on the weights called `name`, write a file a task into `out_dir` and print the scores.

    Several processes share the work, each on a device of its own; the first of them scores the answers of all.

    Raises UserError for unknown tasks, unusable weights and more processes than GPUs; nothing is written then.
    """
    settings = {"limit": limit, "data": None if data is None else str(data)}
    settings |= {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    request = [name, json.dumps(list(tasks)), str(out_dir), json.dumps(settings)]
    found, _ = find_tasks(tasks), find_weights(name)
    if processes > 1:
        _check_processes(processes)
        _check_rows(found, data)
        _share_out(request, out_dir, processes)
        results = [json.loads((out_dir / f"{task}.json").read_text(encoding="utf-8")) for task in found]
    else:
        results = _with_progress(run_suite, *request)
    Console().print(_table(results), f"\n{escape(str(out_dir))}")


def _share_out(request: Sequence[str], out_dir: Path, processes: int) -> None:
    """Have several processes run a request into `out_dir`; what one raised before any answer leaves nothing."""
    fresh, reports = not out_dir.exists(), out_dir / "ranks"
    collect_shares(out_dir)
    try:
        launch("hymba_tune.evaluate:evaluate_share", request, Topology(find_config("ddp"), processes), reports)
    except UserError:
        answered = any(part.stat().st_size for part in out_dir.glob("answers*.jsonl"))
        if fresh and not answered and any(reports.glob("rank-*.json")):
            shutil.rmtree(out_dir)
        raise
    shutil.rmtree(reports)
    collect_shares(out_dir)


def evaluate_share(*request: str) -> None:
    """One process' share of the request of `evaluate`; rank and world size stand in the environment."""
    _with_progress(partial(run_suite, share=(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))), *request)


def _check_processes(processes: int) -> None:
    devices = torch.cuda.device_count()
    if devices and processes > devices:
        raise UserError(f"--processes: {processes}, but there are {devices} GPUs here; give at most {devices}")


def _check_rows(tasks: Mapping[str, Task], data: Path | None) -> None:
    """Find what is wrong with a file before processes start. What is missing is told with the results."""
    for task in tasks.values():
        with suppress(BenchmarkNotFound, LmEvalNotInstalled):
            task.rows(data)


def _with_progress(work: Callable[..., Any], name: str, tasks: str, out_dir: str, settings: str) -> Any:
    """`work` on the model of a request, whose tasks and settings are JSON, on this process' device."""
    weights, names = find_weights(name), json.loads(tasks)
    model, tokenizer = load_weights(weights, own_device()).eval(), load_tokenizer(weights.tokenizer)
    with Progress(transient=True) as progress:
        bars = {task: progress.add_task(task, total=None) for task in find_tasks(names)}

        def show(task: str, done: int, total: int) -> None:
            progress.update(bars[task], completed=done, total=total)

        return work(model, tokenizer, names, Path(out_dir), progress=show, **json.loads(settings))


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("task", "metric", "score", "n", "note", box=None, pad_edge=False)
    for result in results:
        if result["not_run"]:
            table.add_row(result["task"], "", "not run", "", escape(result["not_run"]))
        for metric, score in result["metrics"].items():
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.2%}"
            table.add_row(result["task"], metric, f"{score['value']:.2%}{error}", str(score["n"]), result["suspect"])
    return table
