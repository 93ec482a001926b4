"""Callbacks that the recipes use, and that work with any trainer: metrics as JSON lines, and a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class JsonlCallback(TrainerCallback):
    """Append every logged dict to `path` as one JSON line, with `step` and `seconds` since the start in front.

    Each line is flushed, so a run that is interrupted leaves all it had logged. A run that doesn't resume a checkpoint
    starts the file anew.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: Any = None
        self._started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self._file is None:
            self._open("a" if state.global_step else "w")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if self._file is None:  # an evaluation before training
            self._open("w")
        seconds = round(time.perf_counter() - self._started, 3)
        self._file.write(json.dumps({"step": state.global_step, "seconds": seconds, **logs}, default=float) + "\n")
        self._file.flush()

    def _open(self, mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open(mode)


class ProgressBarCallback(TrainerCallback):
    """A `rich` progress bar over optimizer steps with the last reward, KL and effective sample size."""

    def __init__(self, description: str = "Training") -> None:
        self.description = description
        self._progress: Any = None
        self._task: Any = None
        self._numbers: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(self.description), BarColumn(bar_width=20), MofNCompleteColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self._progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._progress is None or not logs:
            return
        shown = (("reward", "reward", ".2f"), ("KL", "kl", ".4f"), ("ESS", "kl/ess", ".1%"))
        for label, key, form in shown:
            if logs.get(key) is not None:
                self._numbers[label] = format(logs[key], form)
        numbers = "  ".join(f"{label} {number}" for label, number in self._numbers.items())
        self._progress.update(self._task, numbers=numbers)

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """End the bar. `on_train_end` does it; an interrupted run calls it itself."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


__all__ = ["JsonlCallback", "ProgressBarCallback"]
