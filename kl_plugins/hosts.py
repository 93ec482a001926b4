"""The host versions that were tested, and the check that refuses any other before something is loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from kl_plugins.errors import PatchError

TESTED: dict[str, tuple[str, ...]] = {"trl": ("1.16.0",)}


def installed_version(host: str) -> str | None:
    """The installed version of a host's distribution, or None."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None


def require_tested(host: str) -> None:
    """Raise `PatchError` unless the installed version of `host` is one that the project's tests run against."""
    found, tested = installed_version(host), TESTED[host]
    if found not in tested:
        raise PatchError(
            f"kl was asked for on {host} {found or '(not installed)'}, which was not tested: its KL may be computed "
            f"elsewhere. Install a tested version ({host}=={tested[-1]}), or set kl=None to train with {host}'s own KL"
        )
