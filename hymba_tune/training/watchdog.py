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

from hymba_tune.rank import REPORTS, report_hang

LOOK_SECONDS = 1.0
"""How often it looks."""
PATIENCE_SECONDS = 30.0
"""How long it waits for what other processes have to say: their last step may have ended a little later."""
TIMEOUT_MARGIN_SECONDS = 600
"""How much longer torch waits in one collective: its own message names neither ranks nor places, so it comes second."""


class StepWatchdog(TrainerCallback):
    """Ends this process where no step, evaluation batch or checkpoint was finished for `minutes`.

    Each process says where it is; launch.py makes one message of what all say. Alone, a process has nobody to wait for
    and is left alone.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.step = 0
        self.seen = time.monotonic()
        self.stopped = threading.Event()
        self.waiting_for = threading.main_thread()
        self.reports = Path(os.environ[REPORTS]) if REPORTS in os.environ else None

    def start(self) -> None:
        """Training begins: setting up counts as a step."""
        self.seen = time.monotonic()
        if self.reports is not None:
            threading.Thread(target=self._watch, args=(self.reports,), daemon=True).start()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._alive(state)

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

    def _watch(self, reports: Path) -> None:
        while not self.stopped.wait(LOOK_SECONDS):
            silence = time.monotonic() - self.seen
            if silence > self.seconds:
                frame = sys._current_frames().get(self.waiting_for.ident or 0)
                report_hang(reports, self.step, time.time() - silence, traceback.extract_stack(frame))
                self._wait_for_others(reports)
                os._exit(1)

    def _wait_for_others(self, reports: Path) -> None:
        """The first process that ends has the others ended before they have said where they are."""
        deadline, processes = time.monotonic() + PATIENCE_SECONDS, int(os.environ["WORLD_SIZE"])
        while time.monotonic() < deadline and len(list(reports.glob("rank-*.json"))) < processes:
            time.sleep(LOOK_SECONDS / 10)
