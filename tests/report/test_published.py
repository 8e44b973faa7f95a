"""Published figures are whole, agree with themselves, and name metrics that our results have."""

import statistics

import pytest

from hymba_tune.report.published import published_tables

PAPER = ("mmlu", "ifeval", "gsm8k", "gpqa", "bfcl_v2")


def test_a_task_brings_the_tables_it_is_comparable_with():
    assert [table.title for table in published_tables(["gsm8k", "tiny_math"])] == [
        "Instruction-tuned models below 2B parameters"
    ]
    assert [table.title for table in published_tables(["rolebench_role"])] == ["RoleBench"]
    assert published_tables(["tiny_math"]) == []


def test_the_averages_that_were_published_are_those_of_the_published_rows():
    [table] = published_tables(PAPER)
    assert [column.task for column in table.columns] == [*PAPER, None]
    for row in table.rows:
        *values, average = row.values
        assert average == pytest.approx(statistics.fmean(v for v in values if v is not None), abs=0.0051), row.model


def test_hymbas_own_figures():
    [instruct] = published_tables(["mmlu"])
    [roles] = published_tables(["rolebench_instruction"])
    assert instruct.rows[-1].values == [52.79, 57.14, 58.76, 31.03, 46.40, 49.22]
    assert roles.rows[-1].values == [40.0, 37.9]


def test_every_column_names_a_task_and_its_headline_or_one_of_its_means():
    from hymba_tune.evaluation.catalogue import TASKS

    for table in published_tables([*PAPER, "rolebench_role"]):
        for column in table.columns:
            if column.metric:
                task, _, metric = column.metric.partition("/")
                assert task in TASKS
                assert metric in (TASKS[task].headline, "mean")
