"""The stage graph: which recipes run, in which order, each from the one before.

A pipeline file lists recipes; `model.from: stage:NAME` in them are the arrows. Each stage has its own run directory
below the pipeline's, so what is finished is skipped, and what has changed runs anew with everything that depends on it
(a stage's fingerprint holds the weights it starts from).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hymba_tune.errors import UserError
from hymba_tune.machines import Alone, Follower, Lead, PartnerEnded, Partners, Place, find_place
from hymba_tune.paths import find
from hymba_tune.recipe import OutputSection, Recipe, load_recipe
from hymba_tune.run_dir import RunDir
from hymba_tune.weights import STAGE_PREFIX
from hymba_tune.yaml_reader import read_yaml

_ANEW = "anew.json"


class _PipelineFile(BaseModel):
    """stages: recipe files, relative to this one; output.dir: the folder that gets a run directory a stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: list[str]
    output: OutputSection = OutputSection(dir="runs/pipeline")
    tiny: dict[str, OutputSection] = {}


@dataclass(frozen=True)
class Pipeline:
    """Checked recipes in the order in which they run. `folder` holds their runs; None for a recipe on its own."""

    stages: list[Recipe]
    folder: Path | None = None

    @property
    def machines(self) -> int:
        """Machines that the stages need; one may train on a single machine between others on several.

        Raises:
            UserError: two stages need several, but not as many.
        """
        found = sorted({recipe.launch.machines for recipe in self.stages} - {1})
        if len(found) > 1:
            raise UserError(f"launch.machines: stages want {found[0]} and {found[1]}; set it to one of them, or to 1")
        return found[0] if found else 1

    def depending_on(self, name: str) -> set[str]:
        """The stage called `name` and all that start, directly or not, from what it writes.

        Raises:
            UserError: there is no such stage.
        """
        if name not in (recipe.stage for recipe in self.stages):
            raise UserError(f"no stage {name}; there are {', '.join(recipe.stage for recipe in self.stages)}")
        found = {name}
        for recipe in self.stages:
            if _parent(recipe) in found:
                found.add(recipe.stage)
        return found


def load_pipeline(path: str | Path, overrides: Sequence[str] = (), tiny: bool = False) -> Pipeline:
    """A pipeline file or a single recipe, checked as a whole.

    Args:
        overrides: `section.key=value` for every stage, `STAGE.section.key=value` for one.

    Raises:
        UserError: a stage's recipe is wrong, two have the same name, or one starts from a stage that is not there.
    """
    file = find(str(path), [Path.cwd()]) or Path(path)
    values, _ = read_yaml(file)
    if "stages" not in values:
        return Pipeline([load_recipe(path, overrides, tiny)])
    try:
        content = _PipelineFile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; see recipes/pipeline.yaml"
        ) from None
    given = [text.removeprefix("output.dir=") for text in overrides if text.startswith("output.dir=")]
    output = content.tiny.get("output", content.output) if tiny else content.output
    folder = Path(given[-1] if given else output.dir).absolute()
    settings = [text for text in overrides if not text.startswith("output.dir=")]
    recipes = [_load_stage(file.parent / name, settings, tiny, folder) for name in content.stages]
    unknown = (
        {text.split(".")[0] for text in settings} - {recipe.stage for recipe in recipes} - set(Recipe.model_fields)
    )
    if unknown:
        raise UserError(f"{sorted(unknown)[0]}: neither a section of a recipe nor a stage of {file}")
    return Pipeline(_in_order(recipes, file), folder)


def run_pipeline(
    pipeline: Pipeline, *, start: str | None = None, only: str | None = None, force: bool = False
) -> list[RunDir]:
    """Run what is not finished.

    Args:
        start: run this stage and what depends on it anew.
        only: run no other stage.
        force: run everything anew.

    Given again after a kill, `start` and `force` go on with what they had begun anew. On several machines each runs
    the same: the first runs the stages, the others join in their training and return no runs.
    """
    machines = pipeline.machines
    if machines == 1:
        return _run(pipeline, Alone(), start, only, force)
    place = find_place(machines, next(recipe.launch.port for recipe in pipeline.stages if recipe.launch.machines > 1))
    if place.machine:
        _join(pipeline, place)
        return []
    with Lead(place) as partners:
        return _run(pipeline, partners, start, only, force)


