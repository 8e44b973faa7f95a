"""Score weights outside a run: a checkpoint folder, an adapter, a run directory, a hub id or `tiny`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.evaluation.catalogue import find_tasks
from hymba_tune.evaluation.suite import run_suite
from hymba_tune.weights import find_weights, load_weights


def evaluate(
    name: str, tasks: Sequence[str], out_dir: Path, *, limit: int | None, data: Path | None, max_new_tokens: int | None
) -> None:
    """Run tasks on the weights called `name`, write a file a task into `out_dir` and print the scores.

    Raises UserError for unknown tasks or unusable weights; nothing is written then.
    """
    names = find_tasks(tasks)
    weights = find_weights(name)
    tokenizer = load_tokenizer(weights.tokenizer)
    model = load_weights(weights, "cuda" if torch.cuda.is_available() else "cpu").eval()
    with Progress(transient=True) as progress:
        bars = {task: progress.add_task(task, total=None) for task in names}
        results = run_suite(
            model,
            tokenizer,
            tasks,
            out_dir,
            limit=limit,
            data=data,
            max_new_tokens=max_new_tokens,
            progress=lambda task, done, total: progress.update(bars[task], completed=done, total=total),
        )
    Console().print(_table(results), f"\n{escape(str(out_dir))}")


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("task", "metric", "score", "n", "note", box=None, pad_edge=False)
    for result in results:
        if result["not_run"]:
            table.add_row(result["task"], "", "not run", "", escape(result["not_run"]))
        for metric, score in result["metrics"].items():
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.2%}"
            table.add_row(result["task"], metric, f"{score['value']:.2%}{error}", str(score["n"]), result["suspect"])
    return table
