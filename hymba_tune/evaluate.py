"""Score weights outside a run: a checkpoint folder, an adapter, a run directory, a hub id or `tiny`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from hymba_tune.data.chat import load_tokenizer
from hymba_tune.errors import UserError
from hymba_tune.evaluation.catalogue import task_names
from hymba_tune.evaluation.suite import run_suite
from hymba_tune.model import load_model
from hymba_tune.model.adapter import load_adapter, merge_adapter
from hymba_tune.run_dir import RunDir
from hymba_tune.tiny import tiny_path


def evaluate(
    name: str, tasks: Sequence[str], out_dir: Path, *, limit: int | None, data: Path | None, max_new_tokens: int | None
) -> None:
    """Run tasks on the weights called `name`, write a file a task into `out_dir` and print the scores.

    Raises UserError for unknown tasks or unusable weights; nothing is written then.
    """
    names = task_names(tasks)
    folder = weights_folder(name)
    tokenizer = load_tokenizer(folder)
    model = _load(folder)
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


def weights_folder(name: str) -> str:
    """The folder or hub id behind a name; of a run directory its adapter or model."""
    if name == "tiny":
        return str(tiny_path())
    run = RunDir(name)
    if run.recipe.exists() and not (run.adapter.exists() or run.model.exists()):
        raise UserError(f"{name}: this run has no weights yet; the command that started it goes on with it")
    return next((str(part) for part in (run.adapter, run.model) if part.exists()), name)


def _load(folder: str) -> Any:
    """The model, with an adapter folded into the weights it was trained on."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Path(folder) / "adapter_config.json"
    if not settings.exists():
        return load_model(folder, device=device).eval()
    base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return merge_adapter(load_adapter(load_model(base, device=device), folder)).eval()


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table("task", "metric", "score", "n", "note", box=None, pad_edge=False)
    for result in results:
        if result["not_run"]:
            table.add_row(result["task"], "", "not run", "", escape(result["not_run"]))
        for metric, score in result["metrics"].items():
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.2%}"
            table.add_row(result["task"], metric, f"{score['value']:.2%}{error}", str(score["n"]), result["suspect"])
    return table
