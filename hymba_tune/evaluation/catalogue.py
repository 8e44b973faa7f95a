"""Every task by its name, and the suites they form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError
from hymba_tune.evaluation import (
    bfcl,
    embedded,
    gpqa,
    gsm8k,
    ifeval,
    mmlu,
    multiple_choice,
    own_items,
    own_lm_eval,
    rolebench,
    scorers,
)
from hymba_tune.evaluation.bfcl_questions import bfcl_rows
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import require_lm_eval
from hymba_tune.evaluation.results import Scores
from hymba_tune.paths import task_file

Data = str | Path | None


def _nothing_missing(data: Data) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Task:
    """A benchmark under a protocol.

    rows: reads everything the task takes from the data folder or the hub (JSON values, given to `run` and
        fingerprinted); raises BenchmarkNotFound or LmEvalNotInstalled where the task cannot run.
    run: (engine, rows, limit) -> scores.
    missing: parts of the benchmark that cannot run, and why.
    """

    protocol: str
    headline: str
    rows: Callable[[Data], Any]
    run: Callable[[Engine, Any, int | None], Scores]
    missing: Callable[[Data], dict[str, str]] = _nothing_missing


def _with_lm_eval(read: Callable[[Data], Any]) -> Callable[[Data], Any]:
    """`read`, where lm-eval is installed."""

    def rows(data: Data) -> Any:
        require_lm_eval()
        return read(data)

    return rows


TASKS: dict[str, Task] = {
    **{
        name: Task(
            protocol,
            embedded.HEADLINES[name],
            partial(embedded.held_out_items, name),
            embedded.run_embedded,
        )
        for name, protocol in embedded.PROTOCOLS.items()
    },
    **{
        name: Task(protocol, gsm8k.HEADLINE, _with_lm_eval(gsm8k.gsm8k_splits), partial(gsm8k.run_gsm8k, name))
        for name, protocol in gsm8k.PROTOCOLS.items()
    },
    **{
        name: Task(protocol, multiple_choice.METRIC, _with_lm_eval(mmlu.mmlu_splits), partial(mmlu.run_mmlu, name))
        for name, protocol in mmlu.PROTOCOLS.items()
    },
    "gpqa": Task(gpqa.PROTOCOL, multiple_choice.METRIC, _with_lm_eval(gpqa.gpqa_questions), gpqa.run_gpqa),
    "ifeval": Task(ifeval.PROTOCOL, ifeval.HEADLINE, ifeval.ifeval_rows, ifeval.run_ifeval),
    **{
        name: Task(protocol, bfcl.HEADLINE, bfcl_rows, partial(bfcl.run_bfcl, name), lambda data: dict(bfcl.NOT_RUN))
        for name, protocol in bfcl.PROTOCOLS.items()
    },
    **{
        name: Task(
            protocol,
            rolebench.HEADLINE,
            partial(rolebench.rolebench_rows, name),
            partial(rolebench.run_rolebench, name),
            partial(rolebench.missing_parts, name),
        )
        for name, protocol in rolebench.PROTOCOLS.items()
    },
}

SUITES: dict[str, tuple[str, ...]] = {
    "paper": ("mmlu", "ifeval", "gsm8k", "gpqa", "bfcl_v2"),
    "rolebench": ("rolebench_instruction", "rolebench_role"),
    "tiny": ("tiny_math", "tiny_code", "tiny_calls"),
}
"""`paper` is what table 4 of the paper reports, `rolebench` its table 5."""


def find_tasks(names: Sequence[str]) -> dict[str, Task]:
    """Names of tasks, suites and files of one's own -> tasks by name, each once.

    A file is FILE.jsonl:SCORER (own_items.py) or an lm-eval task FILE.yaml (own_lm_eval.py); its stem is its name.

    Raises UserError for a name that is none of these, and for a file that cannot be used.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        file = task_file(name)
        if file is not None:
            own_name, task = _own_task(name, *file)
            if own_name in TASKS or own_name in tasks:
                raise UserError(f"eval.suites: {name}: there is a task {own_name} already; rename the file")
            tasks[own_name] = task
        elif name in TASKS or name in SUITES:
            tasks |= {task_name: TASKS[task_name] for task_name in SUITES.get(name, (name,))}
        else:
            raise UserError(
                f"eval.suites: no suite or task {name}; there are {', '.join([*SUITES, *TASKS])}, and files of your "
                "own: FILE.jsonl:SCORER, or an lm-eval task FILE.yaml"
            )
    return tasks


def _own_task(name: str, file: str, scorer: str) -> tuple[str, Task]:
    path = Path(file)
    if path.suffix == ".jsonl" and scorer not in scorers.SCORERS:
        raise UserError(
            f"eval.suites: {name}: {f'no scorer {scorer}' if scorer else 'needs a scorer'}; write {file}:SCORER with "
            f"one of {', '.join(scorers.SCORERS)}"
        )
    if not path.is_file():
        raise UserError(f"eval.suites: no file {path}; check the path")
    if scorer:
        rows = own_items.own_rows(path, scorer)
        protocol = f"{path.name}, scorer {scorer}, 0-shot chat, greedy, {own_items.MAX_NEW_TOKENS} new tokens v1"
        run = partial(own_items.run_own_items, scorer)
        return path.stem, Task(protocol, own_items.HEADLINES[scorer], lambda data: rows, run)
    config = own_lm_eval.own_config(path)
    return path.stem, Task(
        f"{path.name}, an lm-eval task, greedy v1",
        own_lm_eval.headline(config),
        _with_lm_eval(lambda data: own_lm_eval.own_lm_eval_rows(path, config)),
        partial(own_lm_eval.run_own_lm_eval, path.stem),
    )
