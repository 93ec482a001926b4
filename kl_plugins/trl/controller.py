"""The controller of beta in TRL's training loop: moved after each update, and kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from kl_plugins.core.controllers import Controller

logger = logging.get_logger(__name__)

STATE = "kl_controller"
"""Where the controller's state is kept: this key of `TrainerState.stateful_callbacks`, so in `trainer_state.json`."""


class Controlled(Protocol):
    """A trainer whose beta a controller moves."""

    def set_beta(self, beta: float) -> None:
        """Use another coefficient from now on."""

    def control_beta(self) -> None:
        """Update the controller with what was measured since the last update, and set its beta."""


class BetaCallback(TrainerCallback):
    """After each optimizer step (of PPO: each rollout) it updates the controller of a trainer's beta.

    The controller's state is in the checkpoints, and a resumed run goes on from there.
    """

    def __init__(self, trainer: Controlled, controller: Controller) -> None:
        self.trainer, self.controller = trainer, controller

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue from the controller's state in the checkpoint that is resumed, if there is one.

        Raises `ConfigError` for the state of another controller.
        """
        if STATE in state.stateful_callbacks:
            self.controller.load_state_dict(state.stateful_callbacks[STATE])
            self.trainer.set_beta(self.controller.beta)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the controller, and put its state where the next checkpoint takes it from."""
        self.trainer.control_beta()
        state.stateful_callbacks[STATE] = self.controller.state_dict()


def say_dropped_controller(args: Any, folder: Path) -> None:
    """Warn if a run without a controller resumes a checkpoint of one that had one."""
    saved = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).stateful_callbacks.get(STATE)
    if saved is not None and args.kl_controller == "fixed":
        logger.warning(
            f"the checkpoint {folder} is of a run with kl_controller={saved['controller']!r}; this one has none, so "
            f"that beta is {args.beta} from here on"
        )
