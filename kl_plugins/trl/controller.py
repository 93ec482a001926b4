"""The controller of beta in TRL's training loop: moved after each update, and kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from kl_plugins.core.controllers import Controller

logger = logging.get_logger(__name__)

STATE = "kl_controller"
"""Where the controller's state is kept: this key of `TrainerState.stateful_callbacks`, so in `trainer_state.json`."""


class BetaCallback(TrainerCallback):
    """Calls `trainer.control_beta()` after each update; `trainer.beta` is set by it, also when a run is resumed."""

    def __init__(self, trainer: Any, controller: Controller) -> None:
        self.trainer, self.controller = trainer, controller

    def on_train_begin(self, args, state, control, **kwargs):
        """Continue from the state in a checkpoint."""
        if STATE in state.stateful_callbacks:
            self.controller.load_state_dict(state.stateful_callbacks[STATE])
            self.trainer.set_beta(self.controller.beta)

    def on_step_end(self, args, state, control, **kwargs):
        """One update."""
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
