"""TRL's trainers with the KL term that was asked for: `GRPOConfig(kl="k2_as_loss")` and a `GRPOTrainer` to match.

`PPOConfig` and `PPOTrainer` are in `kl_plugins.trl.ppo`: TRL dropped its own after 1.12, whose GRPO can't be imported
beside a newer vLLM. So names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kl_plugins.trl.config import GRPOConfig, RLOOConfig
    from kl_plugins.trl.grpo import GRPOTrainer
    from kl_plugins.trl.rloo import RLOOTrainer

_HOME = {"GRPOConfig": "config", "RLOOConfig": "config", "GRPOTrainer": "grpo", "RLOOTrainer": "rloo"}
__all__ = ["GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
