"""Every task by its name, and the suites they form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError
from hymba_tune.evaluation import bfcl, embedded, gpqa, gsm8k, ifeval, mmlu, multiple_choice, rolebench
from hymba_tune.evaluation.bfcl_questions import bfcl_rows
from hymba_tune.evaluation.engine import Engine
from hymba_tune.evaluation.harness import require_lm_eval
from hymba_tune.evaluation.results import Scores

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


def _embedded(name: str) -> Task:
    protocol = f"{name}: {embedded.ITEMS} embedded held-out items, exact match v1"
    return Task(protocol, embedded.METRIC, lambda data: embedded.held_out_items(name), embedded.run_embedded)


TASKS: dict[str, Task] = {
    **{name: _embedded(name) for name in embedded.TASKS},
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
    "roleplay": ("rolebench_instruction", "rolebench_role"),
    "tiny": embedded.TASKS,
}
"""`paper` is what table 4 of the paper reports, `roleplay` its table of RoleBench."""


def task_names(names: Sequence[str]) -> list[str]:
    """Names of tasks and suites -> names of tasks, each once.

    Raises UserError for a name that is neither.
    """
    tasks: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in SUITES:
            raise UserError(f"eval.suites: no suite or task {name}; there are {', '.join([*SUITES, *TASKS])}")
        tasks |= dict.fromkeys(SUITES.get(name, (name,)))
    return list(tasks)
