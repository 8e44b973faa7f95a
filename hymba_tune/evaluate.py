"""Score weights outside a run: a checkpoint folder, an adapter, a run directory, a hub id or `tiny`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.evaluation.catalogue import find_tasks
from hymba_tune.evaluation.suite import answer_share, run_suite
from hymba_tune.launch import launch
from hymba_tune.topology import Topology, find_config
from hymba_tune.weights import find_weights, load_weights


def evaluate(
    name: str,
    tasks: Sequence[str],
    out_dir: Path,
    *,
    limit: int | None,
    data: Path | None,
    max_new_tokens: int | None,
    processes: int = 1,
) -> None:
    """Run tasks on the weights called `name`, write a file a task into `out_dir` and print the scores.

    Several processes share the batches, each on its own device; this one takes their answers over and scores them.

    Raises UserError for unknown tasks or unusable weights; nothing is written then.
    """
    find_tasks(tasks)
    find_weights(name)
    settings = {"limit": limit, "data": None if data is None else str(data), "max_new_tokens": max_new_tokens}
    if processes > 1:
        reports = out_dir / "ranks"
        request = [name, json.dumps(list(tasks)), str(out_dir), json.dumps(settings)]
        launch("hymba_tune.evaluate:evaluate_share", request, Topology(find_config("ddp"), processes), reports)
    results = _with_progress(run_suite, name, tasks, out_dir, settings)
    Console().print(_table(results), f"\n{escape(str(out_dir))}")


def evaluate_share(name: str, tasks: str, out_dir: str, settings: str) -> None:
    """One process' share of `evaluate`; tasks and settings as JSON. Rank and world size stand in the environment."""
    share = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    answer = partial(answer_share, share=share)
    _with_progress(answer, name, json.loads(tasks), Path(out_dir), json.loads(settings))


def _with_progress(
    work: Callable[..., Any], name: str, tasks: Sequence[str], out_dir: Path, settings: dict[str, Any]
) -> Any:
    weights = find_weights(name)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model = load_weights(weights, device).eval()
    with Progress(transient=True) as progress:
        bars = {task: progress.add_task(task, total=None) for task in find_tasks(tasks)}

        def show(task: str, done: int, total: int) -> None:
            progress.update(bars[task], completed=done, total=total)

        return work(model, load_tokenizer(weights.tokenizer), tasks, out_dir, progress=show, **settings)


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("task", "metric", "score", "n", "note", box=None, pad_edge=False)
    for result in results:
        if result["not_run"]:
            table.add_row(result["task"], "", "not run", "", escape(result["not_run"]))
        for metric, score in result["metrics"].items():
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.2%}"
            table.add_row(result["task"], metric, f"{score['value']:.2%}{error}", str(score["n"]), result["suspect"])
    return table
