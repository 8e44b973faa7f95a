"""Standard errors are the exact formulas, and a score that means "broken" says so."""

import math

import pytest

from hymba_tune.evaluation.results import bootstrap_metric, mean_metric, suspicion


def test_the_standard_error_of_a_share_is_the_binomial_one():
    metric = mean_metric([1.0] * 30 + [0.0] * 70)
    assert metric.value == pytest.approx(0.3)
    assert metric.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_one_item_has_no_standard_error():
    assert mean_metric([1.0]).stderr is None


def test_the_bootstrap_repeats_and_agrees_with_the_formula():
    values = [float(i % 3 == 0) for i in range(200)]
    mean = lambda units: sum(units) / len(units)  # noqa: E731
    one, again = bootstrap_metric(mean, values, seed=1), bootstrap_metric(mean, values, seed=1)
    assert one == again
    assert one.stderr == pytest.approx(mean_metric(values).stderr, rel=0.1)


def item(answer: str, extracted: object) -> dict[str, object]:
    return {"answer": answer, "extracted": extracted}


def test_empty_answers_and_answers_without_anything_to_judge_are_suspect():
    assert "3 of 10 answers are empty" in str(suspicion([item("a", 1)] * 7 + [item(" \n", None)] * 3))
    assert "extracted from 0 of 5" in str(suspicion([item("a", None)] * 5))
    assert "extracted from 2 of 201" in str(suspicion([item("a", 1)] * 2 + [item("a", None)] * 199))
    assert suspicion([item("a", 1)] * 2 + [item("a", None)] * 198) is None
    assert suspicion([item("a", 1)] * 8 + [item("", None)] * 2) is None


def test_an_extractor_that_finds_nothing_beside_one_that_does_is_named():
    assert str(suspicion([item("a", {"x": None, "y": "3"})])).startswith("x: an answer could be extracted from 0 of 1")
    assert suspicion([item("a", {"x": None, "y": "3"}), item("a", {"x": "3", "y": "3"})]) is None
