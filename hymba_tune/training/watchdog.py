"""Stops a run that hangs: several processes wait for each other for ever as soon as one of them goes another way."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_tune.errors import UserError
from hymba_tune.rank import REPORTS, report_failure

# How often it looks, as a share of the time it grants.
_LOOKS = 20


class StepWatchdog(TrainerCallback):
    """Ends this process where no step, evaluation batch or checkpoint was finished for `minutes`.

    It says so where launch.py collects errors, with the line that the process waits in. Alone, a process has nobody to
    wait for and is left alone.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.step = 0
        self.seen = time.monotonic()
        self.stopped = threading.Event()
        self.waiting_for = threading.main_thread()
        self.reports = os.environ.get(REPORTS)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._alive(state)
        if self.reports is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._alive(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._alive(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._alive(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._alive(state)

    def stop(self) -> None:
        """Training is over."""
        self.stopped.set()

    def _alive(self, state: TrainerState) -> None:
        self.step, self.seen = state.global_step, time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(60 * self.minutes / _LOOKS):
            if time.monotonic() - self.seen > 60 * self.minutes:
                assert self.reports is not None
                report_failure(Path(self.reports), self._verdict())
                os._exit(1)

    def _verdict(self) -> UserError:
        frame = sys._current_frames().get(self.waiting_for.ident or 0)
        where = traceback.format_stack(frame)[-1].strip().splitlines()[0] if frame else "an unknown place"
        return UserError(
            f"training: no step for {self.minutes:g} minutes after step {self.step}; a process waits in {where}. If a "
            "step takes that long, raise launch.step_timeout; else look into the logs of the other ranks "
            f"({self.reports})"
        )
