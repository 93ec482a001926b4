"""The controller of beta in TRL's training loop: moved after each update, and kept in checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from kl_plugins.controllers import Controller

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
