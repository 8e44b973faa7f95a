"""Killed at any moment, the same command ends with the same weights, metrics and answers, bit for bit."""

import json
import os
import random
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.resume import Moment, results, start, write_pipeline

KILLED = (-signal.SIGKILL, -signal.SIGALRM)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Any) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("resume"), small_tokenizer)


@pytest.fixture(scope="module")
def uninterrupted(pipeline: Path) -> tuple[dict[str, Any], list[float]]:
    """What a run without a kill ends with, and when each of its file operations began."""
    timeline = pipeline.parent / "timeline.json"
    assert start(pipeline, pipeline.parent / "whole", timeline=timeline) == 0
    return results(pipeline.parent / "whole"), json.loads(timeline.read_text())


def moments(times: list[float], count: int, seed: int) -> list[Moment]:
    """Moments drawn evenly from the seconds of a run's life."""
    rng = random.Random(seed)
    drawn = [rng.uniform(0, times[-1]) for _ in range(count)]
    return [_moment(times, at) for at in drawn]


def _moment(times: list[float], at: float) -> Moment:
    number = max((i for i, (begin, _) in enumerate(pairwise(times), start=1) if begin <= at), default=1)
    # Half of the gap: on a machine that is faster now, the next operation must not come first.
    return Moment(number, max((at - times[number - 1]) / 2, 1e-6))


def assert_the_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value == found[name], name


def test_a_pipeline_killed_again_and_again_ends_as_if_it_had_not_been(
    pipeline: Path, uninterrupted: tuple[dict[str, Any], list[float]]
) -> None:
    expected, times = uninterrupted
    runs = pipeline.parent / "often"
    killed = 0
    for operations in (len(times) // 12, len(times) // 4, len(times) // 3, len(times) // 5):
        killed += start(pipeline, runs, Moment(operations)) in KILLED
    assert killed >= 3
    assert start(pipeline, runs) == 0
    assert_the_same(expected, results(runs))


def in_small_parts() -> None:
    """Reference log-probabilities of 8 pairs at a time, of the 20 that DPO trains on."""
    from hymba_tune.training import dpo

    dpo.REFERENCE_PART = 8


def killed_between_parts() -> None:
    """In small parts, and the end comes when the first is written and the second is to be computed."""
    from trl import DPOTrainer

    in_small_parts()
    trainer: Any = DPOTrainer
    compute = trainer._precompute_ref_logps
    calls = []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*arguments)

    trainer._precompute_ref_logps = killed


def test_a_kill_between_two_parts_of_the_reference_costs_neither_the_first_nor_a_bit_of_the_weights(
    pipeline: Path, uninterrupted: tuple[dict[str, Any], list[float]]
) -> None:
    runs = pipeline.parent / "parts"
    assert start(pipeline, runs, prepare=killed_between_parts) == -signal.SIGKILL
    (first,) = (runs / "second" / "rows").glob("cache-*.arrow")
    written = first.stat().st_mtime_ns
    assert start(pipeline, runs, prepare=in_small_parts) == 0
    assert len(list((runs / "second" / "rows").glob("cache-*.arrow"))) == 3
    assert first.stat().st_mtime_ns == written
    assert_the_same(uninterrupted[0], results(runs))


@pytest.mark.full
@pytest.mark.parametrize("number", range(20))
def test_a_pipeline_killed_at_a_random_moment_ends_as_if_it_had_not_been(
    number: int, pipeline: Path, uninterrupted: tuple[dict[str, Any], list[float]]
) -> None:
    expected, times = uninterrupted
    runs = pipeline.parent / f"run-{number}"
    assert start(pipeline, runs, moments(times, 20, seed=0)[number]) in KILLED
    assert start(pipeline, runs) == 0
    assert_the_same(expected, results(runs))
