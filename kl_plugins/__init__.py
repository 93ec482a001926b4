"""KL regularization for LLM reinforcement learning whose gradient is what its name says.

Importing this package loads neither torch nor a host framework; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kl_plugins._version import __version__ as __version__

if TYPE_CHECKING:
    from kl_plugins.errors import ConfigError, PatchError, UnknownLossError
    from kl_plugins.exact import ExactKL, exact_kl
    from kl_plugins.registry import KLLoss, all_losses, get_loss, register
    from kl_plugins.spec import KLSpec
    from kl_plugins.terms import KLTerms, kl_terms, leave_one_out_baseline, surrogate
    from kl_plugins.trl.apply import apply_to_trl

_HOME = {
    "ConfigError": "errors",
    "PatchError": "errors",
    "UnknownLossError": "errors",
    "ExactKL": "exact",
    "exact_kl": "exact",
    "KLLoss": "registry",
    "all_losses": "registry",
    "get_loss": "registry",
    "register": "registry",
    "KLSpec": "spec",
    "KLTerms": "terms",
    "kl_terms": "terms",
    "leave_one_out_baseline": "terms",
    "surrogate": "terms",
    "apply_to_trl": "trl.apply",
}
__all__ = [
    "ConfigError",
    "ExactKL",
    "KLLoss",
    "KLSpec",
    "KLTerms",
    "PatchError",
    "UnknownLossError",
    "all_losses",
    "apply_to_trl",
    "exact_kl",
    "get_loss",
    "kl_terms",
    "leave_one_out_baseline",
    "register",
    "surrogate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
