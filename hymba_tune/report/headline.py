"""The table one looks at first: stages or runs as rows, benchmarks as columns, published figures below."""

from collections.abc import Mapping, Sequence
from typing import Any

from hymba_tune.report.published import PublishedTable, published_tables
from hymba_tune.report.scores import Result, side_by_side


def headline(columns: Mapping[str, Mapping[str, Result]], against: str = "previous") -> dict[str, Any]:
    """The headline metrics of {name: {task: result}}, and what others published of the same.

    table       side_by_side's: all metrics, a row each
    columns     [{task, metric, protocol}]: headline metrics, and those that a published figure is comparable with
    rows        [{name, cells}], a row a name, a cell a column
    published   [{model, parameters, source, values (percent)}]
    notes       of the published figures
    """
    table = side_by_side(columns, against)
    published = published_tables({row["task"] for row in table["rows"]})
    comparable = {column.metric for part in published for column in part.columns}
    chosen = [row for row in table["rows"] if row["headline"] or f"{row['task']}/{row['metric']}" in comparable]
    names = [f"{row['task']}/{row['metric']}" for row in chosen]
    return {
        "table": table,
        "columns": [{key: row[key] for key in ("task", "metric", "protocol")} for row in chosen],
        "rows": [
            {"name": name, "cells": [row["cells"][index] for row in chosen]}
            for index, name in enumerate(table["columns"])
        ],
        "published": [row for part in published for row in _published_rows(part, names)],
        "notes": [f"{part.source}: {note}" for part in published for note in _notes(part, names)],
    }


def _published_rows(part: PublishedTable, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows with a figure for one of the columns called `names`."""
    place = {column.metric: index for index, column in enumerate(part.columns) if column.metric}
    rows = []
    for row in part.rows:
        values = [row.values[place[name]] if name in place else None for name in names]
        if any(value is not None for value in values):
            rows.append({"model": row.model, "parameters": row.parameters, "source": part.source, "values": values})
    return rows


def _notes(part: PublishedTable, names: Sequence[str]) -> list[str]:
    columns = [f"{column.name}: {column.note}" for column in part.columns if column.metric in names and column.note]
    return [*columns, part.note]
