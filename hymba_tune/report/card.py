"""The model card: README.md beside weights, from the files of the runs that made them.

A card may be published, so it names hub ids and file names, never a folder of the machine it was made on. Everything
that a user or a model wrote is escaped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from hymba_tune.paths import is_hub_id
from hymba_tune.report.collect import collect
from hymba_tune.report.markdown import Markdown, render_template
from hymba_tune.run_dir import RunDir

Form = Literal["model", "adapter"]

PLACE = "path/to/this/folder"
"""Stands for the weights in a card that was not written for a place on the hub."""

OFFICIAL = "nvidia/Hymba-1.5B"
LICENCE = {
    "license": "other",
    "license_name": "nvidia-open-model-license",
    "license_link": (
        "https://developer.download.nvidia.com/licenses/nvidia-open-model-license-agreement-june-2024.pdf"
    ),
}
"""What the cards of NVIDIA's published Hymbas say of themselves; weights made from them stay under it."""


@dataclass(frozen=True)
class _Base:
    """Where the first stage started: text for a reader, and a hub id if it is one."""

    text: str
    hub: str | None


def write_card(path: str | Path) -> Path | None:
    """README.md into the weights of the run in `path`, and where it is; None if there are no weights yet."""
    run = RunDir(path)
    forms: dict[Form, Path] = {"adapter": run.adapter, "model": run.model}
    for form, folder in forms.items():
        if folder.exists():
            return run.write_text(folder / "README.md", model_card(lineage(path), form))
    return None


def lineage(path: str | Path) -> list[dict[str, Any]]:
    """Results (collect.py) of the run that made the weights in `path`, after those of the stages it started from.

    `path` is a run directory or the model/ or adapter/ in one; [] for anything else.
    """
    stages: list[dict[str, Any]] = []
    seen: set[Path] = set()
    run = _run_of(Path(path))
    while run is not None and run.path.resolve() not in seen:
        seen.add(run.path.resolve())
        stages.insert(0, collect(run.path))
        source = str(_of(stages[0], "model", "from"))
        stage = source.removeprefix("stage:")
        run = _run_of(run.path.parent / stage if source.startswith("stage:") else Path(source))
    return stages


def model_card(
    stages: list[dict[str, Any]],
    form: Form,
    place: str = PLACE,
    base: str | None = None,
    dtype: str = "float32",
) -> str:
    """A card: YAML front matter as the hub reads it, then Markdown.

    Args:
        stages: as `lineage` gives them; [] where nothing is known of how the weights were made.
        place: hub id of the weights, for the lines that load them.
        base: the checkpoint that was named, where there are no stages.
        dtype: of the weights on disk.
    """
    root = _base(str(_of(stages[0], "model", "from")) if stages else base or "scratch")
    filters = {"percent": _percent, "short": _short, "thousands": _thousands}
    return render_template(
        "model_card.md.jinja",
        filters,
        front=Markdown(yaml.safe_dump(_front_matter(stages, form, root), sort_keys=False, allow_unicode=True)),
        last=stages[-1] if stages else None,
        stages=stages,
        form=form,
        place=Markdown(place),
        base=root,
        dtype=dtype,
        official=_is_official(root),
        licence=LICENCE,
        scores=_scores(stages[-1]) if stages else [],
        trainer=_trainer_settings(stages[-1]) if stages else {},
        limits=Markdown(PLACE) if place == PLACE else None,
    )


def _run_of(path: Path) -> RunDir | None:
    """The run that `path` is, or whose model/ or adapter/ it is."""
    for folder in (path, path.parent):
        run = RunDir(folder)
        if run.recipe.exists() and path.name in (folder.name, run.model.name, run.adapter.name):
            return run
    return None


def _of(results: dict[str, Any], section: str, key: str) -> Any:
    return (results["settings"].get(section) or {}).get(key)


def _base(source: str) -> _Base:
    if source == "tiny":
        return _Base("the tiny model that hymba-tune ships", None)
    if source == "scratch":
        return _Base("random weights", None)
    if is_hub_id(source) and not Path(source).is_dir():
        return _Base(source, source)
    return _Base(f"the local checkpoint {Path(source).name}", None)


def _is_official(base: _Base) -> bool:
    return base.hub is not None and base.hub.startswith(OFFICIAL)


def _front_matter(stages: list[dict[str, Any]], form: Form, base: _Base) -> dict[str, Any]:
    """What the hub reads: only what is known, and only hub ids as ids."""
    kinds = [str(_of(stage, "adapter", "type")) for stage in stages if stage["settings"].get("adapter")]
    methods = [str(stage["method"]) for stage in stages]
    sources = [source for stage in stages for source in (stage["data"] or {}).get("sources", [])]
    datasets = [source["hub"] for source in sources if source.get("hub") and source["conversations"]]
    matter: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["hymba", "hymba-tune", *methods, *kinds])),
    }
    if base.hub:
        matter |= {"base_model": base.hub, "base_model_relation": "adapter" if form == "adapter" else "finetune"}
    if datasets:
        matter["datasets"] = list(dict.fromkeys(datasets))
    return matter | (LICENCE if _is_official(base) else {})


def _scores(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of measured scores; parts of a benchmark ("accuracy/anatomy") are left to the report."""
    return [row for row in results["scores"] if row["after"] and "/" not in row["metric"]]


def _trainer_settings(results: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is learned; folders and amounts of logging are left out."""
    settings = results["settings"]
    left_out = ("logging_steps", "save_steps", "save_total_limit", "save_strategy", "report_to", "logging_dir")
    trainer = {key: value for key, value in (settings.get("trainer") or {}).items() if key not in left_out}
    data = {key: _of(results, "data", key) for key in ("max_length", "packing", "too_long", "seed")}
    chosen = {"trainer": trainer, "data": data, "dtype": _of(results, "model", "dtype")}
    return chosen | ({"adapter": settings["adapter"]} if settings.get("adapter") else {})


def _percent(metric: dict[str, Any] | None) -> Markdown:
    """`42.3 ± 2.8`, in percent."""
    if metric is None:
        return Markdown("–")
    error = "" if metric["stderr"] is None else f" ± {100 * metric['stderr']:.1f}"
    return Markdown(f"{100 * metric['value']:.1f}{error}")


def _short(value: float | None) -> Markdown:
    return Markdown("–" if value is None else f"{value:.4g}")


def _thousands(value: int | None) -> Markdown:
    return Markdown("–" if value is None else f"{value:,}".replace(",", " "))
