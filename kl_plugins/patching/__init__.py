"""Patches for hosts that offer no seam: find, check, claim, apply, verify, and undo in reverse.

Which functions of which host versions may be replaced, and by what, is data: `patches/<host>.toml`. A function is
replaced only where its source and its signature are those that were tested; anything unknown is refused, and nothing
stays patched after a failure half-way. A wrapper is called with the original function and returns what takes its
place. Its module must not import the modules that it patches at its own top level: they may just be being imported.
"""

from kl_plugins.patching.inspection import (
    ALLOW_UNTESTED,
    OWNER_MARK,
    Change,
    bare_signature,
    changes,
    check,
    source_digest,
    untested_allowed,
)
from kl_plugins.patching.session import Binding, Patching, active
from kl_plugins.patching.targets import HostPatches, Target, load_patches

__all__ = [
    "ALLOW_UNTESTED",
    "OWNER_MARK",
    "Binding",
    "Change",
    "HostPatches",
    "Patching",
    "Target",
    "active",
    "bare_signature",
    "changes",
    "check",
    "load_patches",
    "source_digest",
    "untested_allowed",
]