def _join(pipeline: Pipeline, place: Place) -> None:
    """Join in each training that the first machine begins, until it says that the run is over."""
    from hymba_tune.launch import RankFailed, check_launch
    from hymba_tune.stage import await_stage, join_stage

    stages = {recipe.stage: recipe for recipe in pipeline.stages}
    problem = None
    try:
        for recipe in pipeline.stages:
            if recipe.launch.machines > 1:
                check_launch(recipe)
    except UserError as error:
        problem = str(error)
    with Follower(place, problem) as partners:
        while (stage := partners.next_stage()) is not None:
            if stage not in stages:
                raise UserError(
                    f"the first machine trains {stage}, which is not in the recipe here; make them the same"
                )
            await_stage(stages[stage])
            with contextlib.suppress(PartnerEnded, RankFailed, UserError):  # the first machine says it
                join_stage(stages[stage], partners)


def _run(pipeline: Pipeline, partners: Partners, start: str | None, only: str | None, force: bool) -> list[RunDir]:
    from hymba_tune.stage import run_stage

    anew = pipeline.depending_on(start) if start else set()
    if only is not None:
        pipeline.depending_on(only)
    chosen = [recipe for recipe in pipeline.stages if only in (None, recipe.stage)]
    request = _Anew(pipeline.folder, [recipe.stage for recipe in chosen if force or recipe.stage in anew])
    runs = []
    for recipe in chosen:
        if request.waits_for(recipe.stage):
            runs.append(run_stage(recipe, "anew", partners))
            request.finished(recipe.stage)
        else:
            runs.append(run_stage(recipe, "refuse" if pipeline.folder is None else "rerun", partners))
        _report(pipeline)
    request.end()
    return runs


def _report(pipeline: Pipeline) -> None:
    """The report of the stages so far, in the pipeline's folder."""
    from hymba_tune.report.render import write_report

    if pipeline.folder is not None:
        folder = RunDir(pipeline.folder)
        folder.write_json(folder.pipeline, {"stages": [recipe.stage for recipe in pipeline.stages]})
        folder.write_environment()
        write_report(pipeline.folder)


class _Anew:
    """Which stages are to run anew; kept in the pipeline's folder (`anew.json`) until all of them have.

    So the same command after a kill does not begin again with a stage that it has run already. A recipe on its own
    needs no file: its run's state says that it was begun anew.
    """

    def __init__(self, folder: Path | None, stages: list[str]) -> None:
        self.stages, self.waiting = stages, list(stages)
        self._home = RunDir(folder) if folder is not None else None
        if self._home is None:
            return
        earlier = self._home.read_json(_ANEW)
        if earlier is not None and earlier["stages"] == stages:
            self.waiting = earlier["waiting"]
        elif stages:
            self._home.write_json(_ANEW, {"stages": stages, "waiting": stages})
        else:
            self.end()

    def waits_for(self, stage: str) -> bool:
        return stage in self.waiting

    def finished(self, stage: str) -> None:
        self.waiting = [name for name in self.waiting if name != stage]
        if self._home is not None:
            self._home.write_json(_ANEW, {"stages": self.stages, "waiting": self.waiting})

    def end(self) -> None:
        """All is done, or a command without --from and --force has taken the place of the earlier one."""
        if self._home is not None:
            (self._home.path / _ANEW).unlink(missing_ok=True)


def _load_stage(path: Path, overrides: Sequence[str], tiny: bool, folder: Path) -> Recipe:
    """A recipe whose run lies in `folder`, with the overrides that are meant for it."""
    name = load_recipe(path, (), tiny).stage
    mine = [text.removeprefix(f"{name}.") for text in overrides]
    sections = set(Recipe.model_fields)
    mine = [text for text in mine if text.split("=")[0].split(".")[0] in sections]
    return load_recipe(path, [*mine, f"output.dir={folder / name}"], tiny)


def _in_order(recipes: Sequence[Recipe], file: Path) -> list[Recipe]:
    """Parents before children, as listed otherwise."""
    by_name = {recipe.stage: recipe for recipe in recipes}
    if len(by_name) < len(recipes):
        raise UserError(f"{file}: stages: two recipes have the same `stage` name; rename one")
    for recipe in recipes:
        parent = _parent(recipe)
        if parent is not None and parent not in by_name:
            raise UserError(f"{file}: {recipe.stage} starts from stage:{parent}, which is not listed; add its recipe")
    graph = {recipe.stage: {parent} if (parent := _parent(recipe)) else set() for recipe in recipes}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise UserError(f"{file}: stages start from each other: {' -> '.join(error.args[1])}") from None
    return [by_name[name] for name in order]


def _parent(recipe: Recipe) -> str | None:
    source = recipe.model.source
    return source.removeprefix(STAGE_PREFIX) if source.startswith(STAGE_PREFIX) else None
