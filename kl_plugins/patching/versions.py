"""What is installed of the hosts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(host: str) -> str | None:
    """The installed version of a host's distribution, or None."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None
