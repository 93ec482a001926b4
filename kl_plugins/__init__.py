"""KL regularization for LLM reinforcement learning whose gradient is what its name says.

Importing this package loads neither torch nor a host framework; names are resolved on first use.

Public, and kept from version to version: the names in `__all__`, `kl_plugins.errors`, `kl_plugins.trl`,
`kl_plugins.openrlhf` (with `driver.runtime_env_hook` and `driver.prepare`), `kl_plugins.oracle`,
`kl_plugins.conformance`, `kl_plugins.report`, the command `kl-plugins` and the entry-point group `kl_plugins.losses`.
Every other module is private and may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kl_plugins._version import __version__ as __version__

if TYPE_CHECKING:
    from kl_plugins.core.exact import ExactKL, exact_kl
    from kl_plugins.core.registry import KLLoss, all_losses, get_loss, register
    from kl_plugins.core.spec import KLSpec
    from kl_plugins.core.terms import KLTerms, kl_terms, leave_one_out_baseline, surrogate
    from kl_plugins.errors import ConfigError, PatchError, UnknownLossError
    from kl_plugins.trl.apply import apply_to_trl

_HOME = {
    "ConfigError": "errors",
    "PatchError": "errors",
    "UnknownLossError": "errors",
    "ExactKL": "core.exact",
    "exact_kl": "core.exact",
    "KLLoss": "core.registry",
    "all_losses": "core.registry",
    "get_loss": "core.registry",
    "register": "core.registry",
    "KLSpec": "core.spec",
    "KLTerms": "core.terms",
    "kl_terms": "core.terms",
    "leave_one_out_baseline": "core.terms",
    "surrogate": "core.terms",
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
