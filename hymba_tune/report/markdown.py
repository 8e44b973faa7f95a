"""Markdown from templates: what a template prints is escaped for Markdown unless a filter made it."""

from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from hymba_tune.report.text import fenced, inline


class Markdown(str):
    """Text that is Markdown already."""


def render_template(name: str, filters: Mapping[str, Any], **values: Any) -> str:
    """A template of templates/ with its values; `filters` besides `yaml`, a value as a code block of YAML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hymba_tune.report", "templates"),
        autoescape=False,  # Markdown has its own rules: see `_escaped`
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"yaml": _yaml_block, **filters}
    return environment.get_template(name).render(**values)


def _escaped(value: Any) -> str:
    if isinstance(value, Markdown):
        return value
    return "–" if value is None else inline(str(value))


def _yaml_block(value: Any) -> Markdown:
    return Markdown(fenced(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip(), "yaml"))
