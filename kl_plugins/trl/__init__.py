"""TRL's trainers with the KL term that was asked for: `GRPOConfig(kl="k2_as_loss")` and a `GRPOTrainer` to match."""

from kl_plugins.trl.config import GRPOConfig, RLOOConfig
from kl_plugins.trl.grpo import GRPOTrainer
from kl_plugins.trl.rloo import RLOOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer"]
