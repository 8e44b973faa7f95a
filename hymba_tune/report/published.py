"""Figures that others published, for the report to set beside a run's own: published.yaml as objects.

They stand in a report as published figures, with their source: never as something that was measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

FILE = Path(__file__).with_name("published.yaml")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedColumn(_Part):
    """metric: `task/metric` of our results that is comparable with it, or None."""

    name: str
    metric: str | None
    note: str

    @property
    def task(self) -> str | None:
        return self.metric.partition("/")[0] if self.metric else None


class PublishedRow(_Part):
    """values: percent, one a column; None where nothing was published."""

    model: str
    parameters: str
    values: list[float | None]


class PublishedTable(_Part):
    """One table of a paper."""

    title: str
    source: str
    columns: list[PublishedColumn]
    rows: list[PublishedRow]
    note: str

    @model_validator(mode="after")
    def _whole(self) -> PublishedTable:
        if any(len(row.values) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row needs one value a column")
        return self


class _Tables(_Part):
    tables: list[PublishedTable]


def published_tables(tasks: Iterable[str]) -> list[PublishedTable]:
    """The tables with a column that is comparable with one of the tasks' results."""
    wanted = set(tasks)
    return [table for table in _tables() if wanted & {column.task for column in table.columns}]


@cache
def _tables() -> list[PublishedTable]:
    return _Tables.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8"))).tables
