"""Callbacks that the recipes use, and that work with any trainer: metrics as JSON lines, and a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class JsonlCallback(TrainerCallback):
    """Append every logged dict to `path` as one JSON line, with the optimizer step and the seconds so far in front.

    ```python
    trainer = GRPOTrainer(..., callbacks=[JsonlCallback("runs/k2/metrics.jsonl")])
    # {"step": 10, "seconds": 41.3, "loss": ..., "reward": ..., "kl/k1": ...}
    ```

    The main process writes, as often as the trainer logs. Each line is flushed, so that a run that is interrupted
    leaves all it had logged. A run that doesn't resume a checkpoint starts the file anew. `kl_plugins.report` reads
    such files.

    Args:
        path: The file; its folder is made if it is missing.

    Raises, when training begins: `OSError` for a file that can't be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self._file is None:
            self._open("a" if state.global_step else "w")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        file = self._open("w") if self._file is None else self._file  # None: an evaluation before training
        seconds = round(time.perf_counter() - self._started, 3)
        file.write(json.dumps({"step": state.global_step, "seconds": seconds, **logs}, default=float) + "\n")
        file.flush()

    def _open(self, mode: Literal["a", "w"]) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open(mode)
        return self._file


class ProgressBarCallback(TrainerCallback):
    """A `rich` progress bar over optimizer steps, with the last numbers that were logged.

    These are TRL's `reward`, its `kl` (in nats) and `kl/ess`, the effective sample size of the KL's importance weights
    as a share of the tokens; those that a trainer doesn't log are left out. Only the main process draws.

    Args:
        description: What stands in front of the bar.
    """

    def __init__(self, description: str = "Training") -> None:
        self.description = description
        self._progress: Any = None
        self._task: Any = None
        self._numbers: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(self.description), BarColumn(bar_width=20), MofNCompleteColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._progress is None or not logs:
            return
        shown = (("reward", "reward", ".2f"), ("KL", "kl", ".4f"), ("ESS", "kl/ess", ".1%"))
        for label, key, form in shown:
            if logs.get(key) is not None:
                self._numbers[label] = format(logs[key], form)
        numbers = "  ".join(f"{label} {number}" for label, number in self._numbers.items())
        self._progress.update(self._task, numbers=numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the bar. `on_train_end` does it; an interrupted run calls it itself."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


__all__ = ["JsonlCallback", "ProgressBarCallback"]
