"""TRL's trainers with the KL term that was asked for: `GRPOConfig(kl="k2_as_loss")` and a `GRPOTrainer` to match.

Names are resolved on first use: `PPOConfig` and `PPOTrainer` are for the releases that have them (TRL dropped its own
after 1.12, whose GRPO can't be imported beside a newer vLLM), `GMPOConfig` and `GMPOTrainer` are experimental in TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kl_plugins.trl.config import GRPOConfig, RLOOConfig
    from kl_plugins.trl.gmpo import GMPOConfig as GMPOConfig
    from kl_plugins.trl.gmpo import GMPOTrainer as GMPOTrainer
    from kl_plugins.trl.grpo import GRPOTrainer
    from kl_plugins.trl.monitor import KLMonitorCallback
    from kl_plugins.trl.ppo import PPOConfig as PPOConfig
    from kl_plugins.trl.ppo import PPOTrainer as PPOTrainer
    from kl_plugins.trl.rloo import RLOOTrainer

_HOME = {
    "GMPOConfig": "gmpo",
    "GMPOTrainer": "gmpo",
    "GRPOConfig": "config",
    "GRPOTrainer": "grpo",
    "KLMonitorCallback": "monitor",
    "PPOConfig": "ppo",
    "PPOTrainer": "ppo",
    "RLOOConfig": "config",
    "RLOOTrainer": "rloo",
}
# Without those that some releases of TRL lack, so that `import *` works with any.
__all__ = ["GRPOConfig", "GRPOTrainer", "KLMonitorCallback", "RLOOConfig", "RLOOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
