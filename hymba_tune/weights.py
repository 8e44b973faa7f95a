"""Names of weights -> folders -> a model, and back: checkpoints, adapters, runs, hub ids, `tiny`, `stage:NAME`.

An adapter remembers the folder it was trained on; where that is an adapter too, they are folded in one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_tune.errors import UserError
from hymba_tune.recipe import Recipe
from hymba_tune.run_dir import RunDir, require_space

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from hymba_tune.model import HymbaForCausalLM

STAGE_PREFIX = "stage:"


@dataclass(frozen=True)
class Weights:
    """A full checkpoint (folder or hub id), and the adapters that go on it in this order."""

    base: str
    adapters: tuple[Path, ...] = ()

    @property
    def source(self) -> str:
        """The folder or hub id that was named: the last adapter's, else the checkpoint's."""
        return str(self.adapters[-1]) if self.adapters else self.base

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer lies: in the last adapter that brings one, else with the checkpoint."""
        own = [adapter for adapter in self.adapters if (adapter / "tokenizer.json").exists()]
        return str(own[-1]) if own else self.base

    def fingerprint(self) -> str:
        """sha256 over the files of local folders, over the name of a hub id."""
        digest = hashlib.sha256()
        for part in (self.base, *map(str, self.adapters)):
            digest.update(folder_fingerprint(Path(part)).encode() if Path(part).is_dir() else part.encode())
        return digest.hexdigest()


def find_weights(name: str) -> Weights:
    """What a user's name stands for: a checkpoint, adapter or run folder, a hub id, or `tiny`.

    Raises:
        UserError: a run that has no weights yet, or adapters that name each other as their base.
    """
    adapters: list[Path] = []
    folder = _folder(name)
    while (Path(folder) / "adapter_config.json").exists():
        if Path(folder) in adapters:
            raise UserError(f"{name}: {folder} is an adapter on itself; mend base_model_name_or_path in its config")
        adapters.insert(0, Path(folder))
        settings = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        folder = _folder(settings["base_model_name_or_path"])
    return Weights(folder, tuple(adapters))


def stage_weights(recipe: Recipe) -> Weights | None:
    """The weights that a recipe starts from; None for random ones (`from: scratch`).

    Raises:
        UserError: the stage before has no weights, or left an adapter and the recipe does not say what becomes of it.
    """
    source, handoff = recipe.model.source, recipe.model.handoff
    if source == "scratch":
        return None
    parent = parent_run(recipe)
    if parent is not None:
        if not (parent.model.exists() or parent.adapter.exists()):
            raise UserError(f"model.from: {source}: {parent.path} holds no finished run; run that stage first")
        source = str(parent.path)
    weights = find_weights(source)
    if weights.adapters and handoff is None:
        raise UserError(
            f"model.from: {recipe.model.source} is an adapter; set model.handoff to merge (fold it in), continue "
            "(train it on) or stack (train another on top)"
        )
    if handoff == "continue" and not weights.adapters:
        raise UserError(f"model.handoff: continue, but {recipe.model.source} has no adapter; leave handoff out")
    return weights


def parent_run(recipe: Recipe) -> RunDir | None:
    """The run that a recipe starts from (`stage:NAME`): the folder of that name beside its own.

    Beside `runs/sft2-tiny` that is `runs/sft1-tiny`: whatever follows a dash after the stage's own name stays.
    """
    source, own = recipe.model.source, Path(recipe.output.dir)
    if not source.startswith(STAGE_PREFIX):
        return None
    dash, after = f"{recipe.stage}-", own.name.partition(f"{recipe.stage}-")[2]
    return RunDir(own.with_name(source.removeprefix(STAGE_PREFIX) + (f"-{after}" if own.name.startswith(dash) else "")))


def load_weights(weights: Weights, device: Any = "cpu", changes: Mapping[str, Any] | None = None) -> HymbaForCausalLM:
    """The model in float32, every adapter folded in; `changes`: keys of its configuration that are to differ."""
    from hymba_tune.model import load_model

    model = load_model(weights.base, device=device, changes=changes)
    for adapter in weights.adapters:
        from hymba_tune.model.adapter import load_adapter, merge_adapter

        model = merge_adapter(load_adapter(model, adapter))
    return model


def own_device() -> str:
    """Where this process computes: on the GPU of its local rank, else on the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft folder that takes the place of `folder` when the block ends without an error; else it is removed."""
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def save_weights(
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Leave the whole checkpoint or adapter in `folder`, or nothing; `weights` stand in for the model's own.

    Raises:
        UserError: the disk has no room for it.
    """
    held = model.parameters() if weights is None else weights.values()
    require_space(folder, sum(value.numel() * value.element_size() for value in held), folder.name)
    with whole_folder(folder) as draft:
        model.save_pretrained(draft, **({} if weights is None else {"state_dict": dict(weights)}))
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)


def folder_fingerprint(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's files, model cards left out."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.is_file() and file.suffix != ".md":
            digest.update(file.name.encode())
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _folder(name: str) -> str:
    """The folder or hub id behind a name; of a run directory its adapter or model."""
    if name == "tiny":
        from hymba_tune.tiny import tiny_path

        return str(tiny_path())
    run = RunDir(name)
    if not run.recipe.exists():
        return name
    for part in (run.adapter, run.model):
        if part.exists():
            return str(part)
    raise UserError(f"{name}: this run has no weights yet; the command that started it goes on with it")
