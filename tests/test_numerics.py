"""A run goes on with the threads, precision and backends it began with, or says that it can't."""

from collections.abc import Iterator

import pytest
import torch

from hymba_tune.model import ops
from hymba_tune.numerics import fix_numerics


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    ops.keep_backends({}, "cpu")


def test_the_same_machine_has_nothing_to_say() -> None:
    began, differences = fix_numerics(None)
    assert differences == []
    assert fix_numerics(began) == (began, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU other backends are chosen")
def test_the_backends_of_the_start_are_taken_again_and_freed_for_the_next_run() -> None:
    began, _ = fix_numerics(None)
    reference = dict.fromkeys(began["backends"], "reference")
    assert fix_numerics({**began, "backends": reference})[1] == []
    assert ops.chosen_backends("cpu") == reference
    assert fix_numerics(None)[0]["backends"] == began["backends"]


def test_what_this_machine_cannot_give_is_said() -> None:
    began, _ = fix_numerics(None)
    other = {**began, "device": "an abacus", "packages": {**began["packages"], "torch": "0.1"}}
    other["backends"] = {**began["backends"], "selective_scan": "gone"}
    said = " ".join(fix_numerics(other)[1])
    assert "abacus" in said
    assert "torch 0.1" in said
    assert "selective_scan by backend gone" in said
