"""Which backend runs: chosen once, said aloud, and never another than the user named."""

import logging
from collections.abc import Iterator

import pytest
import torch

from hymba_tune.errors import UserError
from hymba_tune.model import ops


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    with ops.use_backend("auto"):
        ops._automatic.cache_clear()
        yield


def convolve(device: str = "cpu") -> str:
    """Runs one operation; the module that computed it."""
    x = torch.ones(3, 2, device=device)
    y, _ = ops.causal_conv1d(x, torch.ones(2, 4, device=device), x[0], torch.tensor([0, 3]))
    return ops._backend("causal_conv1d", y.device.type).__name__.rsplit(".", 1)[-1]


def test_auto_takes_the_cpu_backend_and_logs_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hymba_tune.model.ops"):
        assert convolve() == "cpu"
        assert convolve() == "cpu"
    assert len(caplog.messages) == 1
    assert "causal_conv1d on cpu: backend cpu" in caplog.messages[0]


def test_a_named_backend_holds_for_a_block_or_from_now_on() -> None:
    with ops.use_backend("reference"):
        assert convolve() == "reference"
    assert convolve() == "cpu"
    ops.use_backend("reference")
    assert convolve() == "reference"


def test_a_named_backend_that_cannot_run_raises() -> None:
    with ops.use_backend("cpu"), pytest.raises(UserError, match=r"model\.backend: cpu can't run .* on meta"):
        convolve("meta")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="'cuda' is no backend; choose one of auto, reference, cpu, triton, packages"):
        ops.use_backend("cuda")


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(UserError, match=r"^HYMBA_TUNE_BACKEND: 'fast' is no backend; choose one of auto"):
        ops._from_environment()


def test_every_backend_explains_itself_for_every_operation() -> None:
    choices = ops.explain()
    assert {(choice.op, choice.backend) for choice in choices} == {
        (op, backend) for op in ops.OPS for backend in ops.BACKENDS if backend != "auto"
    }
    assert all(choice.reason for choice in choices)
    assert all(choice.available for choice in choices if choice.backend in ("cpu", "reference"))


def test_triton_is_named_only_where_it_can_run() -> None:
    ok, reason = next(choice[2:] for choice in ops.explain() if choice.backend == "triton")
    if not ok:
        with ops.use_backend("triton"), pytest.raises(UserError, match=r"model\.backend: triton can't run"):
            convolve()
    assert reason
