"""Settings in layers: a file over the files it extends, a section over both, `key=value` over all.

Every value remembers where it was written, so that a message can name the line and a relative path can start from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_tune.errors import UserError
from hymba_tune.yaml_reader import Location, parse_yaml, read_yaml

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `recipes/sft1.yaml:12` or the command line; relative paths there start in `folder`."""

    text: str
    folder: Path


@dataclass(frozen=True)
class Settings:
    """Nested values, and the origin of every key and list item in them."""

    values: dict[str, Any]
    origins: dict[Location, Origin]

    def origin(self, location: Location) -> Origin:
        """The origin of a location, or of the nearest enclosing one that was written; () is the file as a whole."""
        while location and location not in self.origins:
            location = location[:-1]
        return self.origins.get(location) or Origin(COMMAND_LINE, Path.cwd())


def read_file(path: Path) -> Settings:
    """One YAML file; raises UserError if it is missing or malformed."""
    values, lines = read_yaml(path)
    folder = path.absolute().parent
    origins = {at: Origin(f"{path}:{line}", folder) for at, line in lines.items()}
    return Settings(values, {(): Origin(str(path), folder), **origins})


def read_chain(path: Path) -> list[Settings]:
    """A file and those it extends, the lowest first. `extends: other.yaml` is read from the file's own folder."""
    chain: list[Settings] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        here, settings = following, read_file(following)
        seen.append(here.resolve())
        values = dict(settings.values)
        base = values.pop("extends", None)
        chain.insert(0, Settings(values, settings.origins))
        following = _base(here, base, settings.origin(("extends",)), seen) if base is not None else None
    return chain


def _base(path: Path, base: Any, origin: Origin, seen: list[Path]) -> Path:
    if not isinstance(base, str):
        raise UserError(f"{origin.text}: extends: {base!r} must be the name of one file")
    target = path.parent / base
    if not target.is_file():
        raise UserError(f"{origin.text}: extends: no file {target}; it is looked for beside the file that names it")
    if target.resolve() in seen:
        names = " -> ".join(file.name for file in [*seen, target])
        raise UserError(f"{origin.text}: extends: {base} closes a circle ({names}); remove one `extends`")
    return target


def section(settings: Settings, name: str) -> tuple[Settings, Settings | None]:
    """Take one top-level section out: the settings without it, and the section as settings (None if absent)."""
    rest = Settings({key: value for key, value in settings.values.items() if key != name}, settings.origins)
    if name not in settings.values:
        return rest, None
    inner = settings.values[name]
    if not isinstance(inner, dict):
        raise UserError(f"{settings.origin((name,)).text}: {name}: {inner!r} must be a section of settings")
    origins = {at[1:]: origin for at, origin in settings.origins.items() if len(at) > 1 and at[0] == name}
    return rest, Settings(inner, origins)


def assignment(text: str) -> Settings:
    """`trainer.learning_rate=1e-4` from the command line; the value is read as YAML."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"{COMMAND_LINE}: {text!r} is not of the form section.key=value, as in trainer.max_steps=10")
    parsed, _ = parse_yaml(f"value: {value}", f"{COMMAND_LINE}: {key}")
    if set(parsed) != {"value"}:
        raise UserError(f"{COMMAND_LINE}: {key}: {value!r} must be one value; put it in quotes")
    nested: Any = parsed["value"]
    for name in reversed(names):
        nested = {name: nested}
    origin = Origin(COMMAND_LINE, Path.cwd())
    return Settings(nested, {tuple(names[:depth]): origin for depth in range(1, len(names) + 1)})


def overlay(lower: Settings, upper: Settings) -> Settings:
    """`upper` on top of `lower`: sections are merged key by key, every other value is replaced."""
    origins = dict(lower.origins)
    if () in upper.origins:
        origins[()] = upper.origins[()]
    values = _merge(lower.values, upper.values, (), origins, upper.origins)
    return Settings(values, origins)


def _merge(
    lower: Mapping[str, Any],
    upper: Mapping[str, Any],
    at: Location,
    origins: dict[Location, Origin],
    upper_origins: Mapping[Location, Origin],
) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        here = (*at, key)
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, here, origins, upper_origins)
            continue
        for location in [location for location in origins if location[: len(here)] == here]:
            del origins[location]
        origins.update({place: origin for place, origin in upper_origins.items() if place[: len(here)] == here})
        merged[key] = value
    return merged
