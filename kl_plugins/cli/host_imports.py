"""Whether a host can be imported, and if not, why: in a sentence that names the cause and the remedy."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from kl_plugins.patching import HostPatches

# Modules that a host imports but may be installed without, and how to get them.
NEEDED = {
    "openrlhf": {
        "flash_attn": "pip install flash-attn, or without a GPU put recipes/openrlhf_cpu on PYTHONPATH",
        "ray": "pip install 'kl_plugins[openrlhf]'",
        "deepspeed": "pip install 'kl_plugins[openrlhf]'",
    }
}


def missing_modules(host: str) -> list[str]:
    """The modules of `NEEDED` that aren't installed. Imports nothing."""
    return [name for name in NEEDED.get(host, ()) if name not in sys.modules and not importlib.util.find_spec(name)]


def import_problem(patches: HostPatches) -> str:
    """Import the modules of `patches`; say why the first of them that can't be imported can't, or return ""."""
    for module in dict.fromkeys(target.module for target in patches.targets):
        if problem := module_problem(patches.host, module):
            return problem
    return ""


def module_problem(host: str, module: str) -> str:
    """Import `module`, of `host`; say why it can't be imported.

    Returns "" if it can, and if this version of the host doesn't have it: then the installation isn't to blame.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  # the import of a host can fail in any way; it is shown
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return ""
        return import_failure(host, error)
    return ""


def import_failure(host: str, error: BaseException) -> str:
    """A sentence on the exception that an import of `host` ended with: its first cause, and what to do."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError) and error.name == host:
        return f"{host} isn't installed: pip install 'kl_plugins[{host}]'"
    if isinstance(error, ModuleNotFoundError) and error.name:
        remedy = NEEDED.get(host, {}).get(error.name.partition(".")[0], "install it")
        return f"{host} can't be imported: it needs the module {error.name}, which isn't installed; {remedy}"
    return f"{host} can't be imported: {type(error).__name__}: {error}; make that import work"
