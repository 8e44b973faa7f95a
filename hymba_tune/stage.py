"""One stage of a recipe, from its data to its report, in steps that a second start skips.

    data -> scores before -> training -> scores after -> report

Every step reads files that the step before it wrote, so a stage that was cut anywhere goes on there. Nothing is written
before the recipe, the data and the weights are known to be usable.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote

from rich.console import Console
from rich.progress import Progress, TaskID

from hymba_tune.code_version import weights_code
from hymba_tune.errors import UserError
from hymba_tune.launch import check_launch, launch
from hymba_tune.machines import Alone, Partners
from hymba_tune.numerics import fix_numerics
from hymba_tune.recipe import DATA_KINDS, Recipe, load_recipe
from hymba_tune.run_dir import Moment, RunDir
from hymba_tune.weights import (
    Weights,
    find_weights,
    folder_fingerprint,
    load_weights,
    own_device,
    parent_run,
    save_weights,
    stage_weights,
)
from hymba_tune.workers import end_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

console = Console(stderr=True)

VISIBLE_SECONDS = 60.0
"""A network file system shows to others what is new after half a minute, or so."""

_RANK = "hymba_tune.stage:train_rank"

LOST_SHARE = 0.05
"""More than this share of the documents dropped or cut is worth a warning."""


def run_stage(
    recipe: Recipe, earlier: Literal["refuse", "rerun", "anew"] = "refuse", partners: Partners | None = None
) -> RunDir:
    """Run what is not finished yet of a stage, and return its directory.

    Args:
        earlier: what becomes of a run of another recipe (or of other data, or weights) in the directory: it is refused,
            or replaced (rerun); `anew` replaces a run of the same recipe too, but goes on with one that was begun anew
            and cut.
        partners: the other machines, which join in the training.

    Raises:
        UserError: the recipe, its data or its weights can't be used, or the directory holds another run or is in use.
    """
    from hymba_tune.evaluation.catalogue import find_tasks
    from hymba_tune.model import ops
    from hymba_tune.report.card import write_card
    from hymba_tune.report.render import write_report

    find_tasks(recipe.eval.suites)
    check_launch(recipe)
    end_with_parent()
    run = RunDir(recipe.output.dir)
    fresh = not run.path.exists()
    with run.locked():
        try:
            state = _begin(run, recipe, earlier)
            _refuse_other_sharing(recipe, run, state)
            ops.use_backend(recipe.model.backend)
            _fix_numerics(run, state)
            with _step(run, state, "data") as todo:
                if todo:
                    _prepare_data(recipe, run)
        except UserError:
            if fresh:
                shutil.rmtree(run.path)
            raise
        with _step(run, state, "before") as todo:
            if todo and recipe.eval.before:
                _evaluate(recipe, run, "before")
        with _step(run, state, "training") as todo:
            if todo:
                _train(recipe, run, partners or Alone())
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        with _step(run, state, "after") as todo:
            if todo and recipe.eval.after:
                _evaluate(recipe, run, "after")
            if todo:
                write_card(run.path)
        write_report(run.path)
    console.print(f"[bold]{recipe.stage}[/]: {run.report}")
    return run


def _begin(run: RunDir, recipe: Recipe, earlier: str) -> dict[str, Any]:
    """The stage's state: fresh, or that of the same recipe cut or finished earlier."""
    fingerprint = _fingerprint(recipe)
    state: dict[str, Any] | None = run.read_json(run.state)
    anew = earlier == "anew" and not (state is not None and state.get("anew") and "after" not in state["finished"])
    if state is not None and (state["fingerprint"] != fingerprint or anew):
        if earlier == "refuse" and state["finished"]:
            raise UserError(
                f"output.dir: {run.path} holds a run of another recipe (different: {_changes(state, recipe)}); "
                "set another output.dir, or pass --force to start over"
            )
        run.clear()
        state = None
    if state is None:
        state = {"stage": recipe.stage, "fingerprint": fingerprint, "recipe": _trained_by(recipe), "finished": []}
        state |= {"code": weights_code(recipe.method), "anew": earlier == "anew"}
    state["finished"] = _still_true(state, recipe, run)
    run.write_json(run.state, state)
    run.write_text(run.recipe, recipe.to_yaml())
    run.write_environment()
    return state


def _changes(state: dict[str, Any], recipe: Recipe) -> str:
    """What of a run is not the recipe's, in words."""
    changed = _differences(state["recipe"], _trained_by(recipe))
    old, new = state.get("code", {}), weights_code(recipe.method)
    changed += [f"the code of {name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(changed) or "the files it starts from"


def _still_true(state: dict[str, Any], recipe: Recipe, run: RunDir) -> list[str]:
    """The finished steps, less those to be done again: training without its weights, scores asked for in another way.

    A task whose settings are the same keeps its scores, and answers are kept one by one; see evaluation/suite.py.
    """
    finished, asked = set(state["finished"]), recipe.eval.model_dump(mode="json")
    if not (run.model.exists() or run.adapter.exists()):
        finished -= {"training", "after"}
    if state.setdefault("eval", asked) != asked:
        finished -= {"before", "after"}
        state["eval"] = asked
    return [step for step in state["finished"] if step in finished]


def _fix_numerics(run: RunDir, state: dict[str, Any]) -> None:
    """Compute as the run began, and say where this machine can't."""
    state["numerics"], differences = fix_numerics(state.get("numerics"))
    run.write_json(run.state, state)
    if differences and "training" not in state["finished"]:
        run.warn("resume", f"the run began {'; '.join(differences)}: its weights will not be the same bit for bit")


@contextmanager
def _step(run: RunDir, state: dict[str, Any], name: str) -> Iterator[bool]:
    """Whether the step is still to be done; when the block ends without an error it is recorded as finished."""
    todo = name not in state["finished"]
    if todo:
        console.print(f"[bold]{state['stage']}[/]: {name}")
    yield todo
    if todo:
        state["finished"].append(name)
        run.write_json(run.state, state)


def _trained_by(recipe: Recipe) -> dict[str, Any]:
    """What decides the trained weights: not the processes, but the rows a step that follow from them."""
    values = recipe.to_dict()
    values["trainer"]["global_batch"] = recipe.global_batch
    return {name: values[name] for name in ("stage", "method", "model", "data", "adapter", "trainer")}


def _fingerprint(recipe: Recipe) -> str:
    """sha256 over what decides the trained weights: settings, code, the mix's content, the weights to start from."""
    from hymba_tune.data.mix import load_mix, mix_fingerprint

    digest = hashlib.sha256(json.dumps([_trained_by(recipe), weights_code(recipe.method)], sort_keys=True).encode())
    digest.update(mix_fingerprint(load_mix(recipe.data.mix)).encode())
    weights = stage_weights(recipe)
    if weights is not None:
        digest.update(weights.fingerprint().encode())
    tokenizer = Path(_tokenizer_name(recipe))
    if tokenizer.is_dir() and (weights is None or str(tokenizer) != weights.source):
        digest.update(folder_fingerprint(tokenizer).encode())
    return digest.hexdigest()


def _tokenizer_name(recipe: Recipe) -> str:
    """The folder or hub id of the tokenizer: the recipe's, else that of the weights."""
    weights = stage_weights(recipe) if recipe.model.tokenizer is None else find_weights(recipe.model.tokenizer)
    assert weights is not None
    return weights.source


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    names = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(f"{prefix}{key}")
    return names


def _prepare_data(recipe: Recipe, run: RunDir) -> None:
    """Mix -> conversations -> documents -> rows, on disk, with their counts in data.json."""
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.mix import load_mix, mix_contamination, mix_fingerprint, mix_kept_out, realise_mix
    from hymba_tune.data.packing import build_rows
    from hymba_tune.data.pairs import build_pairs

    tokenizer = load_tokenizer(_tokenizer_name(recipe))
    pairs, data = recipe.method == "dpo", recipe.data
    mix = load_mix(data.mix, DATA_KINDS[recipe.method])

    def build(rows: Any, folder: Path) -> Any:
        if pairs:
            assert data.too_long != "split"  # the recipe is checked
            return build_pairs(rows, tokenizer, data.max_length, data.too_long, folder=folder)[1]
        return build_rows(rows, tokenizer, data.max_length, data.packing, data.too_long, folder=folder)[1]

    out = mix_kept_out(mix, data.decontaminate, recipe.eval.data)
    rows, sources = realise_mix(mix, data.seed, validation=data.validation, limit=data.limit, keep_out=out)
    counts = build(rows, run.rows)
    per_source = {name: asdict(tokens) for name, tokens in counts.sources.items()}
    table = [asdict(source) | per_source.get(source.source, {}) for source in sources]
    totals = {name: value for name, value in asdict(counts).items() if name != "sources"}
    record = {"mix": data.mix, "fingerprint": mix_fingerprint(mix), "sources": table, **totals}
    if out is not None:
        found = mix_contamination(mix, data.seed, out)
        run.write_json(run.contamination, found.to_json())
        record |= {"contaminated": found.dropped, "compared": out.counts(), "not_compared": out.missing}
    if data.validation:
        held, _ = realise_mix(mix, data.seed, "validation", validation=data.validation, keep_out=out)
        record["validation_rows"] = sum(counts.rows for counts in _build_sources(held, run, build))
    run.write_json(run.data, record)
    _warn_of_losses(run, record)


def _build_sources(held: Any, run: RunDir, build: Callable[[Any, Path], Any]) -> Iterator[Any]:
    """The held-out rows of each source in a folder of its own, with their counts; one that fits no row is left out."""
    names = list(held["source"])
    for source in dict.fromkeys(names):
        mine = held.select([i for i, name in enumerate(names) if name == source])
        try:
            yield build(mine, run.validation_rows / quote(source, safe=""))
        except UserError as error:
            run.warn("data", f"no validation loss for source {source}: {error}")


def _warn_of_losses(run: RunDir, record: dict[str, Any]) -> None:
    """Say how much of the data was dropped or cut, where it is much."""
    kept = record.get("documents", record["rows"])
    dropped = sum(value for name, value in record.items() if name.startswith("dropped_"))
    for what, count, remedy in (
        ("cut at the end", record["truncated"], "raise data.max_length"),
        ("dropped", dropped, "see the dropped_ counts in data.json; raise data.max_length if they are too long"),
    ):
        share = count / max(kept + dropped, 1)
        if share > LOST_SHARE:
            run.warn("data", f"{share:.0%} of the documents are {what} ({count} of {kept + dropped}): {remedy}")


def _start_weights(recipe: Recipe, run: RunDir) -> Weights:
    """The weights on disk that the stage starts from; random ones are made and kept."""
    weights = stage_weights(recipe)
    if weights is not None:
        return weights
    from transformers import set_seed

    from hymba_tune.model import HymbaConfig, HymbaForCausalLM

    if not run.initial.exists():
        set_seed(recipe.data.seed)
        save_weights(HymbaForCausalLM(HymbaConfig(**(recipe.model.config or {}))), run.initial)
    return Weights(str(run.initial))


def _trainable(recipe: Recipe, run: RunDir, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model to train: float32 masters whatever the compute dtype; only the adapter learns where there is one.

    Weights that exist take the changes of model.config (a longer context).

    An adapter of the stage before is folded in (merge; kept on disk where a new adapter will refer to it), trained on
    (continue), or folded in in memory under the new one, which names it as its base (stack).
    """
    from transformers import set_seed

    from hymba_tune.model.adapter import attach_adapter, load_adapter

    weights, settings = _start_weights(recipe, run), recipe.adapter
    set_seed(recipe.data.seed)
    if recipe.model.handoff == "continue":
        *below, last = weights.adapters
        return load_adapter(load_weights(Weights(weights.base, tuple(below))), last, trainable=True)
    model = load_weights(weights, changes=None if recipe.model.source == "scratch" else recipe.model.config)
    if settings is None:
        return model
    base = weights.source
    if weights.adapters and recipe.model.handoff == "merge":
        base = str(run.initial)
        if not run.initial.exists():
            save_weights(model, run.initial, tokenizer)
    adapted = attach_adapter(
        model, settings.type, settings.r, settings.alpha, settings.dropout, settings.targets, base=base
    )
    set_seed(recipe.data.seed)
    return adapted


def _train(recipe: Recipe, run: RunDir, partners: Partners) -> None:
    """Train in this process, or in several that launch.py starts and that read everything from the run directory."""
    if recipe.launch.sharing.kind == "single":
        _train_here(recipe, run)
        return
    _keep_start(recipe, run)
    launch(_RANK, [str(run.path)], partners.prepare(recipe.stage, recipe.launch.topology), run.ranks, partners)


def await_stage(recipe: Recipe) -> None:
    """See the run that the first of several machines is about to train.

    Raises:
        UserError: its directory is not on this machine.
    """
    run = RunDir(recipe.output.dir)
    patience = time.monotonic() + VISIBLE_SECONDS
    while not run.recipe.exists():
        if time.monotonic() > patience:
            raise UserError(
                f"output.dir: {run.path} is not on machine {socket.gethostname()}; put it on a disk that all machines "
                "share, under one path"
            )
        time.sleep(1)


def join_stage(recipe: Recipe, partners: Partners) -> None:
    """This machine's ranks of a training that the first machine has begun; raises what launch does."""
    run = RunDir(recipe.output.dir)
    launch(_RANK, [str(run.path)], partners.prepare(recipe.stage, recipe.launch.topology), run.ranks, partners)


def train_rank(folder: str) -> None:
    """One process' share of the training of the run in `folder`; the first process writes.

    It computes as the run began, but on the threads that accelerate left it.
    """
    import torch

    from hymba_tune.model import ops

    run = RunDir(folder)
    recipe, state = load_recipe(run.recipe), run.read_json(run.state)
    ops.use_backend(recipe.model.backend)
    fix_numerics({**state["numerics"], "threads": torch.get_num_threads()})
    _train_here(recipe, run)


def _keep_start(recipe: Recipe, run: RunDir) -> None:
    """Make the weights that every process starts from, where they are not on disk yet."""
    from hymba_tune.data.chat import load_tokenizer

    weights = _start_weights(recipe, run)
    if recipe.adapter and weights.adapters and recipe.model.handoff == "merge" and not run.initial.exists():
        save_weights(load_weights(weights), run.initial, load_tokenizer(_tokenizer_name(recipe)))


def _refuse_other_sharing(recipe: Recipe, run: RunDir, state: dict[str, Any]) -> None:
    """A checkpoint of DeepSpeed or FSDP holds one piece a process: only as many can go on from it."""
    sharing = recipe.launch.sharing
    pieces = [sharing.kind, sharing.stage, recipe.launch.processes] if sharing.kind in ("deepspeed", "fsdp") else None
    before = state.get("pieces")
    if before == pieces:
        return
    if any(run.checkpoints.glob("checkpoint-*")):
        kind, stage, processes = before or ("", 0, "one process or ddp")
        made_by = f"{'fsdp2' if kind == 'fsdp' else f'zero{stage}'} on {processes} processes" if before else processes
        raise UserError(
            f"launch: the checkpoints in {run.checkpoints} were made by {made_by}; {recipe.launch.config} on "
            f"{recipe.launch.processes} can't go on from them: set launch as it was, or start over with --force"
        )
    state["pieces"] = pieces
    run.write_json(run.state, state)


def _train_here(recipe: Recipe, run: RunDir) -> None:
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.data.packing import load_rows
    from hymba_tune.data.pairs import load_pairs
    from hymba_tune.training.distributed import is_first_process, whole_weights
    from hymba_tune.training.dpo import train_dpo
    from hymba_tune.training.sft import train_sft

    train, load = (train_dpo, load_pairs) if recipe.method == "dpo" else (train_sft, load_rows)
    tokenizer = load_tokenizer(_tokenizer_name(recipe))
    rows, _ = load(run.rows)
    held = sorted(run.validation_rows.glob("*")) if recipe.data.validation else []
    validation: dict[str, Any] | None = {unquote(folder.name): load(folder)[0] for folder in held} or None
    model = _trainable(recipe, run, tokenizer)
    trained = train(recipe, model, tokenizer, rows, validation, run)
    weights = whole_weights(trained)
    if is_first_process():
        save_weights(trained, run.adapter if hasattr(trained, "peft_config") else run.model, tokenizer, weights)


def _evaluate(recipe: Recipe, run: RunDir, moment: Moment) -> None:
    """Score the start weights or the trained ones, read back from disk as a user would get them."""
    from hymba_tune.data.chat import load_tokenizer
    from hymba_tune.evaluation.suite import run_suite

    settings = recipe.eval
    if not settings.suites:
        return
    if moment == "before":
        _borrow_scores(recipe, run)
    weights = find_weights(str(run.path)) if moment == "after" else _start_weights(recipe, run)
    with Progress(console=console, transient=True) as bar:
        bars: dict[str, TaskID] = {}

        def show(task: str, finished: int, total: int) -> None:
            if task not in bars:
                bars[task] = bar.add_task(f"{recipe.stage}: {task} {moment}", total=total)
            bar.update(bars[task], completed=finished)

        run_suite(
            load_weights(weights, own_device()).eval(),
            load_tokenizer(weights.source if moment == "after" else _tokenizer_name(recipe)),
            settings.suites,
            run.evaluation(moment),
            limit=settings.limit,
            data=settings.data,
            batch_tokens=settings.batch_tokens,
            max_new_tokens=settings.max_new_tokens,
            progress=show,
        )


def _borrow_scores(recipe: Recipe, run: RunDir) -> None:
    """The scores after the stage before stand before this one: run_suite keeps of them what is still true."""
    parent, here = parent_run(recipe), run.evaluation("before")
    if parent is not None and parent.evaluation("after").exists() and not here.exists():
        draft = here.with_name(".before.partial")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(parent.evaluation("after"), draft)
        draft.replace(here)
